"""Small inputs that failed once, in `shared/cases`: each gives what its README calls right."""

from pathlib import Path

import pytest
import templates
from tiny import byte_tokenizer

import train_distill
from rwkvinside.cli.main import main
from rwkvinside.data.chat import encode_conversation
from rwkvinside.data.encode import Encoder
from rwkvinside.data.readers import read_documents
from rwkvinside.errors import UserError

pytestmark = pytest.mark.faults("inputs that failed once")

ROOTS = [parent / "shared" / "cases" for parent in Path(__file__).resolve().parents]
# Chat templates and code that travel with a tokenizer are about exports.
ELSEWHERE = {"multi-chat-templates", "custom-tokenizer-code"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def cases():
    root = next((root for root in ROOTS if root.is_dir()), None)
    if root is None:
        pytest.skip("no shared/cases beside the repository")
    return root


def tokenizer_of(template=CHATML):
    return byte_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>", chat_template=template)


def encoded(source, template=CHATML):
    """The texts of a source's documents, and what of each is trained on."""
    tokenizer = tokenizer_of(template)
    found = []
    for document in Encoder(tokenizer)(list(read_documents(source))):
        runs = [[]]
        loss = [True] * len(document.ids) if document.loss is None else document.loss
        for token, wanted in zip(document.ids.tolist(), loss, strict=True):
            if wanted:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        found.append((tokenizer.decode(document.ids.tolist()), [tokenizer.decode(run) for run in runs if run]))
    return found


def refused(source, match, template=CHATML):
    with pytest.raises(UserError, match=match) as caught:
        encoded(source, template)
    assert caught.value.hint and "\n" not in caught.value.cause


@pytest.fixture
def train(cases, tmp_path, capsys):
    """Run the command and return exit code, the lines of the error, and what it left."""

    def train(*arguments):
        out = tmp_path / "run"
        options = [*arguments, "--out", str(out), "device=cpu", f"data.cache_dir={tmp_path / 'cache'}"]
        options += [f"stages.{name}.tokens=256" for name in ("calibrate", "align", "distill", "sft")]
        options += [f"stages.{name}.data.seq_len=32" for name in ("calibrate", "align", "distill", "sft")]
        options += [f"stages.{name}.batch.tokens=128" for name in ("calibrate", "align", "distill", "sft")]
        code = train_distill.main(list(map(str, options)))
        return code, capsys.readouterr().err.splitlines(), sorted(p.name for p in tmp_path.iterdir())

    return train


def test_every_folder_is_tried(cases):
    here = Path(__file__).read_text()
    folders = {folder.name for folder in cases.iterdir() if folder.is_dir()}
    assert not {name for name in folders - ELSEWHERE if f'cases / "{name}"' not in here}


def test_tool_calls_dropped_by_template(cases):
    refused(cases / "tool-calls-dropped-by-template", "leaves out .*get_weather", templates.LLAMA3)
    ((_, runs),) = encoded(cases / "tool-calls-dropped-by-template", templates.QWEN3)
    assert "get_weather" in runs[0] and len(runs) == 2


def test_unknown_roles(cases, tmp_path):
    folder = cases / "unknown-roles-dropped"
    ((text, _),) = encoded(folder / "dev.jsonl", templates.QWEN3)
    assert text.startswith("<|im_start|>system\nAnswer tersely.<|im_end|>\n")
    ((text, runs),) = encoded(folder / "swift_tool.jsonl", templates.QWEN3)
    assert "<tool_response>\n7\n</tool_response>" in text and "seven" in runs[1]
    assert runs[0] == '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bonn"}}\n</tool_call><|im_end|>\n'
    other = tmp_path / "a.jsonl"
    other.write_text('{"messages": [{"role": "critic", "content": "x"}, {"role": "assistant", "content": "y"}]}\n')
    refused(other, r"a\.jsonl:1: a message is from 'critic'")


@pytest.mark.parametrize("name", ["weight", "loss", "train"])
@pytest.mark.parametrize("template", [CHATML, templates.QWEN3])
def test_message_loss_flags(cases, name, template):
    ((text, runs),) = encoded(cases / "message-loss-flags" / f"{name}.jsonl", template)
    assert "BAD ans" in text and len(runs) == 1 and "GOOD ans" in runs[0]


def test_empty_text_hides_messages(cases):
    found = encoded(cases / "empty-text-hides-messages")
    assert [runs for _, runs in found] == [["A1<|im_end|>\n"], ["hello there"]]


def test_no_targets_at_all(cases, train):
    folder = cases / "no-targets-at-all"
    teacher = cases / "custom-tokenizer-code" / "teacher"
    texts = cases / "lfs-pointer-weights" / "train.jsonl"
    for data, val, which in (
        (folder / "allmask.jsonl", folder / "val.jsonl", "training data"),
        (texts, folder / "allmask.jsonl", "validation data"),
    ):
        arguments = ["--teacher", teacher, "--data", data, "--val", val, "data.check_ids=false"]
        arguments += ["teacher.trust_remote_code=true", "run=[align,distill]"]
        code, lines, left = train(*arguments)
        assert code == 2 and f"{which} has no token to predict" in lines[0], lines
        assert "run" not in left, "nothing has begun"


def test_strftime_now(cases):
    ((text, runs),) = encoded(cases / "strftime-now", templates.LLAMA32)
    assert "Today Date: 26 Jul 2024" in text and runs == ["A1<|eot_id|>"]


@pytest.mark.parametrize("name", ["q1", "q2", "q3", "q4", "tool_think"])
def test_qwen3_thoughts_tools_multiturn(cases, name):
    """As the same conversation without what the template drops."""
    source = cases / "qwen3-thoughts-tools-multiturn" / f"{name}.jsonl"
    ((text, runs),) = encoded(source, templates.QWEN3)
    (document,) = read_documents(source)
    plain = [m | {"content": m["content"].split("</think>")[-1].lstrip("\n")} for m in document.messages]
    tokenizer = tokenizer_of(templates.QWEN3)
    ids, mask = encode_conversation(tokenizer, plain, "x", document.tools)
    assert tokenizer.decode(ids) == text and "T1" not in text
    answers = [m for m in document.messages if m["role"] == "assistant"]
    assert len(runs) == len(answers) and int(mask.sum()) == sum(len(tokenizer.encode(run)) for run in runs)
    for answer, run in zip(answers, runs, strict=True):
        shown = answer["content"].split("</think>")[-1].strip()
        assert shown in run and ("tool_calls" not in answer or "<tool_call>" in run)


def test_datasets_json_type_parquet(cases):
    folder = cases / "datasets-json-type-parquet"
    read = [[d.messages for d in read_documents(folder / name)] for name in ("a.jsonl", "hub3.parquet")]
    assert read[0] == read[1] and len(read[0]) == 2


@pytest.mark.parametrize(
    "name, said",
    [
        ("lfs", "model.safetensors is a git-lfs pointer"),
        ("truncated", "model.safetensors is cut off at 41,864 of 42,864 bytes"),
        ("config-mismatch", "model.safetensors: .* has shape .*, the configuration wants"),
    ],
)
def test_lfs_pointer_weights(cases, train, name, said):
    import re

    folder = cases / "lfs-pointer-weights"
    code, lines, left = train("--teacher", folder / name, "--data", folder / "train.jsonl")
    assert code == 2 and re.search(said, lines[0]) and len(lines) == 2, lines
    assert not left, "nothing was done before"


@pytest.mark.parametrize("name, method", [("awq", "awq"), ("bnb4", "bitsandbytes")])
def test_quantised_teacher(cases, train, capsys, name, method):
    teacher = cases / "quantised-teacher" / name
    data = cases / "lfs-pointer-weights" / "train.jsonl"
    for code, lines in (
        train("--teacher", teacher, "--data", data)[:2],
        (main(["plan", "--teacher", str(teacher)]), capsys.readouterr().err.splitlines()),
    ):
        assert code == 2 and f"is already quantized ({method})" in lines[0] and "original" in lines[1], lines


@pytest.mark.parametrize(
    "name, said",
    [
        ("tn2.jsonl", "tn2.jsonl:2: 'text' is null"),
        ("null.parquet", "null.parquet: row 1: 'text' is null"),
        ("dict.parquet", "dict.parquet: row 3: 'text' is null"),
        ("u16.jsonl", "u16.jsonl:1: not UTF-8 .*, but UTF-16"),
    ],
)
def test_messages_of_refusals(cases, name, said):
    refused(cases / "messages-of-refusals" / name, said)


@pytest.mark.parametrize("name", ["trlpc.jsonl", "hg.jsonl"])
def test_what_was_refused_and_is_read(cases, name):
    ((text, runs),) = encoded(cases / "messages-of-refusals" / name)
    assert "U1" in text and runs == ["A1<|im_end|>\n"]
