"""A model in a small data type, but for the modules that need float32 and are fed and heard in it.

Where a number inside a module is larger than the small type holds, as the squares of a norm's input in float16, the module is kept. What a
rounded residual stream has lost no kept module brings back: measure before keeping one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from specforge.errors import ConfigError


@dataclass(frozen=True)
class AppliedPrecision:
    """What `PrecisionPolicy.apply` did; parameters keep their data types when the hooks are gone."""

    kept: tuple[str, ...]
    """Names of the modules that have hooks."""
    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class PrecisionPolicy:
    """
    Args:
        dtype: of all floating-point parameters and buffers that are not kept; complex ones stay.
        keep_fp32_modules: patterns of module names, as in a shell: `*.norm`, `layers.0.*`, `head`. A module is kept whole.
    """

    dtype: torch.dtype
    keep_fp32_modules: tuple[str, ...] = ()

    def apply(self, model: nn.Module) -> AppliedPrecision:
        """Cast the model in place; kept weights are never rounded on the way. Kept modules hand on tensors of `dtype`.

        Raises:
            ConfigError: a pattern matches no module.
        """
        kept = self._outermost_kept(model)
        modules = [model.get_submodule(name) for name in kept]
        kept_tensors = {id(tensor) for module in modules for tensor in _tensors(module)}
        for tensor in _tensors(model):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if id(tensor) in kept_tensors else self.dtype)
        handles = [module.register_forward_pre_hook(_casting_inputs, with_kwargs=True) for module in modules]
        handles += [module.register_forward_hook(_casting_output(self.dtype)) for module in modules]
        return AppliedPrecision(kept, tuple(handles))

    def _outermost_kept(self, model: nn.Module) -> tuple[str, ...]:
        names = [name for name, _ in model.named_modules() if name]
        for pattern in self.keep_fp32_modules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"keep_fp32_modules={pattern!r}: matches no module; correct the pattern. The modules are {', '.join(names)}."
                )
        kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.keep_fp32_modules)]
        return tuple(name for name in kept if not any(name.startswith(f"{other}.") for other in kept))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


def _casting_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return _cast(args, torch.float32), _cast(kwargs, torch.float32)


def _casting_output(dtype: torch.dtype) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda module, args, output: _cast(output, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """All floating-point tensors of a nest of tuples, lists and dictionaries."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, values)
