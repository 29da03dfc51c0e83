"""The acceptance length that the evaluator predicts from stored features is the one that decoding shows, to the last token."""

from pathlib import Path

import pytest
import torch

from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.eagle3_tree import Eagle3TreeDrafter, TreeShape
from specforge.decode.engine import Decoder
from specforge.distributed import World
from specforge.eval.evaluator import Evaluator
from specforge.eval.live import decode_answers
from specforge.eval.simulate import simulate
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from specforge.methods.eagle3 import Eagle3
from tests.tiny import make_answered, make_method, make_store, make_target, train


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("live") / "target")


@pytest.fixture(scope="module")
def store(path: Path) -> LocalFeatureStore:
    return make_store(path.parent / "store", path, make_answered(path))


def adversarial(method: Eagle3, store: LocalFeatureStore) -> Eagle3:
    """A trained draft whose least likely token comes first."""
    train(method, store)
    assert method.draft.lm_head is not None
    method.draft.lm_head.weight.data.neg_()
    return method


DRAFTS = {"trained": train, "random": lambda method, store: method, "adversarial": adversarial}


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
@pytest.mark.parametrize("kind", DRAFTS)
def test_walk_is_live(kind: str, draft_tokens: int, path: Path, store: LocalFeatureStore) -> None:
    options = {"draft_tokens": draft_tokens, "draft_vocab_size": 50, "norm_output": draft_tokens == 3, "layers": 1 + draft_tokens // 5}
    method = DRAFTS[kind](make_method(path, store, **options), store)
    evaluator = Evaluator(store, World(), draft_tokens=draft_tokens, micro_batch_tokens=100, bootstrap=0)
    numbers = evaluator.evaluate(method)
    decoder = Decoder(Target.load(path, "float32"), Eagle3Drafter(method, draft_tokens))
    live = decode_answers(decoder, store, range(len(store)), batch_rows=5)
    assert all(answer.same for answer in live)
    tokens, rounds = (sum(len(x) if f else sum(x) for x in [a.decoded.committed for a in live]) for f in (False, True))
    assert numbers["eval/walk_acc_len"] == tokens / rounds
    if kind == "trained" and draft_tokens > 1:
        assert tokens / rounds > 1.5
    simulated = simulate(Eagle3Drafter(method, draft_tokens), store, range(len(store)), torch.device("cpu"), batch_rows=4)
    assert simulated == [answer.decoded for answer in live]


@pytest.mark.parametrize("shape", [TreeShape(2, 3, 5), TreeShape(4, 2, 10)], ids=str)
def test_simulated_trees_are_live(shape: TreeShape, path: Path, store: LocalFeatureStore) -> None:
    """Every round of every answer; and no tree of the same depth does worse than the chain that it contains."""
    method = train(make_method(path, store, draft_tokens=shape.depth, draft_vocab_size=50), store)
    target, samples = Target.load(path, "float32"), range(len(store))
    live = decode_answers(Decoder(target, Eagle3TreeDrafter(method, shape)), store, samples, batch_rows=5)
    assert all(answer.same for answer in live)
    simulated = simulate(Eagle3TreeDrafter(method, shape), store, samples, torch.device("cpu"), batch_rows=3)
    assert simulated == [answer.decoded for answer in live]
    chain = simulate(Eagle3Drafter(method, shape.depth), store, samples, torch.device("cpu"))
    assert sum(len(text.committed) for text in simulated) < sum(len(text.committed) for text in chain)
