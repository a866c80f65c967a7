"""The session on a GPU, dry: on a CPU, from a bare working tree, without the packages that a GPU machine lacks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvinside.bench.gpu_session.results import read, summary
from rwkvinside.bench.gpu_session.session import STAGES, StageEntry, chosen, run_session, share
from rwkvinside.bench.gpu_session.staging import MAPPED
from rwkvinside.bench.gpu_session.tables import tables
from rwkvinside.cli.main import main
from rwkvinside.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("facts", "training", "generation")
KERNELS = ("correct", "kernels", "peers")
# imported by Python itself before anything else: these packages are not there, whoever asks
WITHOUT = """
from importlib.machinery import PathFinder

ABSENT = {"deepspeed", "bitsandbytes", "datasets"}
find = PathFinder.find_spec


def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find(name, path, target)


PathFinder.find_spec = classmethod(find_spec)
"""


def lines(folder):
    """Lines of the stages, behind the one about the session."""
    about, *found = read(folder / "results.jsonl")
    assert about["stage"] == "session" and about["date"] and about["commit"]
    return found


def ends(folder):
    return {line["stage"]: line for line in lines(folder) if "ended" in line}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Write a stage's module, which its process can import; return its entry."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(name, body, seconds=30.0, minimum=1.0):
        text = "import os, signal, time\n\n\ndef run(stage):\n" + "".join(f"    {line}\n" for line in body.splitlines())
        (folder / f"{name}.py").write_text(text)
        return StageEntry(name, seconds, minimum, name)

    return write


FORTH_AND_BACK = ("forward", "backward")
GOOD = 'stage.attempt("one", lambda: {"number": 1})'


def dry_session(tmp_path, stages):
    """Run stages from a bare tree: nothing is installed, and three packages are missing; return their lines.

    No stage fails, no measurement has an error.
    """
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT)
    packages = Path(torch.__file__).parents[1]  # what is only unpacked there: .pth files are not read
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{packages}"}
    python = getattr(sys, "_base_executable", sys.executable)
    probe = "import importlib.util as u; print(u.find_spec('rwkvinside.kernels'), u.find_spec('datasets'))"
    bare = subprocess.run([python, "-c", probe], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert bare.stdout == "None None\n"  # otherwise this test would show nothing
    out = tmp_path / "out"
    command = [python, "-m", "rwkvinside.bench.gpu_session", "--dry", "--out", str(out), "--stages", ",".join(stages)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = (out / "session.log").read_text() if out.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    found = lines(out)
    assert not [line for line in found if "error" in line or "skipped" in line]
    assert {name: end["ended"] for name, end in ends(out).items()} == dict.fromkeys(stages, "ok")
    assert list(ends(out)) == list(stages)
    assert len(list(out.iterdir())) <= 8
    table = (out / "summary.txt").read_text()
    assert table == summary(found) and table in done.stdout
    assert all(f"\n{name} " in table for name in stages)
    return found


def test_models_run_dry_from_a_bare_tree(tmp_path):
    found = dry_session(tmp_path, MODELS)
    speeds = [line for line in found if "mfu" in line]
    assert len(speeds) == 11 and all(line["finite"] and line["tokens_per_s"] > 0 for line in speeds)
    assert all(line["predicted_gib"] > 0 for line in speeds if not line["what"].startswith("fine-tuning"))
    graphs = [line for line in found if line["what"].startswith("graphs: ")]
    assert len(graphs) == 4 and all(line["ok"] and line["worst"] == 0 for line in graphs)
    (losses,) = (line for line in found if line["what"].startswith("distillation loss"))
    assert all(value < 1e-5 for name, value in losses.items() if "differ" in name)
    (error,) = (line for line in found if line["what"].startswith("error of a layer"))
    assert error["error_differs"] < 1e-5 and error["gradient_differs"] < 1e-2
    profiles = [line for line in found if "kernels_ms" in line]
    assert len(profiles) == 4 and all(0 < len(line["top"]) <= 25 for line in profiles)
    (whole,) = (line for line in found if line["what"] == "conversion end to end")
    assert whole["cpu fp32 losses"] == 0 < whole["cpu bf16 losses"] < 0.05  # the same run again, and a rounded one
    assert whole["cpu fp32 calibration"] == 0 < whole["cpu bf16 calibration"] < 0.05
    caches = {line["what"]: line["cache_bytes"] for line in found if "cache_bytes" in line}
    assert caches["student: 1 x 512"] == caches["student: 1 x 131072"]
    assert len([line for line in found if "graphed_ms" in line]) == 9
    assert caches["teacher: 1 x 512"] < caches["teacher: 1 x 131072"]


@pytest.mark.integration
def test_kernels_run_dry_in_the_interpreter(tmp_path):
    found = dry_session(tmp_path, KERNELS)
    checks = [line for line in found if "distances" in line]
    assert len(checks) == 14 and all(line["ok"] for line in checks)
    (timed,) = (line for line in found if "launches" in line)
    assert set(timed["launches"]) == {
        *("forward prepare", "forward scan_forward"),
        *("backward prepare", "backward scan_backward", "backward gradient"),
    }
    (mixer,) = (line for line in found if "mixer_launches" in line)
    assert set(mixer["mixer_launches"]) == {f"{part}_{way}" for part in ("inputs", "output") for way in FORTH_AND_BACK}
    assert {name: len(rows) for name, rows in mixer["tried"].items()} == {"inputs_forward": 2, "inputs_backward": 2}
    assert not mixer["failed"]
    (windows,) = (line for line in found if "window_launches" in line)
    parts = "window_forward", "window_backward_queries", "add_far_parts", "window_backward_keys"
    assert tuple(windows["window_launches"]) == parts and windows["pytorch_ms"] > 0
    tried = [line for line in found if line["what"].startswith("configurations")]
    assert [len(line["fastest"]) for line in tried] == [2, 2] and not any(line["failed"] for line in tried)
    assert len([line for line in found if line["what"].startswith("decode")]) == 1
    peers = [line for line in found if line["stage"] == "peers" and "forward_backward_ms" in line]
    assert len(peers) == 2
    text = tables(found)
    assert all(f"| {name} | 16 | 1 |" in text for name in ("balanced", "fp32"))
    assert "| 1,64,2,16 |" in text and "| prep | 1,32,1,32 | 2 (0 failed) |" in text


def test_what_installation_maps_is_where_staging_looks():
    import rwkvinside.kernels
    import rwkvinside.recipes

    for name, module in (("kernels", rwkvinside.kernels), ("recipes", rwkvinside.recipes)):
        assert Path(module.__file__).resolve().parent == MAPPED[name].resolve()


@pytest.mark.parametrize(
    "body, ended, why",
    [
        ("raise RuntimeError('broken')", "failed", "exit code 1"),
        ("os._exit(3)", "failed", "exit code 3"),
        ('stage.attempt("only", lambda: 1 / 0)', "failed", "no measurement succeeded"),
        ('stage.attempt("long", lambda: time.sleep(60))', "killed", "in: long"),
    ],
)
def test_what_crashes_or_hangs_leaves_the_next_stage_running(body, ended, why, modules, tmp_path):
    entries = [modules("bad", body, seconds=3), modules("good", GOOD)]
    assert run_session(tmp_path / "out", entries, 33.5, dry=True) == 1
    found = ends(tmp_path / "out")
    assert found["bad"]["ended"] == ended and why in found["bad"]["why"]
    assert found["good"]["ended"] == "ok"
    assert [line["number"] for line in lines(tmp_path / "out") if "number" in line] == [1]


def test_a_measurement_that_takes_its_process_down_is_left_out(modules, tmp_path):
    """What was measured before it is not measured again, what comes behind it is."""
    body = "\n".join(
        [
            'stage.attempt("first", lambda: {"number": 1})',
            'stage.attempt("second", lambda: os.kill(os.getpid(), signal.SIGSEGV))',
            'stage.attempt("third", lambda: 1 / 0)',
            'stage.attempt("fourth", lambda: {"number": 4})',
        ]
    )
    assert run_session(tmp_path / "out", [modules("half", body)], 30, dry=True) == 0
    *found, end = lines(tmp_path / "out")
    assert [line["what"] for line in found] == ["first", "second", "third", "fourth"]
    assert found[1]["error"] == "the process ended with SIGSEGV"
    assert found[2]["error"] == "ZeroDivisionError: division by zero"
    assert found[3]["number"] == 4 and end["ended"] == "ok"
    assert " 2       2" in (tmp_path / "out" / "summary.txt").read_text()  # measured, errors


def test_a_broken_context_is_left_behind(modules, tmp_path):
    """After an error that stays, a new process goes on."""
    body = """
