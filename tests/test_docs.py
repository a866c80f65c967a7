"""README and docs: every command and Python block runs, YAML is valid, links and paths exist, lines are short.

Commands are taken from indented and fenced blocks and run in this process, block by block, in a folder that has what
they name: a tiny teacher as `DIR` and `TEACHER`, texts, a small configuration as `run.yaml`, a finished run as `RUN`
and `OTHER`, its export as `DIR`. They are made smaller by arguments at their end (`SMALLER`). What trains a preset's
teacher, whose weights are on the hub, or starts other machines is run with --dry-run; what takes minutes is only parsed
(`ONLY_PARSED`).
"""

import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml
from tiny import byte_tokenizer, save_qwen3, save_texts

import convert_checkpoint
import train_distill
import train_rwkv
from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.stages.registry import STAGES, find_stage_class, objective_class

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python", "rwkvinside", "deepspeed", "torchrun", "make", "pip", "pre-commit")
COMMAND = re.compile(rf"\s*([A-Z_]+=\S+ )*({'|'.join(PROGRAMS)})\s+[\w.-]")
WIDTH = 100

TRAIN = [
    *(f"stages.{name}.tokens=512" for name in ("calibrate", "align", "distill")),
    *(f"stages.{name}.data.seq_len=32" for name in ("calibrate", "align", "distill")),
    *(f"stages.{name}.batch.tokens=128" for name in ("calibrate", "align", "distill")),
]
SCRIPTS = {
    "train_distill.py": train_distill.main,
    "train_rwkv.py": train_rwkv.main,
    "convert_checkpoint.py": convert_checkpoint.main,
}
PRETRAIN = [
    "model={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}",
    "stages.pretrain.tokens=512",
    "--max_seq_length",
    "64",
]
# how a command begins -> arguments that make it small enough for a test
SMALLER = {
    "train_distill.py": TRAIN,
    "rwkvinside train": TRAIN,
    "rwkvinside bench training": ["--rows", "1", "--seq-len", "16", "--repeats", "1"],
    "rwkvinside bench generation": ["--contexts", "8", "--new-tokens", "2"],
    "rwkvinside bench context": [*("--random", "2,1,16", "--contexts", "8", "16"), "--chunk-size", "8"],
    "rwkvinside bench wkv7": ["--shapes", "1,16,1,8", "--repeats", "1", "--candidates", "reference"],
    "rwkvinside vectors embed": ["--limit", "200"],
    "rwkvinside vectors train": [
        *("model.d_model=32", "model.layers=1", "steps=2", "batch=4", "evaluate_every=0"),
    ],
    "rwkvinside vectors inverter": [
        *("d_model=32", "heads=2", "layers=1", "steps=2", "vocab=400", "longest=8", "evaluate_every=0"),
    ],
    "rwkvinside vectors bench": ["--d-model", "64", "--layers", "1", "--repeats", "2"],
    "rwkvinside generate": ["--max-tokens", "4"],
    "rwkvinside data generate": ["--tokens", "3k", "--max-tokens", "16"],
    "rwkvinside lm evaluate": ["--chunk-size", "32"],
    "rwkvinside lm state": ["--chunk-size", "32", "--tokens", "16"],
    "rwkvinside data logits": ["stages.distill.tokens=512", "device=cpu"],
}
# the same for what a command is asked for, each with its own options
SMALLER_ASKED = {
    "rwkvinside eval": {
        "--recall": ["--samples", "1", "--depths", "2"],
        **dict.fromkeys(("--write", "--begin"), ["--write-tokens", "4"]),
    },
    "rwkvinside layers": {"--distill": ["--distill", "1k"]},
}
# how a command begins -> why its arguments are parsed and no more
ONLY_PARSED = {
    "convert_checkpoint.py export RUN --to rwkv-infer": "needs a wider teacher; tests/export has one",
    "convert_checkpoint.py import CHECKPOINT": "needs another program's file; tests/importers makes them",
    "train_distill.py -c RUN/config.yaml --out RUN --stage distill": "trains an import on; tests/importers does",
    "convert_checkpoint.py export RUN --to gguf": "needs a teacher with heads of 64; tests/export runs it",
    "rwkvinside verify student.gguf": "the same",
    "rwkvinside bench gpu": "needs a GPU; tests/bench runs it dry",
    "rwkvinside bench head": "starts processes that measure for minutes; tests/bench runs it",
    "rwkvinside eval DIR --teacher TEACHER --tasks": "downloads tasks; tests/evaluate runs some that are files",
    "rwkvinside eval RUN --ask": "the teacher here has no chat template; tests/demo asks one that has",
    "rwkvinside chat": "talks with whoever types; tests/cli/test_chat.py runs it",
    "rwkvinside data generate --teacher SmolLM2-135M": "writes 650,000 tokens on a GPU; docs/training.md writes fewer",
    "rwkvinside layers --teacher SmolLM2-135M": "takes half an hour; docs/layers.md has the same with what is here",
    "rwkvinside demo": "trains for minutes; tests/demo runs it",
    "rwkvinside vectors demo": "trains for minutes; tests/vectors runs it",
    "rwkvinside vectors grid": "trains for minutes; tests/vectors runs it",
}
if importlib.util.find_spec("mlx") is None:
    ONLY_PARSED["convert_checkpoint.py export RUN --to mlx"] = "MLX is not installed, or not for this machine"
