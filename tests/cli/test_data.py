"""`rwkvinside data inspect` and `data pack` as users meet them."""

import io
import json
import struct

import pytest
from rich.console import Console
from tiny import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from rwkvinside.cli import data as data_command
from rwkvinside.cli import main as cli
from rwkvinside.data.tokenize import load_tokens

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A directory with a tokenizer of bytes and the configuration of a model with one id too few."""
    path = tmp_path_factory.mktemp("teacher")
    byte_tokenizer("<|im_start|>", "<|im_end|>", "<s>", chat_template=CHATML).save_pretrained(path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 64, "vocab_size": 258}
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3"} | sizes))
    return path


@pytest.fixture
def data(tmp_path):
    """A file with a document of every kind; the text is listed twice."""
    records = [
        {"text": "plain text, ü"},
        {"conversations": [{"from": "human", "value": "two\nlines"}, {"from": "gpt", "value": "answer"}]},
        {"question": "Which?", "choices": ["a", "b"], "answer": 1},
        {"question": "What?", "choices": ["a", "b"], "answer": 1},
        {"prompt": "1 + 1 =", "completion": " 2"},
        {"text": "plain text, ü"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*arguments):
    return cli.main(["data", *map(str, arguments)])


def test_inspect_says_what_there_is(teacher, data, capsys):
    assert run("inspect", data, "--tokenizer", teacher, "--seq-len", 64, "--samples", 99) == 0
    out = capsys.readouterr().out
    for line in (
        f"{data}: .jsonl, {data.stat().st_size} bytes",
        "  documents   8: 4 question, 2 text, 1 completion, 1 conversation",
        "  vocabulary  largest id 257, the tokenizer has 259",
        "  repeated    1 documents are equal to an earlier one (12.5%)",  # the text; rotations are none
        "  answers     given B 100.0%; trained on A 50.0% B 50.0%",
        "  samples; what carries no loss is between ‹ and ›",
        "plain text, ü",
        "‹<|im_start|>user\ntwo\nlines<|im_end|>\n<|im_start|>assistant\n›answer<|im_end|>\n",
        "‹1 + 1 =› 2",
        "‹<|im_start|>user\nWhich?\nA. b\nB. a\nAnswer with the letter of the right option.<|im_end|>",
    ):
        assert line in out, line
    # bytes, and 4 marks of a conversation: 14 twice; 4 + 32; 4 + 78 and 4 + 77, twice each; 9
    tokens = 2 * 14 + 36 + 2 * 82 + 2 * 81 + 9
    assert f"  tokens      {tokens}, of which" in out
    assert "\x1b" not in out
    assert run("inspect", data, "--tokenizer", teacher, "--as-given", "--samples", 0) == 0
    assert "trained on B 100.0%" in capsys.readouterr().out


def test_on_a_terminal_masked_tokens_are_dim(teacher, data, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system="standard", highlight=False, soft_wrap=True)
    monkeypatch.setattr(data_command, "Console", lambda **_: terminal)
    assert run("inspect", data, "--tokenizer", teacher, "--samples", 99) == 0
    out = screen.getvalue()
    assert "\x1b[2m1 + 1 =\x1b[0m 2" in out and "‹" not in out


def test_lengths_and_padding(teacher, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * n}) + "\n" for n in (3, 10, 12, 15, 100)))
    png = tmp_path / "lengths.png"
    assert run("inspect", path, "--tokenizer", teacher, "--seq-len", 32, "--samples", 0, "--png", png) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if " - " in line]
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("2", "3", "1"),
        ("4", "7", "0"),
        ("8", "15", "3"),
        ("16", "31", "0"),
        ("32", "63", "0"),
        ("64", "127", "1"),
    ]
    assert rows[2][4] == "█" * 40 and rows[0][4] == "█" * 13 and len(rows[1]) == 4
    # 140 tokens in 5 rows of 32; 32, 15 + 12 + 3 and 10 in 3 rows
    padding = next(line for line in lines if line.startswith("  padding"))
    assert f"{20 / 160:.2%} in packed rows of 32; {24 / 96:.1%} in rows of whole ones (sft), " in padding
    assert "which cut 1 documents and 48.6% of the tokens" in padding
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_ids_that_the_teacher_has_not(teacher, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a<s>b<s>"}\n{"text": "c"}\n')
    assert run("inspect", path, "--teacher", teacher, "--samples", 0) == 0
    out = capsys.readouterr().out
    assert "vocabulary  2 tokens have ids that the teacher (258) lacks: 258; a run refuses this data" in out
    assert run("pack", path, "--teacher", teacher, "--out", tmp_path / "packed") == 2
    assert "has token id 258" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


def test_pack_then_inspect_and_load(teacher, data, tmp_path, capsys):
    out = tmp_path / "packed"
    assert run("pack", data, "--tokenizer", teacher, "--out", out) == 0
    shown = capsys.readouterr().out
    assert f"{out}: 8 documents, " in shown and f"train on it with --data {out}" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed.jsonl", "packed"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    a, b = (load_tokens([source], tokenizer, cache_dir=tmp_path / "cache") for source in (data, out))
    assert [a.piece(i)[1].tolist() for i in range(8)] == [b.piece(i)[1].tolist() for i in range(8)]
    assert run("inspect", out, "--tokenizer", teacher, "--samples", 0) == 0
    assert f"{out}: packed tokens, 5 files, " in capsys.readouterr().out
    assert run("inspect", out, "--tokenizer", teacher, "--samples", 0, "--max-tokens", 20) == 0
    assert "  documents   2 (the first 20 tokens): of 4 question, 2 text, " in capsys.readouterr().out
    assert run("pack", data, "--tokenizer", teacher, "--out", out) == 2
    assert "already exists" in capsys.readouterr().err
    with (out / "tokens.bin").open("r+b") as file:
        file.write(b"\1")
    assert run("inspect", out, "--tokenizer", teacher) == 2
    assert capsys.readouterr().err.startswith(
        f"error: packed data {out} is damaged: tokens.bin is not what was written"
    )


def test_inspect_shows_ids_of_another_tokenizer(teacher, tmp_path, capsys):
    """What a run refuses: bytes of UTF-8 as ids are another order than this tokenizer's."""
    text = "Ein Text, der als Bytes gespeichert wurde. äöü" * 20
    tokens = text.encode()
    (tmp_path / "a.bin").write_bytes(tokens)
    index = struct.pack("<QBQQ", 1, 1, 1, 2) + struct.pack("<iq2q", len(tokens), 0, 0, 1)
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\x00\x00" + index)
    assert run("inspect", tmp_path / "a.idx", "--tokenizer", teacher, "--samples", 0) == 0
    out = capsys.readouterr().out
    assert "a.idx: binidx, uint8, 2 files, " in out
    assert "documents   1: 1 tokens" in out
    assert "come back from decoding and encoding" in out


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["inspect", "no/such.jsonl"], "data 'no/such.jsonl' does not exist"),
        (["inspect", "a.csv"], "unknown kind of data file '.csv'"),
    ],
)
def test_bad_input(teacher, tmp_path, monkeypatch, capsys, arguments, cause):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("a,b\n")
    assert run(*arguments, "--tokenizer", teacher) == 2
    err = capsys.readouterr().err
    assert cause in err and len(err.splitlines()) == 2
    assert run("inspect", "a.csv", "--tokenizer", "no-such-directory") == 2
    assert "tokenizer" in capsys.readouterr().err
    assert run("pack", "a.csv", "--tokenizer", teacher, "--out", "a.csv/packed") == 2
    assert "output a.csv/packed cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["inspect", "x"], "one of the arguments --teacher --tokenizer is required"),
        (["pack", "x", "--tokenizer", "y"], "the following arguments are required: --out"),
        (["inspect", "--tokenizer", "y"], "the following arguments are required: SOURCE"),
        (["inspect", "x", "--tokenizer", "y", "--max-tokens", "many"], "'many' is not a positive number such as 600k"),
        (["inspect", "x", "--tokenizer", "y", "--samples", "-1"], "'-1' is not a whole number of at least 0"),
        (["inspect", "x", "--tokenizer", "y", "--png", "no/x.png"], "folder no of the output x.png does not exist"),
    ],
)
def test_usage(capsys, arguments, cause):
    assert run(*arguments) == 2
    assert cause in capsys.readouterr().err


@pytest.mark.integration
def test_real_text_and_tokenizer(shared, capsys):
    path = shared / "data" / "tinystories-260k-samples" / "val.jsonl"
    assert run("inspect", path, "--teacher", shared / "teachers" / "stories260k", "--samples", 1) == 0
    out = capsys.readouterr().out
    assert "documents   300: 300 text" in out and "the teacher has 512" in out and "<s> Once upon a time" in out
