"""`rwkvinside bench`: what it refuses before it measures."""

import pytest

from rwkvinside.cli.main import main


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["head", "--json", "no/out.json"], "folder no of the output out.json does not exist"),
        (["head", "--repeats", "0"], "argument --repeats: '0' is not a whole number of at least 1"),
        (["training"], "one of the arguments --teacher --random is required"),
        (["training", "--random", "1,1,8", "--backend", "auto", "trito"], "backend 'trito' is not known"),
        (["wkv7", "--device", "cpu", "--candidates", "cuda"], "'cuda' is not known"),
        *((["training", "--random", shape], "as in 8,8,64") for shape in ("8", "8,8", "8,8,64,1", "8,x,64", "8,0,64")),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, cause, capsys):
    assert main(["bench", *arguments]) == 2
    assert cause in capsys.readouterr().err
