"""`rwkvinside train` and its script: plans without weights, a line of cause and one of hint, printed by one rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_configuration

import train_distill
from rwkvinside import kernels
from rwkvinside.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]
PEAK = """
import resource, sys
from rwkvinside.cli.main import main
code = main(sys.argv[1:])
print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny")


def run(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.integration
def test_dry_run_of_a_14b_teacher_makes_no_weights():
    """Only libraries take memory, half a GiB: the weights would have 28."""
    result = run("-c", PEAK, "train", "--teacher", "Qwen3-14B", "--dry-run", "--local_rank=0")
    assert result.returncode == 0, result.stderr
    assert int(result.stderr.splitlines()[-1]) < 2**31
    assert "R" * 40 in result.stdout


def test_dry_run_shows_the_whole_plan(teacher, capsys, tmp_path):
    out = tmp_path / "run"
    argv = ["--teacher", teacher, "--out", str(out), "--dry-run", "student.attention_layers=[0,2]"]
    argv += ["stages.align.tokens=600k", "stages.distill.tokens=600k", "stages.distill.train=[mixer,'.*mlp.*']"]
    assert train_distill.main(argv) == 0
    plan = capsys.readouterr().out
    assert not out.exists()
    assert "layers    ARAR   (2 R = RWKV, 2 A = attention: 0, 2)" in plan
    assert "run       calibrate -> align -> distill" in plan
    assert plan.count("steps     586 of 4 rows") == 2
    # layer 3 of the two mixers has residual mixes, layer 1 has none: both are counted in one group
    align = plan[plan.index("\nalign:") : plan.index("\ndistill:")]
    states = {
        line.split()[0]: "trains" if line.endswith("trains") else "frozen"
        for line in align.splitlines()
        if line.endswith((" trains", " frozen"))
    }
    assert states == {
        "mixer.proj": "trains",
        "mixer.lora": "trains",
        "attention": "frozen",
        "mlp": "frozen",
        "norms": "frozen",
        "embed": "frozen",
        "head": "frozen",
    }
    distill = plan[plan.index("\ndistill:") :]
    assert "teacher   a second model" in distill
    assert "memory    about" in distill and "teacher" in distill.split("memory")[1]
    mlp = 4 * 3 * 32 * 48
    assert next(line for line in distill.splitlines() if line.startswith("  mlp")).split()[1:3] == [
        f"{mlp / 1e3:.4g}",
        "K",
    ]


def test_dry_run_for_a_gpu_that_is_not_here(teacher, capsys, tmp_path):
    argv = ["--teacher", teacher, "--out", str(tmp_path / "run"), "run=[align]"]
    assert train_distill.main([*argv, "--dry-run", "--gpu", "H100", "--ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "\ndevice    H100, bf16, 2 ranks, " in shown and "fits a GPU of" not in shown
    assert cli.main(["plan", *argv, "-v", "--gpu", "H100", "--ranks", "2"]) == 0
    assert "\nexports   hf, mlx\n" in shown and shown in capsys.readouterr().out
    assert train_distill.main([*argv, "--dry-run", "--gpu", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    for option in (["--gpu", "H100"], ["--ranks", "2"]):
        assert train_distill.main([*argv, *option]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option[0]} changes nothing without --dry-run\n")
    assert not (tmp_path / "run").exists()


def test_dry_run_of_one_stage_knows_what_came_before(teacher, capsys):
    argv = ["--teacher", teacher, "--dry-run", "--stage", "long", "stages.long.train=[mixer]"]
    assert train_distill.main(argv) == 0
    plan = capsys.readouterr().out
    assert "align: " not in plan and "long (distill): " in plan
    assert "a second model" in plan  # distill, in `run` before it, has trained what the teacher needs
    assert train_distill.main([*argv, "run=[align]"]) == 0
    assert "the student's own frozen weights" in capsys.readouterr().out
    longer = ["--teacher", teacher, "--dry-run", "stages.long.data.seq_len=9999"]
    assert train_distill.main(longer) == 0  # does not run
    assert train_distill.main([*longer, "--stage", "long"]) == 2
    assert "stages.long.data.seq_len = 9999: is longer than the" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, cause",
    [
        (
            ["student.attention_layers=[4]"],
            "student.attention_layers = [4]: has layer 4, but there are layers 0 to 3 (-1 is the last)",
        ),
        (["stages.align.train=[mixr]"], "train pattern 'mixr' matches no parameter"),
        (["stages.align.train=['mixer(']"], "is not a regular expression"),
        (["stages.distill.teacher=same"], "teacher: same cannot be used"),
        (["student.preset=x070", "student.linear_attention=true"], "linear attention has none"),
    ],
)
def test_bad_input_ends_in_one_line_of_cause_and_one_of_cure(teacher, capsys, overrides, cause):
    assert train_distill.main(["--teacher", teacher, "--dry-run", *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and cause in lines[0]
    assert len(lines) <= 2  # some causes name their hint


def test_a_backend_that_cannot_run_is_refused_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "why_unavailable", lambda backend: "PyTorch finds no GPU")
    given = ["--teacher", "Qwen3-0.6B", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "device=cpu"]
    assert train_distill.main([*given, "student.backend=triton"]) == 2
    assert "student.backend triton cannot run: PyTorch finds no GPU" in capsys.readouterr().err


def test_only_rank_0_prints():
    result = run("train_distill.py", "--teacher", "Qwen3-14C", env=os.environ | {"RANK": "1"})
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "size, overrides, under_deepspeed",
    [
        (2, [], True),
        (1, [], False),
        (1, ["deepspeed.zero_stage=3"], False),
        (1, ["deepspeed.offload_optimizer=true"], True),
        (1, ["deepspeed.bf16_weights=true", "precision=bf16"], True),
    ],
)
def test_a_launchers_only_process_trains_without_deepspeed_unless_that_does_more(
    teacher, tmp_path, monkeypatch, size, overrides, under_deepspeed
):
    seen = []
    for name, value in (TORCHRUN | {"WORLD_SIZE": str(size)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rwkvinside.conversion.run.train", lambda config, **given: seen.append(given["launched"]))
    monkeypatch.setattr("rwkvinside.report.facts.run_facts", lambda directory: None)
    monkeypatch.setattr("rwkvinside.report.screen.end_screen", lambda facts: "")
    command = ["train", "--teacher", str(teacher), "--data", "x", "--out", str(tmp_path / "run")]
    assert cli.main([*command, *overrides]) == 0
    assert seen == [under_deepspeed]


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', which no launcher sets"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE='0', which no launcher sets"),
        (TORCHRUN | {"RANK": "0x1"}, "RANK='0x1', which no launcher sets"),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "1"}, "RANK=1 of WORLD_SIZE=1"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT='', which no launcher sets"),
        ({"RANK": "0", "WORLD_SIZE": "8"}, "no LOCAL_RANK and no MASTER_ADDR and no MASTER_PORT"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused(teacher, capsys, monkeypatch, environment, said):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert train_distill.main(["--teacher", teacher, "--dry-run"]) == 2
    lines = capsys.readouterr().err.splitlines()
    rank_1 = environment.get("RANK") == "1"
    assert not lines if rank_1 else len(lines) == 2 and said in lines[0], lines


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no file without an end")
@pytest.mark.parametrize("flag", ["--config", "--deepspeed", "--hostfile"])
def test_a_file_without_an_end_is_refused(teacher, capsys, flag):
    assert train_distill.main(["--teacher", teacher, "--dry-run", flag, "/dev/zero"]) == 2
    assert "/dev/zero cannot be read" in capsys.readouterr().err


def test_the_script_is_the_verb(teacher, capsys):
    argv = ["--teacher", teacher, "--dry-run", "run=[align]", "--local_rank=0"]
    assert train_distill.main(argv) == 0
    plan = capsys.readouterr().out
    assert cli.main(["train", *argv]) == 0
    assert capsys.readouterr().out == plan
    assert cli.main(["plan", "-v", *argv[:2], argv[3]]) == 0
    assert plan in capsys.readouterr().out  # after the verdict


@pytest.mark.integration
def test_the_module_runs_under_deepspeeds_launcher(teacher):
    """Which puts --local_rank before the verb."""
    launcher = ("-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29519", "--quiet")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
    }
    argv = ("--module", "rwkvinside", "train", "--teacher", teacher, "--dry-run", "run=[align]")
    result = run(*launcher, *argv, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 ranks, DeepSpeed") == 2