from types import SimpleNamespace
import sys

def synchronize():
    if cuda.broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def fail():
    cuda.broken = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize, empty_cache=lambda: None, broken=False)
sys.modules["torch"] = SimpleNamespace(cuda=cuda)
stage.attempt("first", fail)
stage.attempt("second", lambda: {"number": 2, "process": os.getpid()})
stage.attempt("third", lambda: {"number": 3, "process": os.getpid()})
"""
    assert run_session(tmp_path / "out", [modules("illegal", body)], 30, dry=True) == 0
    first, second, third, end = lines(tmp_path / "out")
    assert first["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert (second["number"], third["number"]) == (2, 3) and second["process"] == third["process"]
    assert end["ended"] == "ok"


def test_stages_without_enough_time_are_skipped(modules, tmp_path):
    entries = [modules("large", GOOD, seconds=60, minimum=50), modules("small", GOOD, minimum=5)]
    assert run_session(tmp_path / "out", entries, 20, dry=True) == 1
    found = ends(tmp_path / "out")
    assert found["large"]["ended"] == "skipped" and "it needs 50" in found["large"]["why"]
    assert found["small"]["ended"] == "ok"
    assert "it needs 50" in (tmp_path / "out" / "summary.txt").read_text()


def test_numbers_that_are_not_finite_are_words(modules, tmp_path):
    body = 'stage.record("odd", nan=float("nan"), parts=[float("inf")])'
    assert run_session(tmp_path / "out", [modules("odd", body)], 30, dry=True) == 0
    (line, _) = lines(tmp_path / "out")
    assert (line["nan"], line["parts"]) == ("nan", ["inf"])


def shares(budget, used):
    """Seconds that each stage of a session gets, where each uses a part of them; None: it does not start."""
    found = {}
    for place, entry in enumerate(STAGES):
        found[entry.name] = share(entry, STAGES[place + 1 :], budget) if budget >= entry.minimum else None
        budget -= used * (found[entry.name] or 0)
    return found


def test_the_session_fits_its_budget():
    assert sum(entry.seconds for entry in STAGES) <= 520
    assert all(0 < entry.minimum <= entry.seconds for entry in STAGES)
    full = shares(520, 1)
    assert all(full[entry.name] >= entry.seconds for entry in STAGES) and sum(full.values()) == pytest.approx(520)


def test_a_short_session_has_what_is_least_known():
    found = shares(150, 1)
    assert found["training"] >= 50 and found["generation"] >= 25 and found["correct"] >= 15
    assert found["peers"] is None
    assert shares(520, 0.5)["peers"] > 2 * shares(520, 1)["peers"]  # what others leave


def test_stages_run_in_the_order_that_is_asked_for():
    assert [entry.name for entry in chosen("peers,facts")] == ["peers", "facts"]
    assert [entry.name for entry in chosen(None)] == [entry.name for entry in STAGES]
    with pytest.raises(UserError, match="twice"):
        chosen("facts,facts")


def test_unknown_stages_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="there is no stage 'fact'"):
        chosen("facts,fact")
    assert main(["bench", "gpu", "--out", str(tmp_path), "--stages", "nonsense"]) == 2
    assert "there is no stage 'nonsense'" in capsys.readouterr().err
