"""What verification notices: every kind of damage, at the first thing that can see it, before any carried code runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_texts

from rwkvinside.errors import UserError, VerificationError
from rwkvinside.export import manifest
from rwkvinside.export import verify as module
from rwkvinside.export.huggingface import export_hf
from rwkvinside.export.manifest import digests
from rwkvinside.export.verify import verify
from rwkvinside.support.sealed import sealed_text, unsealed
from rwkvinside.support.settings import Section
from rwkvinside.teacher.settings import TeacherConfig
from rwkvinside.teacher.tokenizer_files import check_tokenizer_code, tokenizer_files

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TOOL_TEMPLATE = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + TEMPLATE


@pytest.fixture(scope="module")
def chat_teacher(tmp_path_factory, make_teacher):
    """With a tokenizer of bytes and two chat templates."""
    path = make_teacher(tmp_path_factory.mktemp("chat") / "teacher", vocab_size=259)
    byte_tokenizer("<s>", "<|user|>", "<|assistant|>").save_pretrained(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, chat_teacher, make_run):
    """A run of it with validation data."""
    path = make_run(tmp_path_factory.mktemp("chat") / "run", chat_teacher)
    save_texts(path / "val.jsonl", 6)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["data"] = {
        "train": ["/secret/place.jsonl"],
        "val": [str(path / "val.jsonl")],
        "cache_dir": str(path / "tokens"),
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def exported(chat_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "student"
    return out, export_hf(chat_run, out)


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported[0], tmp_path / "out")


def reseal(folder):
    """Make the export say that its files are as they were written, as an author of a fault would."""
    conversion = unsealed((folder / "conversion.json").read_text()) | {"files": digests(folder)}
    (folder / "conversion.json").write_text(sealed_text(conversion))


def test_what_was_compared(exported):
    result = exported[1]["verification"]
    assert result["passed"] and result["validation_rows"] == 6 and result["validation_tokens"] > 200
    assert result["validation_difference"] <= 1e-5 and 0 < result["generation_difference"] < 1e-4
    assert result["token_ids"] == 259 and result["renderings"] == 2 * 4 * 2 * 2
    assert result["files"] > 15 and result["tensors"] > 40


def test_every_file_of_the_tokenizer_travels(exported, chat_teacher):
    out, _ = exported
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == TOOL_TEMPLATE
    for file in tokenizer_files(chat_teacher):
        assert (out / file.relative_to(chat_teacher)).read_bytes() == file.read_bytes()


def zero_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][100:200] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def swap_entries(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


FAULTS = {
    "rows of the embedding": (zero_rows, r"1 tensors are not those of the run, first model.embed_tokens.weight \(3,2"),
    "a tensor": (drop_a_tensor, r"first model.norm.weight \(missing\)"),
    "entries of the tokenizer": (swap_entries, "tokenizer.json is not what this version writes"),
    "generation": (
        lambda folder: (folder / "generation_config.json").write_text("{}"),
        r"generation_config.json is not what this version writes: \w+ is None, not",
    ),
    "a configuration": (
        edit("config.json", '"attention_rope": true', '"attention_rope": false'),
        "config.json is not what this version writes: attention_rope is False, not True",
    ),
    "code from elsewhere": (
        edit("config.json", "hybrid_qwen3.HybridQwen3ForCausalLM", "some/repo--x.Y"),
        "config.json is not what this version writes: auto_map",
    ),
    "code": (edit("wkv7.py", '"""', 'raise SystemExit("this ran")\n"""'), "wkv7.py is not what this version writes"),
    "a second template": (
        lambda folder: (folder / "additional_chat_templates" / "tool_use.jinja").unlink(),
        "tool_use.jinja is missing",
    ),
    "another file": (
        lambda folder: (folder / "pytorch_model.bin").touch(),
        "pytorch_model.bin is not part of an export of this run",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_files(copied, chat_run, fault, monkeypatch):
    change, said = FAULTS[fault]
    change(copied)
    monkeypatch.setattr(module, "_reload", None)  # nothing of the directory is run
    with pytest.raises(VerificationError, match="is damaged|which was not exported"):
        verify(copied, against=chat_run)
    reseal(copied)
    with pytest.raises(VerificationError, match=said) as caught:
        verify(copied, against=chat_run)
    assert "\n" not in caught.value.cause


def test_what_a_hub_adds_is_no_damage(copied, chat_run, monkeypatch):
    (copied / ".gitattributes").touch()
    (copied / ".cache").mkdir()
    (copied / ".cache" / "CACHEDIR.TAG").touch()
    monkeypatch.setattr(module, "compare", lambda *_: {"passed": True})
    assert verify(copied, against=chat_run)["passed"]


COMPUTING = {
    "imports the package": (
        edit("hybrid_base.py", "from .first_layer", "from rwkvinside.modeling.first_layer"),
        "an exported model imported rwkvinside",
    ),
    "loses its state": (
        edit("recurrent_cache.py", "self.state = state", "self.state = None"),
        "through the cache they differ by .*in a padded batch that generates they differ by",
    ),
    "a weight": (zero_rows, "; logits differ by|: logits differ by"),
    "a token": (swap_entries, "its tokenizer differs from the teacher's in vocabulary"),
    "a template": (
        edit("additional_chat_templates/tool_use.jinja", "t.function.name", "t.type"),
        r"in chat templates \(tool_use, conversation 1, with tools, prompt False: 'function;",
    ),
}


@pytest.mark.parametrize("fault", COMPUTING)
def test_faults_of_what_is_computed(copied, chat_run, fault, monkeypatch):
    """Behind the comparison of files, which sees all of this first."""
    change, said = COMPUTING[fault]
    change(copied)
    monkeypatch.setattr(manifest, "check_files", lambda *_: None)
    for check in ("_compare_files", "_compare_tensors"):
        monkeypatch.setattr(module, check, lambda *_: 0)
    with pytest.raises(VerificationError, match=said):
        verify(copied, against=chat_run)


def test_validation_documents_see_what_two_rows_of_ids_do_not(chat_run, exported, monkeypatch):
    logits = module.student_logits
    monkeypatch.setattr(
        module,
        "student_logits",
        lambda model, batch: logits(model, batch) + (1e-2 if batch.input_ids.shape[0] == 1 else 0),
    )
    with pytest.raises(VerificationError, match="on validation documents logits differ by 0.01"):
        verify(exported[0], against=chat_run)


def test_validation_ends_with_its_time(chat_run, exported, monkeypatch):
    monkeypatch.setattr(module, "VALIDATION_SECONDS", 0.0)
    assert verify(exported[0], against=chat_run)["validation_rows"] == 1


def test_the_process_that_reloads_ends_with_the_one_that_verifies():
    """Which may be killed while a large model is loaded."""
    code = f"""
