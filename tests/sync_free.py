"""A proof on a CPU that a function of tensors never reads a value back, as would make a GPU's host wait for it.

The function runs on fake tensors, which have shapes but no values: whatever needs a value (`item`, `tolist`, `if tensor`, `nonzero`,
indexing by booleans, `repeat_interleave` without a size, `unique`) cannot go on. Copies to the host are known by their names, `x.cpu()` and
`x.to("cpu")`; to a device that only a variable names, a CPU cannot tell them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ASSIGNMENTS = (torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default)


def value_read(function: Callable[..., Any], *inputs: Any) -> str | None:
    """The operator by which `function(*inputs)` reads a value back; None: it reads none.

    Args:
        inputs: tensors, modules and objects that hold some; the function is given copies without values. It may use no other tensors:
            torch refuses them by an AssertionError, unless they are read by `tolist` or `numpy` before any operator sees them.
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fakes = copy.deepcopy(inputs)
    try:
        with mode, _AssignmentMode(), _HostMode():
            function(*fakes)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return str(error.func)
    return None


class _AssignmentMode(TorchDispatchMode):
    """`x[mask] = rows` asks for the mask's true places, which fake tensors do not notice. A single value is filled in without."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in ASSIGNMENTS and args[2].numel() != 1 and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise DynamicOutputShapeException(func)
        return func(*args, **(kwargs or {}))


class _HostMode(TorchFunctionMode):
    """`x.cpu()` does nothing where x is on a CPU, so that no operator shows it."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cpu or (
            func is torch.Tensor.to and any(isinstance(x, str) and x == "cpu" for x in (*args, *kwargs.values()))
        ):
            raise DynamicOutputShapeException(func)
        return func(*args, **kwargs)
