"""The training benchmark, with every backend that is asked for."""

import json

import pytest

from rwkvinside.cli.main import main


def test_measures_all_kinds_with_every_backend(tmp_path):
    asked = [
        "--random",
        "2,2,16",
        "--rows",
        "2",
        "--seq-len",
        "32",
        "--repeats",
        "2",
        "--backend",
        "chunked",
        "reference",
    ]
    assert main(["bench", "training", *asked, "--json", str(tmp_path / "speed.json")]) == 0
    result = json.loads((tmp_path / "speed.json").read_text())
    speed = result["tokens_per_second"]
    names = ["finetune", "align chunked", "distill chunked", "align reference", "distill reference"]
    assert list(speed) == names and min(speed.values()) > 0
    assert (result["rows"], result["seq_len"]) == (2, 32)


@pytest.mark.parametrize("shape", ["8", "8,8", "8,8,64,1", "8,x,64", "8,0,64"])
def test_a_shape_that_is_none(shape, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "training", "--random", shape])
    assert stopped.value.code == 2 and "as in 8,8,64" in capsys.readouterr().err
