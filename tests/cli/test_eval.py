"""`rwkvinside eval` on the published teacher and on a run: the numbers, the files, and what it refuses."""

import io
import json
import shutil

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from rwkvinside.cli.eval import _show
from rwkvinside.cli.main import main
from rwkvinside.errors import UserError
from rwkvinside.evaluate.load import load_run
from rwkvinside.evaluate.quality import Evaluation, Scores
from rwkvinside.hybrid.model import HybridModel
from rwkvinside.hybrid.settings import StudentConfig
from rwkvinside.training.checkpoint import Checkpointer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def run_eval(*arguments) -> int:
    return main(["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def teacher(shared):
    return shared / "teachers" / "stories260k"


@pytest.fixture(scope="module")
def val(shared):
    return shared / "data" / "tinystories-260k-samples" / "val.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher):
    """A run whose student is the teacher but for the last layer, which is a mixer as it starts."""
    path = tmp_path_factory.mktemp("run")
    spec = {"attention_layers": [0, 1, 2, 3]}
    model = HybridModel.from_teacher(
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), StudentConfig(attention_layers=(0, 1, 2, 3))
    )
    for stage, scale in (("align", 0.0), ("distill", 1.0)):
        tensors = {name: scale * tensor for name, tensor in model.student_state_dict().items()}
        Checkpointer(path / "stages" / stage, {}).save(1, tensors, None, {"stage": stage})
    stages = {name: {"objective": name} for name in ("align", "distill")}
    config = {"teacher": {"path": str(teacher)}, "student": spec, "run": list(stages), "stages": stages}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "conversion.json").write_text(json.dumps({"finished_stages": ["align", "distill"]}))
    return path


