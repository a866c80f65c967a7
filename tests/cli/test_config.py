"""`rwkvinside config`: what results, and what there is."""

import pytest
from tiny import save_configuration

from rwkvinside.cli import main as cli


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny")


def test_config_show_and_fields(teacher, capsys):
    assert cli.main(["config", "show", "seed=3", "--teacher", teacher, "student.preset=rad"]) == 0
    shown = capsys.readouterr().out
    assert "\nseed: 3  # Seed of" in shown and "preset: rad" in shown
    assert cli.main(["config", "fields"]) == 0
    assert "stages.<stage>.tokens: Tokens to train on." in capsys.readouterr().out
    assert cli.main(["config", "fields", "student."]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("student.") for line in lines)
    assert any(line.startswith("student.init [calibrated* | published | scratch]: ") for line in lines)
    assert cli.main(["config", "fields", "stages.pretrain.tok"]) == 0
    assert capsys.readouterr().out == "stages.<stage>.tokens: Tokens to train on.\n"
    assert cli.main(["config", "fields", "use_rwkv"]) == 0
    assert capsys.readouterr().out.startswith("use_rwkv [True]: ")
    assert cli.main(["config", "fields", "nothing."]) == 2
    capsys.readouterr()
