"""Configurations, data, teachers and hostfiles with seeded mutations: each works or is refused in a line.

No traceback, no hanging, no other exception than those that commands turn into a line.
"""

import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from faults import assert_survived, faults, run
from mutations import TEXTS, any_value, mutated_bytes, mutated_tree, places
from tiny import byte_tokenizer, save_qwen3, save_texts

import train_distill
from rwkvinside.cli.main import main
from rwkvinside.config.load import load_config
from rwkvinside.config.show import to_yaml
from rwkvinside.errors import UserError
from rwkvinside.training.launch import is_host, read_hostfile

STAGES = ("calibrate", "align", "distill")
SMALL = [
    *(f"stages.{name}.tokens=128" for name in STAGES),
    *(f"stages.{name}.data.seq_len=32" for name in STAGES),
    *(f"stages.{name}.batch.tokens=64" for name in STAGES),
    "device=cpu",
]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    save_qwen3(
        root / "teacher", byte_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>", chat_template=CHATML)
    )
    save_texts(root / "train.jsonl")
    return root


# Configurations


@pytest.fixture(scope="module")
def configuration(material):
    """A valid one, with every field."""
    config = load_config(teacher=str(material / "teacher"), data=[str(material / "train.jsonl")], overrides=SMALL)
    return yaml.safe_load(to_yaml(config))


@faults("configurations", small=20, full=300)
def test_a_configuration(configuration, tmp_path, capsys, rng, number):
    file, more = tmp_path / "own.yaml", []
    tree = mutated_tree(rng, configuration, rng.choice((0, 1, 1, 1, 2, 3)))
    content = yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")
    if tree == configuration and rng.random() < 0.5:
        path = ".".join(map(str, rng.choice(places(configuration))))
        more = [f"{path}={rng.choice((*TEXTS, any_value(rng)))}".replace("\0", "")]
    elif tree == configuration:
        content = mutated_bytes(rng, content, rng.choice((1, 2)))
    file.write_bytes(content)
    assert_survived(run(main, "plan", "-c", file, *more), capsys.readouterr().err)


# Data


def texts():
    records = [{"text": f"story {i} " + "ab" * i} for i in range(12)]
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def conversations():
    return [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": f"A{i}", "weight": 1}]}
        for i in range(6)
    ] + [
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "system": "Be brief."},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "two", "completion": " four", "loss": True},
        {"question": "Which?", "choices": ["a", "b"], "answer": 1},
    ]


def write_data(rng, folder):
    """A file that can be read but for one or two mutations of its values, its bytes, or both."""
    kind = rng.choice(("txt", "jsonl", "jsonl", "chat", "chat", "json", "gz", "parquet", "parquet"))
    records = conversations() if kind in ("chat", "json") else [json.loads(line) for line in texts().splitlines()]
    values = rng.random() < 0.6
    if values:
        records = mutated_tree(rng, records, rng.choice((1, 1, 2)))
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    ending = {"chat": "jsonl", "gz": "jsonl.gz"}.get(kind, kind)
    file = folder / f"data.{ending}"
    if kind == "parquet":
        try:
            pq.write_table(pa.Table.from_pylist([r for r in records if isinstance(r, dict)]), file)
        except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):  # a table cannot hold it
            pq.write_table(pa.table({"text": ["a", None, "b"], "messages": [None, [], None]}), file)
        content = file.read_bytes()
    else:
        content = {"gz": lambda: gzip.compress(lines), "json": lambda: json.dumps(records).encode()}.get(
            kind, lambda: lines
        )()
    file.write_bytes(content if values and rng.random() < 0.7 else mutated_bytes(rng, content, rng.choice((1, 2, 3))))
    return file


@faults("data files", small=20, full=200)
def test_a_data_file(material, tmp_path, capsys, rng, number):
    file = write_data(rng, tmp_path)
    command = ["pack", "--out", tmp_path / "pack"] if rng.random() < 0.7 else ["inspect"]
    code = run(main, "data", *command, file, "--teacher", material / "teacher")
    assert_survived(code, capsys.readouterr().err)
    if command[0] == "pack":
        left = {path.name for path in tmp_path.iterdir()} - {file.name}
        assert left == ({"pack"} if code == 0 else set())


# Teachers


@faults("teachers", small=15, full=100)
def test_a_teacher(material, tmp_path, capsys, rng, number):
    teacher = shutil.copytree(material / "teacher", tmp_path / "teacher")
    names = sorted(path.name for path in teacher.iterdir())
    file = teacher / rng.choice([*names, "config.json", "config.json", "model.safetensors"])
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.75:
        file.write_text(json.dumps(mutated_tree(rng, json.loads(content), rng.choice((1, 1, 2)))))
    elif rng.random() < 0.1:
        file.unlink()
    elif file.suffix == ".safetensors" and rng.random() < 0.5:  # its header
        size = 8 + int.from_bytes(content[:8], "little")
        file.write_bytes(mutated_bytes(rng, content[:size], 1) + content[size:])
    else:
        file.write_bytes(mutated_bytes(rng, content, rng.choice((1, 2))))
    data = ["--data", material / "train.jsonl", "--out", tmp_path / "run", f"data.cache_dir={tmp_path / 'cache'}"]
    code = run(train_distill.main, "--teacher", teacher, *data, "run=[calibrate,align]", *SMALL)
    assert_survived(code, capsys.readouterr().err)


# Hostfiles


def hostfile(rng):
    """Lines as one might write them."""
    hosts = [
        "worker-1",
        "10.0.0.7",
        "fe80::1%eth0",
        "-oProxyCommand=x",
        "a b",
        "häst",
        "a;b",
        "$(x)",
        "w1",
        "w1",
        "user@w1",
    ]
    slots = [
        "slots=8",
        "slots=0",
        "slots=-1",
        "slots=1e3",
        "slots=",
        "slots=" + "9" * 5000,
        "slots=٣",
        "slot=2",
        "",
        "slots=2 #",
    ]
    ends = ["\n", "\n", "\r\n", "\r", "\x0b", "\0\n", "\u2028", ""]
    lines = [
        f"{rng.choice(hosts)}{rng.choice((' ', '  ', chr(9), '', chr(160)))}{rng.choice(slots)}{rng.choice(ends)}"
        if rng.random() < 0.4
        else f"w{rng.randrange(50)} slots={rng.randrange(1, 9)}\n"
        for _ in range(rng.choice((0, 1, 1, 2, 3)))
    ]
    content = "".join(lines).encode()
    return mutated_bytes(rng, content, 1) if rng.random() < 0.3 else content


@faults("hostfiles", small=50, full=50)
def test_a_hostfile(tmp_path, rng, number):
    file = tmp_path / "hosts"
    file.write_bytes(hostfile(rng))
    refusal, hosts = None, {}
    try:
        hosts = read_hostfile(file)
    except UserError as error:
        refusal = error
    assert all(is_host(name) and 0 < slots < 2**31 for name, slots in hosts.items())
    assert bool(hosts) != bool(refusal and refusal.cause.isprintable() and refusal.hint)