@pytest.mark.integration
def test_teacher_against_itself_reaches_its_published_cross_entropy(teacher, val, tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = (teacher, "--teacher", teacher, "--data", val, "--json", out, "--max-documents", 40)
    assert run_eval(*arguments) == 0
    result = json.loads(out.read_text())
    assert result["documents"] == 40
    # The note next to the data says about 1.31 over all of it; 40 documents have a standard error of about 0.01.
    assert result["ce"] == pytest.approx(1.31, abs=0.04)
    assert result["kl"] == 0 and result["agreement"] == 1
    assert sum(bucket["tokens"] for bucket in result["by_position"]) == result["tokens"]
    said = capsys.readouterr()
    assert "trust_remote_code" in said.err
    assert f"{result['tokens']:,}" in said.out and "100.00%" in said.out


def test_a_run_is_evaluated_as_its_export_would_be(run, val, tmp_path, capsys):
    assert run_eval(run, "--data", val, "--max-documents", 5, "--max-length", 64, "--png", tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "5 documents" in capsys.readouterr().out


def test_data_is_read_as_the_run_reads_it_unless_told_otherwise(run, tmp_path, capsys):
    trained = shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {"text_column": "story", "max_line_bytes": 100}
    (trained / "config.yaml").write_text(yaml.safe_dump(config))
    lines = tmp_path / "val.jsonl"
    lines.write_text("".join(json.dumps({"story": "Once upon a time" * n}) + "\n" for n in (1, 20)))
    short = ("--data", lines, "--max-length", 16)
    assert run_eval(trained, *short) == 2
    assert "val.jsonl:2: the line has more than 100 bytes" in capsys.readouterr().err
    assert run_eval(trained, *short, "--max-line-bytes", "1k") == 0
    assert "2 documents" in capsys.readouterr().out
    assert run_eval(trained, *short, "--max-line-bytes", "1k", "--text-column", "text") == 2
    assert "among ['story']" in capsys.readouterr().err and run_eval(trained, *short, "--today", "tomorrow") == 2
    assert "'tomorrow' is not a day such as 2024-07-26" in capsys.readouterr().err


def test_both_models_go_on_from_a_beginning(run, val, tmp_path, capsys):
    out = tmp_path / "result.json"
    few = ("--data", val, "--max-documents", 1, "--max-length", 16, "--json", out)
    assert run_eval(run, *few, "--begin", "Once upon a time, there was", "--write-tokens", 8) == 0
    samples, said = json.loads(out.read_text())["samples"], capsys.readouterr().out
    assert list(samples) == ["teacher", "student"] and "Once upon a time, there was" in said
    assert samples["teacher"]["continuation"].startswith("a little girl")
    assert all(list(each) == ["continuation"] and each["continuation"] in said for each in samples.values())
    out.unlink()
    assert run_eval(run, *few, "--ask", "Who was there?") == 2
    assert "has no chat template" in capsys.readouterr().err and not out.exists()
    assert run_eval(run, *few) == 0 and "samples" not in json.loads(out.read_text())


def test_a_windowed_student_is_shown_with_its_control(run, teacher, val, tmp_path, capsys):
    windowed = tmp_path / "run"
    shutil.copytree(run, windowed)
    config = yaml.safe_load((run / "config.yaml").read_text())
    window = {"window": 8, "sinks": 1, "window_mix": "sum"}
    config["student"] |= window
    (windowed / "config.yaml").write_text(yaml.safe_dump(config))
    lm = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model = HybridModel.from_teacher(lm, StudentConfig(attention_layers=(0, 1, 2, 3), **window))
    for mixer in model.mixers.values():  # the control itself
        mixer.mix_recurrence.data.zero_()
        mixer.mix_window.data.fill_(1)
    Checkpointer(windowed / "stages" / "distill", {}).save(2, model.student_state_dict(), None, {"stage": "distill"})
    out = tmp_path / "result.json"
    assert run_eval(windowed, "--data", val, "--max-documents", 5, "--max-length", 64, "--json", out) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    assert "control: the teacher, untrained" in said
    assert result["control"]["kl"] > 1e-3 and result["control"]["tokens"] == result["tokens"]
    for name in ("kl", "ce", "ce_teacher", "agreement"):
        assert result["control"][name] == pytest.approx(result[name], rel=1e-4)

    assert run_eval(run, "--data", val, "--max-documents", 2, "--max-length", 16, "--json", out) == 0
    assert "control" not in json.loads(out.read_text()) and "control" not in capsys.readouterr().out


def test_recall_and_what_models_write_are_shown_and_saved(run, val, tmp_path, capsys):
    out, png = tmp_path / "result.json", tmp_path / "p.png"
    arguments = ("--recall", "--lengths", "320,400", "--depths", 2, "--samples", 1, "--write", 2, "--write-tokens", 6)
    limits = ("--max-documents", 4, "--max-length", 64)
    assert run_eval(run, "--data", val, *arguments, *limits, "--json", out, "--png", png) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    scores = result["recall"]["scores"]
    assert set(scores) == {"student", "teacher", "no recurrence"}
    assert {(s["task"], s["length"]) for s in scores["teacher"]} == {
        (task, length) for task in ("passkey", "needle", "pairs") for length in (320, 400)
    }
    assert all(s["answers"] >= 1 and 0 <= s["exact"] <= 1 for found in scores.values() for s in found)
    assert 0 <= result["writing"]["same_tokens"] <= 6 and result["writing"]["prompts"] == 2
    for text in ("pass key", "needle", "pairs", "2 greedy texts", "no recurrence: the student"):
        assert text in said
    assert png.read_bytes().startswith(b"\x89PNG")


def test_an_export_can_be_measured_without_a_teacher(teacher, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert run_eval(teacher, "--recall", "--lengths", "320", "--samples", 1, "--depths", 1, "--json", out) == 0
    result = json.loads(out.read_text())
    assert result["teacher"] is None and list(result["recall"]["scores"]) == ["student"]


def test_an_earlier_stage_of_a_run_can_be_chosen(run):
    def output(model) -> torch.Tensor:
        return model.model.layers[4].self_attn.output.weight

    assert not output(load_run(run, "cpu", "align")).any()
    assert output(load_run(run, "cpu")).any()
    with pytest.raises(UserError, match="stage long"):
        load_run(run, "cpu", "long")


def test_the_table_shows_large_numbers_in_80_columns():
    scores = Scores(tokens=1_002_370, kl=10.06521, ce=12.0448, ce_teacher=12.0448, agreement=0.8759)
    evaluation = Evaluation(300, 49_152, scores, ((2048, 4095, scores),), control=scores)
    console = Console(width=80, file=io.StringIO())
    _show(evaluation, console)
    shown = console.file.getvalue()
    assert "…" not in shown and "2048-4095" in shown and "1.702e+05" in shown and "10.07" in shown


def test_refusals_come_before_any_work(teacher, val, tmp_path, capsys):
    there = ("--teacher", teacher, "--data", val)
    for arguments, cause in (
        ((tmp_path, *there), "neither an exported model nor a run"),
        ((teacher, "--data", val), "no teacher is given"),
        ((teacher, "--teacher", "Qwen3-14", "--data", val), "a hub id; did you mean Qwen3-14B?"),
        ((teacher, *there, "--json", tmp_path / "nowhere" / "x.json"), "of the output x.json does not exist"),
        ((teacher, *there, "--png", tmp_path), f"output {tmp_path} cannot be written"),
        ((teacher, "--teacher", teacher), "nothing to measure"),
        ((teacher, "--teacher", teacher, "--recall", "--write", 2), "from the beginnings of documents"),
        ((teacher, "--recall", "--lengths", "64"), "64 tokens have no room for the passkey task"),
        ((teacher, "--recall", "--lengths", "x"), "not a positive number"),
        ((teacher, *there, "--limit", 5), "--limit changes nothing without --tasks"),
        ((teacher, *there, "--write-tokens", 5), "--write-tokens changes nothing without --write or --ask or --begin"),
        ((teacher, *there, "--max-documents", 0), "--max-documents: '0' is not a whole number of at least 1"),
    ):
        assert run_eval(*arguments) == 2
        assert cause in capsys.readouterr().err


def test_incomplete_weights_are_refused(teacher, val, tmp_path, capsys):
    from safetensors.torch import load_file

    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    broken.chmod(0o755)
    weights = load_file(teacher / "model.safetensors")
    weights.pop("model.norm.weight")
    (broken / "model.safetensors").unlink()
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert run_eval(broken, "--teacher", teacher, "--data", val) == 2
    assert "model.norm.weight" in capsys.readouterr().err