import runpy, threading, time
reload = runpy.run_path({str(Path(module.__file__).with_name("reload.py"))!r})
threading.Thread(target=reload["end_with_parent"], daemon=True).start()
print("ready", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n" and process.poll() is None
        process.stdin.close()
        assert process.wait(30) == 1


def test_data_that_is_gone_is_said(run, tmp_path, make_run, teacher):
    result = export_hf(run, tmp_path / "out")["verification"]
    assert result["validation_rows"] == 0 and result["validation"] == "the teacher has no tokenizer"


CODE = """from transformers import PreTrainedTokenizerFast
from .names import X


class Own(PreTrainedTokenizerFast):
    own = X
"""


@pytest.fixture
def own_teacher(chat_teacher, tmp_path):
    """Its tokenizer comes with code."""
    path = shutil.copytree(chat_teacher, tmp_path / "teacher")
    (path / "own.py").write_text(CODE)
    (path / "names.py").write_text("X = 1\n")
    (path / "unrelated.py").write_text("X = 1\n")
    set_auto_map(path, {"AutoTokenizer": [None, "own.Own"]})
    return path


def set_auto_map(path, auto_map):
    content = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(content | {"auto_map": auto_map, "tokenizer_class": "Own"}))


def test_code_of_a_tokenizer_travels(own_teacher, make_run, tmp_path):
    run = make_run(tmp_path / "run", own_teacher)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["teacher"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    check_tokenizer_code(TeacherConfig(path=str(own_teacher), trust_remote_code=True))
    result = export_hf(run, tmp_path / "out")["verification"]
    assert (tmp_path / "out" / "own.py").read_text() == CODE and (tmp_path / "out" / "names.py").exists()
    assert not (tmp_path / "out" / "unrelated.py").exists() and result["token_ids"] == 259


@pytest.mark.parametrize(
    "change, trusted, said",
    [
        (None, False, r"comes with code of its own \(own.Own\), which was not allowed to run"),
        ({"AutoTokenizer": "some/repo--own.Own"}, True, "from another repository: some/repo--own.Own"),
        (["gone.Own", None], True, "gone.py is missing"),
        ("wkv7", True, "wkv7.py is the name of a file of every export"),
    ],
)
def test_code_that_cannot_travel_is_refused(own_teacher, change, trusted, said):
    if change == "wkv7":
        (own_teacher / "own.py").rename(own_teacher / "wkv7.py")
        change = {"AutoTokenizer": [None, "wkv7.Own"]}
    if change is not None:
        set_auto_map(own_teacher, change)
    with pytest.raises(UserError, match=said) as caught:
        check_tokenizer_code(TeacherConfig(path=str(own_teacher), trust_remote_code=trusted))
    assert caught.value.hint and isinstance(TeacherConfig(path="x"), Section)