PRESET = r"(Qwen|Llama|SmolLM)[\w.-]+"


def blocks(page):
    """Yield (line number, language, text) of every indented and fenced block; indented ones have no language."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        start = at
        if fence := re.match(r"\s*```(\w*)", lines[at]):
            at += 1
            while not lines[at].lstrip().startswith("```"):
                at += 1
            yield start + 1, fence[1], textwrap.dedent("\n".join(lines[start + 1 : at]))
        elif lines[at].startswith("    "):
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            yield start + 1, "", "\n".join(lines[start:at])
        at += 1


def commands(text):
    """Yield the commands of a block as lists of words: comments gone, continued lines joined, no variables in front."""
    for line in text.replace("\\\n", " ").splitlines():
        if COMMAND.match(line):
            words = shlex.split(line, comments=True)
            while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            yield words


def shell_blocks():
    for page in PAGES:
        for line, language, text in blocks(page):
            if language in ("", "bash", "sh") and (listed := list(commands(text))):
                yield pytest.param(listed, id=f"{page.name}:{line}")


def blocks_of(language):
    for page in PAGES:
        for line, name, text in blocks(page):
            if name == language:
                yield pytest.param(text, id=f"{page.name}:{line}")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with all that commands name: teacher, texts, a configuration, a host file, a run and its export."""
    folder = tmp_path_factory.mktemp("docs")
    tokenizer = byte_tokenizer("<|end|>", eos_token="<|end|>")
    save_qwen3(folder / "TEACHER", tokenizer, eos_token_id=tokenizer.eos_token_id)
    for name in ("train", "val", "texts"):
        save_texts(folder / f"{name}.jsonl")
    data = {"train": [str(folder / "train.jsonl")], "val": [str(folder / "val.jsonl")]}
    small = {"tokens": 512, "data": {"seq_len": 32}, "batch": {"tokens": 128}}
    stages = dict.fromkeys(("calibrate", "align", "distill"), small)
    config = {"teacher": {"path": str(folder / "TEACHER")}, "data": data, "stages": stages, "out": "from-yaml"}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "hosts").write_text("worker-1 slots=8\n")
    files = ["--data", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl")]
    run, export = str(folder / "RUN"), str(folder / "DIR")
    adapters = ["adapters=[{kind: lora, groups: [mlp], rank: 2}]", "stages.distill.train=[mixer,adapters]"]
    assert train_distill.main(["--teacher", str(folder / "TEACHER"), *files, "--out", run, *TRAIN, *adapters]) == 0
    assert convert_checkpoint.main(["export", run, "--to", "hf", "--out", export]) == 0
    shutil.copytree(run, folder / "OTHER")
    (folder / "prompts.txt").write_text("Once upon a time\nIn the beginning\n")
    return folder


@pytest.fixture
def workshop(material, tmp_path, monkeypatch):
    """A copy of the material to work in."""
    shutil.copytree(material, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def option(words, name):
    return words[words.index(name) + 1] if name in words else None


def placed(words):
    """The words with the teacher where `--teacher DIR` or a stand-in for one is meant."""
    stand_ins = ("DIR", "NAME", "stories260k")
    return [
        "TEACHER" if before == "--teacher" and word in stand_ins else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def exit_code(words):
    """Call what the words name in this process, as the shell would start it."""
    program, *rest = words
    return SCRIPTS.get(program, rwkvinside)(rest)


def parse_only(words):
    """Hand the words to the real parser with an option nobody knows: it must be the one thing that is refused."""
    assert exit_code([*words, "--no-such-option"]) == 2


def check_make(words):
    targets = [word for word in words[1:] if "=" not in word]
    subprocess.run(["make", "-n", "-C", str(ROOT), *targets], check=True, capture_output=True)


def check_pip(words):
    """What `pip install` names: this directory, with extras that exist."""
    extras = re.findall(r"\[(.+?)\]", " ".join(words))
    known = importlib.metadata.metadata("rwkvinside").get_all("Provides-Extra")
    assert {name for each in extras for name in each.split(",")} <= set(known)


def check_pre_commit(words):
    """It would change this checkout's git hooks: its configuration must name hooks that exist."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert words == ["pre-commit", "install"] and all(each["hooks"] for each in hooks)


CHECKS = {"make": check_make, "pip": check_pip, "pre-commit": check_pre_commit}  # the others run


def check(words, capsys, only_parsed=False):
    if words[0] in CHECKS:
        CHECKS[words[0]](words)
        return
    words = placed(words)
    words = next((words[i:] for i, word in enumerate(words) if word in SCRIPTS), words)
    begins = [key for key in (*ONLY_PARSED, *SMALLER) if shlex.join(words).startswith(key)]
    if only_parsed or begins and begins[0] in ONLY_PARSED:
        parse_only(words)
        assert "error: unknown flag --no-such-option\n" in capsys.readouterr().err
        return
    trains = words[0] == "train_distill.py" or words[:2] == ["rwkvinside", "train"]
    preset = re.fullmatch(PRESET, option(words, "--teacher") or "")
    if words[0] == "train_rwkv.py":
        large = "3b" in option(words, "--config")
        words = [*words, *(["--dry_run"] if large else PRETRAIN)]
        if not large:
            shutil.rmtree("outputs", ignore_errors=True)
            words[words.index("DIR")] = "outputs"  # there is an export of this name
    elif trains and (preset or "--hostfile" in words):
        words = [*words, "--dry-run"]
    elif "--resume" not in words:  # a run that goes on has its settings
        if words[:2] == ["rwkvinside", "data"] and preset:  # its tokenizer is on the hub
            words[words.index("--teacher") + 1] = "TEACHER"
        words = [*words, *(word for key in begins for word in SMALLER[key])]
        asked = SMALLER_ASKED.get(" ".join(words[:2]), {})
        words += [word for flag, more in asked.items() if flag in words for word in more]
        if "export" in words or trains:  # what the commands around this one have left
            shutil.rmtree(option(words, "--out") or "from-yaml", ignore_errors=True)
    assert exit_code(words) == 0, shlex.join(words)


@pytest.mark.parametrize("block", list(shell_blocks()))
def test_commands_run(block, workshop, capsys, request):
    collected = request.node.callspec.id.startswith("howto.md")  # its commands are those of other pages, where they run
    for words in block:
        check(words, capsys, only_parsed=collected)


@pytest.mark.parametrize("text", list(blocks_of("python")))
def test_python_runs(text, workshop):
    exec(compile(text, "docs", "exec"), {"__name__": "docs"})


@pytest.mark.parametrize("text", list(blocks_of("yaml")))
def test_yaml_is_a_configuration(text, workshop, capsys):
    Path("page.yaml").write_text(text)
    assert rwkvinside(["config", "show", "-c", "page.yaml", "--teacher", "Qwen3-8B"]) == 0


def inline_commands():
    """Verbs and modules that the text names between backticks."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    verbs = set(re.findall(r"`rwkvinside((?: [a-z]\w+){1,2})", text))
    return sorted(verbs), sorted(set(re.findall(r"`python -m ([\w.]+)", text)))


def test_verbs_in_the_text_exist(capsys):
    verbs, modules = inline_commands()
    assert verbs and modules
    for verb in verbs:
        with pytest.raises(SystemExit) as stopped:
            rwkvinside([*verb.split(), "--help"])
        assert stopped.value.code == 0, verb
    for module in modules:
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = page if not target else page.parent / target
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_can_be_read(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    long = [
        line
        for line in text.splitlines()
        if len(line) > WIDTH and not line.startswith(("|", "    ")) and not re.search(r"`[^`]{60,}`|https?://", line)
    ]
    assert not long


def test_files_that_the_text_names_exist():
    """Paths between backticks that look like files of this repository."""
    named = re.compile(r"(?<!no[ \n])`((?:rwkvinside|kernels|configs|tests|docs|\.github)/[\w./-]+)`")
    for page in PAGES:
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_default_lengths_of_stages_are_those_of_the_table():
    page = (ROOT / "docs" / "training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+), (\d+) \| (\w+), (\d+) \|$", page, re.MULTILINE)
    assert {name for name, *_ in rows} == {*STAGES, "choose"}
    for name, *written in rows:
        stage = find_stage_class(name, None) or objective_class(name)
        sizes = (stage.small, stage.large)
        assert written == [str(part) for size in sizes for part in (size.tokens, size.seq_len)], name


def test_files_that_contributing_names_exist():
    """Paths are relative to the repository or to `rwkvinside/`; `<name>` is any name, `*` any file."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"`([^`\s]+)`", text) if "/" in path or path.endswith((".py", ".md"))}
    assert {"families/<model_type>.py", "stages/registry.py", "export/registry.py", "docs/architecture.md"} <= paths
    for path in paths:
        pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
        assert any(any(base.glob(pattern)) for base in (ROOT, ROOT / "rwkvinside")), path


def test_contributing_names_the_registries_that_decide():
    """One more family, objective, format or preset is one more entry in a table that is where the page says."""
    from rwkvinside.export.registry import FORMATS
    from rwkvinside.families.registry import FAMILIES
    from rwkvinside.modeling.registry import HYBRIDS
    from rwkvinside.stages.registry import OBJECTIVES

    package = ROOT / "rwkvinside"
    for family in FAMILIES:
        assert (package / f"families/{family}.py").is_file() and f"hybrid_{family}" in HYBRIDS
        assert (package / f"modeling/hybrid_{family}.py").is_file()
    for objective in OBJECTIVES:
        assert (package / f"stages/{objective}.py").is_file()
    for target, _ in FORMATS.values():
        assert (package / f"export/{target.partition(':')[0].replace('.', '/')}.py").is_file()
