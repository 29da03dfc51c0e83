"""`speculators` 0.9.0, in an environment of its own, on exported drafts: its converter, networks, losses and gradients, beside ours.

Its rows of EAGLE-3 and P-EAGLE hold the token and the teacher's state behind theirs. Prompts are longer than a chain here, since it
scores rows of one document by tokens of the next where these are supervised.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from specforge.bench.peer import exchanged
from specforge.bench.train_step import teacher_entropy
from specforge.cli.__main__ import main
from specforge.distributed import World
from specforge.export.contract.folder import read_folder
from specforge.export.contract.logits import block_logits, block_states, chain_logits, confidences
from specforge.features.batch import DraftBatch
from specforge.layers.norm import normalise
from specforge.methods.base import Moment
from specforge.methods.eagle3 import plan_ttt, supervised_targets
from tests.export.checkpoints import ROPES, save_method, sharpen
from tests.methods.test_contract import make
from tests.tiny import make_samples, make_store, make_target

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("speculators_child.py")
PROMPT_TOKENS, DRAFTS, BLOCK, TOLERANCE = 6, 3, 4, 1e-5
Ask = Callable[..., dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """What speculators computes from a folder. scripts/peer.sh makes its environment from PyPI, once."""
    if os.environ.get("SPECFORGE_OFFLINE"):
        pytest.skip("SPECFORGE_OFFLINE is set; unset it to have speculators installed from PyPI")
    made = subprocess.run([ROOT / "scripts" / "peer.sh"], stdout=subprocess.PIPE, text=True, check=True)
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # it compiles the mask of blocks, which not every compiler takes
    with subprocess.Popen(
        [made.stdout.strip(), CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
    ) as child:

        def answer(folder: Path, batch: dict[str, torch.Tensor], watched: list[str], convert: Any = None, **asked: Any) -> Any:
            place = tmp_path_factory.mktemp("job")
            save_file({name: tensor.contiguous() for name, tensor in batch.items()}, place / "batch")
            job = {"folder": str(folder), "batch": str(place / "batch"), "watched": watched, "out": str(place / "out")}
            print(json.dumps({**job, "convert": convert, "asked": {"loss_fn": "kl_div"} | asked}), file=child.stdin)
            while (line := child.stdout.readline()) != "done\n":
                assert line, f"speculators ended with code {child.wait()}, see above"
            return load_file(place / "out")

        yield answer
        child.stdin.close()


@dataclass
class Case:
    method: Any
    target: Path
    folder: Path
    batch: DraftBatch
    raw_TH: torch.Tensor
    """Teacher's states before the target's final norm, which speculators applies itself."""

    def export(self, to: str) -> Path:
        out = self.folder / to
        assert main(["export", "--checkpoint", str(self.folder / "run" / "latest"), "--to", to, "--out", str(out)]) == 0
        return out


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a final norm that is not 1."""
    folder = make_target(tmp_path_factory.mktemp("target"), rope_parameters=ROPES["llama3"])
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = 1 + 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(3))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def case(target: Path, tmp_path: Path) -> Callable[..., Case]:
    """A saved draft of sharp random weights and random features."""

    def of(name: str, lengths: list[int], **options: Any) -> Case:
        store = make_store(tmp_path / "store", target, make_samples(lengths))
        method = sharpen(make(name, target, store, **options), 0.1)
        save_method(World(), name, method, target, tmp_path / "run")
        batch, generator = DraftBatch.read(store, range(len(lengths))), torch.Generator().manual_seed(1)
        aux_TF, raw_TH = (torch.randn(x.shape, generator=generator) for x in (batch.aux, batch.last))
        last_TH = normalise(raw_TH, 1e-6) * load_file(target / "model.safetensors")["model.norm.weight"]
        mask_T = torch.cat([torch.arange(length) >= PROMPT_TOKENS for length in lengths])
        return Case(method, target, tmp_path, replace(batch, aux=aux_TF, last=last_TH, loss_mask=mask_T), raw_TH)

    return of


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def plain(gradients: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """By names that both have: theirs group a layer's tensors, and have another word for the norm before a later layer's attention."""
    words = {"self_attn.": "", "mlp.": "", "layers.1.hidden_norm": "layers.1.input_layernorm"}
    return {reduce(lambda name, word: name.replace(*word), words.items(), name): tensor for name, tensor in gradients}


def assert_same_gradients(answer: dict[str, torch.Tensor], method: Any, scale: float, theirs_alone: set[str]) -> None:
    """Of every parameter of ours, relative to its largest; `theirs_alone` are trained by them and not by us."""
    theirs = plain((name.removeprefix("grad."), tensor) for name, tensor in answer.items() if name.startswith("grad."))
    ours = plain((name, parameter.grad * scale) for name, parameter in method.draft.named_parameters())
    assert theirs.keys() - ours.keys() == theirs_alone and ours.keys() <= theirs.keys()
    apart = {name: difference(theirs[name], gradient) for name, gradient in ours.items()}
    assert max(apart.values()) < TOLERANCE, apart


def shifted(case: Case) -> dict[str, torch.Tensor]:
    """The batch as speculators' chains take it."""
    theirs = {name.removeprefix("batch."): tensor for name, tensor in exchanged(case.method, case.batch).items() if "batch." in name}
    return {**theirs, "verifier_last_hidden_states": case.raw_TH.roll(-1, 0)[None]}


def unshifted(case: Case) -> dict[str, torch.Tensor]:
    """A batch of one document as speculators' blocks take it."""
    batch, tokens = case.batch, len(case.batch.input_ids)
    theirs = {
        "hidden_states": batch.aux,
        "input_ids": batch.input_ids.long(),
        "loss_mask": batch.loss_mask,
        "verifier_last_hidden_states": case.raw_TH,
        "position_ids": torch.arange(tokens),
        "document_ids": torch.zeros(tokens, dtype=torch.long),
    }
    return {name: tensor[None] for name, tensor in theirs.items()}


def all_in_vocabulary(case: Case) -> DraftBatch:
    """The teacher's arg-max among what the draft can say: where it is another speculators scores the row all the same."""
    argmax_T = (case.batch.last @ case.method.teacher_head_DH.T).argmax(-1)
    return replace(case.batch, argmax=(argmax_T + case.method.draft.d2t[argmax_T]).int())


def embedded(case: Case, document: slice) -> torch.Tensor:
    return F.embedding(case.batch.input_ids[document].long(), case.method.embedding_VH)


def assert_same_chain(case: Case, folder: Path, answer: dict[str, torch.Tensor]) -> None:
    """Logits of every step, at all rows whose token is known."""
    served = read_folder(folder)
    for begin, length in zip(case.batch.documents.starts, case.batch.documents.lengths, strict=False):
        document = slice(begin, begin + length)
        fed_SNH = torch.stack([embedded(case, document).roll(-1 - step, 0) for step in range(DRAFTS)])
        for step, logits_ND in enumerate(chain_logits(served, case.batch.aux[document], fed_SNH)):
            known = length - 1 - step
            assert difference(answer[f"lm_head.{step}"][0, document][:known], logits_ND[:known]) < TOLERANCE


CHAINS: list[dict[str, Any]] = [
    {},
    {"fc_norm": True, "norm_output": True},
    {"norm_before_fc": True, "head": "frozen", "draft_vocab_size": 0},
]
STEPS = {"ttt_steps": DRAFTS, "ttt_step_loss_decay": 1.0}


@pytest.mark.parametrize("options", CHAINS, ids=str)
def test_eagle3(options: dict[str, Any], case: Callable[..., Case], ask: Ask) -> None:
    """It divides each step's loss by the supervised rows, we divide the sum of all steps by those of all steps."""
    given = case("eagle3", [15, 20], step_decay=1.0, **options)
    answer = ask(given.export("speculators"), shifted(given), ["lm_head"], **STEPS)
    assert_same_chain(given, given.folder / "speculators", answer)

    batch = all_in_vocabulary(given)
    plan = given.method.plan(batch)
    loss_sum = given.method(batch, plan).loss_sum
    loss_sum.backward()
    divergence = (loss_sum.item() - teacher_entropy(given.method, batch)) * DRAFTS / plan.weight
    assert answer["loss"].item() == pytest.approx(divergence, rel=TOLERANCE)
    assert_same_gradients(answer, given.method, DRAFTS / plan.weight, {"lm_head.weight"} if "head" in options else set())


def converted(case: Case, folder: Path, algorithm: str, **options: Any) -> dict[str, Any]:
    """What the converter is asked for."""
    return {"model": str(folder), "verifier": str(case.target), "algorithm": algorithm, **options}


def test_its_converter_takes_an_eagle3_draft_of_the_original_layout(case: Callable[..., Case], ask: Ask) -> None:
    """With the embedding, without which its network has none; without it the file has the same tensors all the same."""
    given = case("eagle3", [15, 20], step_decay=1.0)
    first = ask(given.export("speculators"), shifted(given), ["lm_head"], **STEPS)
    for to in ("hf", "sglang"):
        out, options = given.folder / f"{to} converted", {"norm_before_residual": False, "eagle_aux_hidden_state_layer_ids": [1, 2, 3]}
        answer = ask(out, shifted(given), ["lm_head"], converted(given, given.export(to), "eagle3", **options), **STEPS)
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (given.folder / to, out))
        assert ours.keys() == theirs.keys() and all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
        if to == "hf":
            assert_same_chain(given, given.folder / to, answer)
            assert torch.equal(answer["loss"], first["loss"])


