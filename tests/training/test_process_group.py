import pytest

from rwkvinside.errors import UserError
from rwkvinside.training.process_group import Distributed


class Rank(Distributed):
    """One of two ranks; `others` is what the other one adds to every sum."""

    def __init__(self, rank, others):
        super().__init__("cpu")
        self.rank, self.size, self._others = rank, 2, others

    def all_reduce_sum(self, values):
        return [value + self._others for value in values]


def refuse():
    raise UserError("in use", "wait")


def test_rank_0_works_and_the_others_wait():
    done = []
    assert Rank(0, 0).on_main(lambda: done.append(1) or "found") == "found" and done == [1]
    assert Rank(1, 0).on_main(lambda: done.append(2)) is None and done == [1]


def test_all_ranks_end_when_rank_0_refuses():
    with pytest.raises(UserError, match="in use"):
        Rank(0, 0).on_main(refuse)
    with pytest.raises(UserError, match="rank 0 has stopped"):
        Rank(1, 1).on_main(refuse)
