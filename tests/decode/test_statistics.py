from specforge.decode.engine import Decoded
from specforge.decode.statistics import Rounds


def test_shares_of_rounds_counted_by_hand() -> None:
    """0, 2, 1, 0 and 2 of four drafts are accepted; no round accepted the third, so nothing is known of the fourth."""
    texts = [Decoded([7] * 6, True, [0, 2, 1], [1, 3, 1]), Decoded([7] * 5, False, [0, 2], [1, 3])]
    numbers = Rounds.of(texts, 4).numbers()
    assert (numbers["rounds"], numbers["tokens"], numbers["tokens_per_round"]) == (5, 9, 1.8)
    assert numbers["histogram"] == [2, 1, 2, 0, 0]
    assert numbers["survival"] == [0.6, 0.4, 0.0, 0.0]
    assert numbers["alpha"] == [0.6, 2 / 3, 0.0, None]
