"""The target: the language model whose hidden states and choices drafts learn from.

Shapes: B sequences of a forward, S tokens of one of them, N tokens of all, A captured layers, H hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from specforge import files
from specforge.errors import ConfigError, FeatureError
from specforge.layers.rows import to_device

_LOGIT_ROWS = 1024
_LOGIT_COLUMNS = 32_768
_HEAD_CHECK_TOKENS = 16
_HEAD_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest difference between the model's logits and head times last hidden state, relative to the largest logit."""


def aux_layer_ids(num_layers: int, requested: Sequence[int] = ()) -> tuple[int, ...]:
    """The captured layers, low to high, as indices into Hugging Face `hidden_states`: 0 are the embeddings, j the output of
    layer j - 1 before any final norm.

    Default: (2, n//2, n-3), the engines' own; targets of 4 to 6 layers: (1, ceil(n/2), n-1); fewer: every layer.

    Raises:
        ConfigError: a requested id is outside 0..n-1 or given twice; the last layer's output is what no engine hands to a draft.
    """
    n = num_layers
    if not requested:
        if n >= 7:
            return (2, n // 2, n - 3)
        return (1, (n + 1) // 2, n - 1) if n >= 4 else tuple(range(1, n + 1))
    if len(set(requested)) < len(requested) or min(requested) < 0 or max(requested) >= n:
        raise ConfigError(
            f"model.aux_layer_ids={list(requested)}: must be different indices from 0 (embeddings) to {n - 1}, below the target's last "
            f"layer, whose output no serving engine hands to a draft; leave it empty for {list(aux_layer_ids(n))}."
        )
    return tuple(sorted(requested))


class Target:
    """A frozen causal language model together with its head. `Target.load` reads one from a folder.

    The first capture raises FeatureError where the logits are more than head times last hidden state.
    """

    loads: ClassVar[int] = 0
    forwards: ClassVar[int] = 0

    def __init__(self, model: PreTrainedModel, path: str = "") -> None:
        self.model = model.eval()
        self.model.requires_grad_(False)
        self.path = path
        self.config = model.config.get_text_config()
        self.decoder: nn.Module = model.get_decoder()
        self.head: Any = model.get_output_embeddings()  # a linear layer: weight [V, H] and perhaps a bias [V]
        self.layers = self._find_layers()
        self._head_checked = False

    @classmethod
    def load(
        cls, path: str | Path, dtype: str, device: torch.device | str = "cpu", device_map: str = "", attention: str | None = None
    ) -> "Target":
        """Read the model in `path` (safetensors only, no code of its own) to `device`.

        With `device_map`, accelerate spreads it over devices, memory and disk instead, and `device` is not used. `attention` is
        transformers' `attn_implementation`; None: its choice.

        Raises:
            FeatureError: `path` holds no such model, or lacks some of its weights.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise FeatureError(f"model.target_path={str(path)!r}: no config.json there; give the folder of a causal language model.")
        if not any(folder.glob("*.safetensors")):
            raise FeatureError(f"model.target_path={str(path)!r}: no *.safetensors there; convert the weights, other formats are not read.")
        disable_progress_bar()  # every rank would draw its own into the log
        placement: dict[str, Any] = {"device_map": device_map} if device_map else {}
        with files.foreign(folder, FeatureError, "model.target_path must be a model that transformers loads; choose another target"):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, attn_implementation=attention, **placement,
            )  # fmt: skip
        absent = sorted({*report["missing_keys"], *(mismatch[0] for mismatch in report["mismatched_keys"])})
        if absent:
            raise FeatureError(
                f"model.target_path={str(path)!r}: weights for {', '.join(absent[:5])} ({len(absent)} tensors) are missing "
                f"or of another shape and would be random; download the folder again."
            )
        cls.loads += 1
        return cls(model if device_map else model.to(device), str(path))

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        embedding = self.model.get_input_embeddings()
        placed = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return embedding.weight.device if placed is None else torch.device(placed)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.no_grad()
    def capture(self, sequences: Sequence[np.ndarray], aux_ids: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """One forward over the right-padded sequences (each [S] integers).

        Returns, for each: aux [S, A*H] (residual stream after the layers `aux_ids`, low to high, un-normed), last [S, H]
        (after the final norm), argmax [S] int32 and logsumexp [S] float32 of the logits, all on the target's device.
        """
        lengths = [len(sequence) for sequence in sequences]
        ids_BS = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
        real_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids_BS[row, : len(sequence)] = torch.tensor(np.asarray(sequence), dtype=torch.long)
            real_BS[row, : len(sequence)] = True
        slot_N = to_device(np.concatenate([row * max(lengths) + np.arange(length) for row, length in enumerate(lengths)]), self.device)
        ids_BS, real_BS = ids_BS.to(self.device), real_BS.to(self.device)
        self.require_plain_head(sequences[0])
        with self.residual_stream(aux_ids) as stream:
            last_BSH = self.decoder(input_ids=ids_BS, attention_mask=real_BS.long(), use_cache=False).last_hidden_state
        Target.forwards += 1
        last_NH, *aux = (
            x_BSH.to(self.device).flatten(0, 1).index_select(0, slot_N)
            for x_BSH in (last_BSH, *(stream[layer] for layer in sorted(aux_ids)))
        )
        aux_NC = torch.cat(aux, dim=-1)
        argmax_N, logsumexp_N = self.choices(last_NH)
        packed = {"aux": aux_NC, "last": last_NH, "argmax": argmax_N, "logsumexp": logsumexp_N}
        pieces = {name: tensor.split(lengths) for name, tensor in packed.items()}
        return [{name: pieces[name][row] for name in packed} for row in range(len(sequences))]

    def choices(self, last_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """argmax [N] int32 and logsumexp [N] float32 of the logits in float32, which exist for a tile of rows and ids at a time."""
        best_N = last_NH.new_full((len(last_NH),), -torch.inf, dtype=torch.float32)
        argmax_N = torch.zeros_like(best_N, dtype=torch.int32)
        logsumexp_N = best_N.clone()
        weight_VH, bias_V = self.head_tensors()
        for first_id in range(0, self.vocab_size, _LOGIT_COLUMNS):
            ids = slice(first_id, first_id + _LOGIT_COLUMNS)
            weight = weight_VH[ids].float()
            bias = None if bias_V is None else bias_V[ids].float()
            for first_row in range(0, len(last_NH), _LOGIT_ROWS):
                rows = slice(first_row, first_row + _LOGIT_ROWS)
                logits = nn.functional.linear(last_NH[rows].float(), weight, bias)
                highest, where = logits.max(dim=-1)
                argmax_N[rows] = torch.where(highest > best_N[rows], where.int() + first_id, argmax_N[rows])
                best_N[rows] = torch.maximum(best_N[rows], highest)
                logsumexp_N[rows] = torch.logaddexp(logsumexp_N[rows], logits.logsumexp(dim=-1))
        return argmax_N, logsumexp_N

    def head_tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight [V, H] and bias [V] of the head on the target's device, also where accelerate keeps them elsewhere."""
        with _present(self.head):
            bias = getattr(self.head, "bias", None)
            return self.head.weight.to(self.device), None if bias is None else bias.to(self.device)

    def logits(self, last_XH: torch.Tensor) -> torch.Tensor:
        """Head times last hidden state [X, V], in float32; of a float64 target in float64.

        A head in half precision is widened once and stays, twice its size.
        """
        weight_VH, bias_V = self._wide_head
        return nn.functional.linear(_wide(last_XH), weight_VH, bias_V)

    @cached_property
    def _wide_head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight_VH, bias_V = self.head_tensors()
        return _wide(weight_VH), None if bias_V is None else _wide(bias_V)

    @contextmanager
    def residual_stream(self, layer_ids: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """Collects, while the decoder runs, hidden states [B, S, H] by index; hooks see them before any norm."""
        stream: dict[int, torch.Tensor] = {}

        def keep_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stream[0] = args[0] if args else kwargs["hidden_states"]

        def keeper(index: int) -> Callable[..., None]:
            def keep_output(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                stream[index] = output[0] if isinstance(output, tuple) else output

            return keep_output

        with ExitStack() as hooks:
            for index in layer_ids:
                if index == 0:
                    handle = self.layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)
                else:
                    handle = self.layers[index - 1].register_forward_hook(keeper(index))
                hooks.callback(handle.remove)
            yield stream

    def _find_layers(self) -> nn.ModuleList:
        for child in self.decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == self.num_layers:
                return child
        raise FeatureError(
            f"model.target_path={self.path!r}: {type(self.decoder).__name__} has no list of {self.num_layers} decoder layers, "
            f"so nothing can be captured; choose a decoder-only target."
        )

    @torch.no_grad()
    def require_plain_head(self, sequence: np.ndarray) -> None:
        """Compare, once, the model's logits on some tokens of `sequence` with head times last hidden state.

        Raises:
            FeatureError: they differ, or are not finite.
        """
        if self._head_checked:
            return
        ids_1S = torch.tensor(np.asarray(sequence[:_HEAD_CHECK_TOKENS]), dtype=torch.long, device=self.device)[None]
        outputs: list[Any] = []
        with self.decoder.register_forward_hook(lambda decoder, inputs, output: outputs.append(output)):
            logits_SV = self.model(input_ids=ids_1S, use_cache=False).logits[0].float()
        product_SV = self.head(outputs[0].last_hidden_state[0]).float().to(logits_SV.device)
        if not logits_SV.isfinite().all():
            raise FeatureError(
                f"model.target_path={self.path!r}: its logits are not finite on {self.device} in {self.dtype} with attention "
                f"{self.config._attn_implementation!r}; choose another data type, attention or target."
            )
        difference = float((logits_SV - product_SV).abs().max() / logits_SV.abs().max().clamp_min(1e-30))
        tolerance = _HEAD_TOLERANCE[self.dtype]
        if not difference <= tolerance:
            raise FeatureError(
                f"model.target_path={self.path!r}: its logits are not lm_head times the last hidden state (relative difference "
                f"{difference:.1e}, allowed {tolerance:.0e}); targets that cap or scale their logits cannot be distilled from stored "
                f"features, choose another one."
            )
        self._head_checked = True


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _present(module: nn.Module) -> AbstractContextManager[None]:
    """While entered, the weights of a module that accelerate keeps elsewhere are on its device."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)