def test_peagle(case: Callable[..., Case], ask: Ask) -> None:
    """It leaves out one chain by lot even where it is to keep all; its rows are found among ours, each once and in our order."""
    given = case("peagle", [20], step_decay=1.0, layers=2)
    asked = {"num_depths": DRAFTS, "down_sample_ratio": 1.0, "down_sample_ratio_min": 1.0}
    answer = ask(given.export("speculators"), shifted(given), ["lm_head"], **asked)
    tokens, found_RD = len(given.batch.input_ids), answer["lm_head.0"][0]
    mask_NH = given.method.embedding_VH[given.method.draft.config.mask_token_id].expand(tokens, -1)
    fed_SNH = torch.stack([embedded(given, slice(tokens)).roll(-1, 0), mask_NH, mask_NH])
    ours_MD = chain_logits(read_folder(given.folder / "speculators"), given.batch.aux, fed_SNH).flatten(0, 1)
    apart_RM = (found_RD[:, None] - ours_MD).abs().amax(-1) / ours_MD.abs().max()
    place_R = apart_RM.argmin(1)
    assert apart_RM.amin(1).max() < TOLERANCE and (place_R.diff() > 0).all() and len(place_R) > 2 * tokens

    supervised_JT = np.zeros((DRAFTS, tokens), dtype=bool)
    supervised_JT[place_R // tokens, place_R % tokens] = True
    supervised_JT &= supervised_targets(given.batch, DRAFTS)
    batch = all_in_vocabulary(given)
    plan = plan_ttt(batch, supervised_JT, np.ones(64, dtype=bool), 1.0)
    loss_sum = given.method(batch, plan).loss_sum
    loss_sum.backward()
    entropy_T = torch.distributions.Categorical(logits=batch.last @ given.method.teacher_head_DH.T).entropy()
    entropy = sum(float(entropy_T[1 + step + np.flatnonzero(row_T)].sum()) for step, row_T in enumerate(supervised_JT))
    assert answer["loss"].item() == pytest.approx((loss_sum.item() - entropy) / plan.weight, rel=TOLERANCE)
    assert_same_gradients(answer, given.method, 1 / plan.weight, {"embed_tokens.weight"})


BLOCKS: list[tuple[str, dict[str, Any], str]] = [
    ("dflash", {"loss": "ce"}, "ce"),
    ("dflash", {"loss": "kl"}, "kl_div"),
    ("dspark", {}, '{"ce": 0.1, "tv": 1.8}'),
]


@pytest.mark.parametrize(("name", "options", "loss"), BLOCKS, ids=str)
def test_blocks(name: str, options: dict[str, Any], loss: str, case: Callable[..., Case], ask: Ask) -> None:
    """The text is the teacher's arg-max, which is its label. It takes no anchor among the last rows, and divides by the number of drafts
    where we divide by the sum of their weights."""
    given = case(name, [20], layers=2, position_decay=4.0, anchors=100, **options)
    tokens, head_VH = len(given.batch.input_ids), given.method.head_VH
    given.batch.input_ids[1:] = (given.batch.last @ head_VH.T).argmax(-1)[:-1]
    batch, ids_T = given.batch, given.batch.input_ids.long()
    watched = ["lm_head", *(["markov_head.markov_w2", "confidence_head"] if name == "dspark" else [])]
    answer = ask(given.export("speculators"), unshifted(given), watched, loss_fn=loss, gamma=4.0, max_anchors=32)
    served, first = read_folder(given.folder / "speculators"), given.method.first_draft_row
    for number, anchor in enumerate(range(PROMPT_TOKENS, tokens - BLOCK)):
        previous_K = ids_T[anchor : anchor + BLOCK - first]
        embedded_BH = given.method.embed_blocks(previous_K[:1])[[0] + [1] * (BLOCK - 1)]
        states_BH = block_states(served, batch.aux[:anchor], embedded_BH)
        logits_KV = block_logits(served, states_BH, head_VH, previous_K, given.method.embed(previous_K))
        found_KV = answer["lm_head.0"][0, number * BLOCK : (number + 1) * BLOCK][first:]
        if name == "dspark":
            found_KV = found_KV + answer["markov_head.markov_w2.0"][number]
            assert difference(answer["confidence_head.0"][number].sigmoid(), confidences(served, states_BH, previous_K)) < TOLERANCE
        assert difference(found_KV, logits_KV) < TOLERANCE

    plan = given.method.plan(batch, Moment(seed=0, step=0, total_steps=1))
    kept_N = plan.start_N < tokens - BLOCK
    plan = replace(plan, anchors_A=plan.anchors_A[: -BLOCK + 1], block_N=plan.block_N[kept_N], draft_N=plan.draft_N[kept_N])
    loss_sum = given.method(batch, plan).loss_sum
    loss_sum.backward()
    if loss == "kl_div":
        entropy_T = torch.distributions.Categorical(logits=batch.last @ head_VH.T).entropy()
        loss_sum = loss_sum - (torch.exp(-torch.from_numpy(plan.draft_N - 1) / 4.0) * entropy_T[plan.start_N + plan.draft_N - 1]).sum()
    assert answer["loss"].item() == pytest.approx(loss_sum.item() / len(plan.draft_N), rel=TOLERANCE)
    assert_same_gradients(answer, given.method, 1 / len(plan.draft_N), {"lm_head.weight"})


def test_its_converter_takes_a_dflash_draft(case: Callable[..., Case], ask: Ask) -> None:
    """With the tables of the target and without them, to the last bit."""
    given = case("dflash", [20], layers=2)
    asked: dict[str, Any] = {"gamma": 4.0, "max_anchors": 32}
    first = ask(given.export("speculators"), unshifted(given), ["lm_head"], **asked)
    for to in ("sglang", "hf"):
        convert = converted(given, given.export(to), "dflash", aux_hidden_state_layer_ids=[1, 2, 3])
        answer = ask(given.folder / f"{to} converted", unshifted(given), ["lm_head"], convert, **asked)
        assert torch.equal(answer["lm_head.0"], first["lm_head.0"]) and torch.equal(answer["loss"], first["loss"])
