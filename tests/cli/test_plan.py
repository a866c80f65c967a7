"""`rwkvinside plan`: what several ranks change."""

import pytest
from tiny import save_configuration

from rwkvinside.cli import main as cli


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny")


def test_plan_for_several_ranks_shards_the_optimizer(teacher, capsys):
    def adam(ranks):
        assert (
            cli.main(["plan", "--teacher", teacher, "-v", "--ranks", str(ranks), "precision=bf16", "run=[align]"]) == 0
        )
        plan = capsys.readouterr().out
        return float(plan.split("optimizer ")[1].split(" KiB")[0])

    assert adam(4) == pytest.approx(adam(1) / 4, rel=0.01)  # printed with three digits
