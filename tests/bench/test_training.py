"""The training benchmark, with every backend that is asked for."""

import json

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


def test_what_is_computed_again_is_compared(tmp_path):
    asked = ["--random", "2,2,16", "--rows", "2", "--seq-len", "32", "--repeats", "1", "--recompute"]
    asked += ["nothing", "recurrence", "layers", "--json", str(tmp_path / "speed.json")]
    assert main(["bench", "training", *asked]) == 0
    speed = json.loads((tmp_path / "speed.json").read_text())["tokens_per_second"]
    assert list(speed)[1:] == [
        f"{name} auto{more}" for more in ("", ", recurrence again", ", layers again") for name in ("align", "distill")
    ]
