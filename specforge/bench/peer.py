"""The PyPI package `speculators` on the same weights and batch, in its own environment and process (scripts/peer.sh makes it)."""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file

from specforge.bench.synthetic import Shape
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.methods.eagle3 import Eagle3

CHILD = Path(__file__).with_name("peer_child.py")


class Peer:
    """A child that does one forward and backward for each line it is sent."""

    def __init__(self, python: Path, shape: Shape, method: Eagle3, batch: DraftBatch) -> None:
        self.loss = float("nan")
        sizes = {
            "vocab_size": shape.vocab, "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": 1,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
            "rms_norm_eps": method.draft.config.rms_norm_eps, "max_position_embeddings": method.draft.config.max_position_embeddings,
        }  # fmt: skip
        self._folder = tempfile.TemporaryDirectory(prefix="specforge-peer-")
        file = Path(self._folder.name) / "step.safetensors"
        save_file(
            {name: tensor.contiguous() for name, tensor in exchanged(method, batch).items()},
            file,
            metadata={"sizes": json.dumps(sizes), "draft_vocab_size": str(shape.draft_vocab), "ttt_steps": str(shape.draft_tokens)},
        )
        command = [*map(str, (python, "-P", CHILD, file))]  # without -P, modules beside CHILD would hide those of Python, such as `profile`
        try:
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as cause:
            raise ConfigError(f"--peer {python}: cannot be run ({cause}); make its environment with scripts/peer.sh.") from cause
        self.step_s()

    def step_s(self) -> float:
        """CPU seconds of one more forward and backward of the peer."""
        stdin, stdout = _open(self._child.stdin), _open(self._child.stdout)
        try:
            stdin.write("step\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        line = stdout.readline()
        if not line:
            raise ConfigError(
                f"--peer: the child ended with code {self._child.wait()}, see above; make its environment with scripts/peer.sh."
            )
        answer = json.loads(line)
        self.loss = answer["loss"]
        return float(answer["seconds"])

    def close(self) -> None:
        _open(self._child.stdin).close()
        self._child.wait()
        _open(self._child.stdout).close()
        self._folder.cleanup()


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def exchanged(method: Eagle3, batch: DraftBatch) -> dict[str, torch.Tensor]:
    """Our draft under the peer's names (`weight.*`), and the batch as the peer's forward takes it (`batch.*`).

    The peer's row r holds token r+1 and the teacher's state there, and is scored where token r+2 is supervised. It norms the
    teacher's state once more; ours has unit mean square already, and made large it loses nothing to epsilon.
    """
    draft, documents = method.draft.state_dict(), batch.documents
    weights = {_peer_name(name): tensor for name, tensor in draft.items() if name not in ("d2t", "t2d")}
    weights |= {"embed_tokens.weight": method.embedding_VH, "verifier_lm_head.weight": method.teacher_head_DH}
    weights["verifier_norm.weight"] = torch.ones(batch.last.shape[1])
    return {
        **{f"weight.{name}": tensor for name, tensor in weights.items()},
        "d2t": draft["d2t"],
        "t2d": draft["t2d"],
        "batch.hidden_states": batch.aux[None],
        "batch.input_ids": batch.input_ids.long().roll(-1)[None],
        "batch.loss_mask": batch.loss_mask.roll(-2)[None],
        "batch.verifier_last_hidden_states": 1000 * batch.last.roll(-1, 0)[None],
        "batch.position_ids": torch.from_numpy(documents.position_T)[None],
        "batch.document_ids": torch.from_numpy(documents.index_T)[None],
    }


def _peer_name(name: str) -> str:
    """`layers.0.q_proj.weight` is the peer's `layers.0.self_attn.q_proj.weight`, and so on."""
    for part, members in {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}.items():
        for member in members:
            name = name.replace(f".{member}.", f".{part}.{member}.")
    return name
