"""The plan in numbers: a verdict first, totals, a time that says where it is from, what is left after a stage."""

import json
import re
from dataclasses import replace

import pytest
from tiny import save_configuration

from rwkvinside.cli.main import main
from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.errors import UserError
from rwkvinside.planning import forecast as module
from rwkvinside.planning import plan
from rwkvinside.planning.forecast import Rate, expected_rate, forecast, forecast_text
from rwkvinside.planning.memory import Memory

GPU = ["device=cuda", "precision=bf16"]


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny", intermediate_size=64)


def expected(teacher, *overrides, ranks=1, gpu=None):
    config = load_config(teacher=teacher, overrides=overrides)
    return forecast(resolve(config, None, ranks), config, gpu)


def verdict(found, rate=None):
    return forecast_text(found, rate).splitlines()[0]


def test_totals_are_those_of_the_stages(teacher):
    found = expected(teacher, "stages.align.tokens=600k", "stages.distill.tokens=1M", "student.attention_layers=[0]")
    assert [stage.name for stage in found.stages] == ["calibrate", "align", "distill"]
    assert found.tokens == sum(stage.tokens for stage in found.stages) == 1_600_000 + found.stages[0].tokens
    calibrate, *training = found.stages
    assert found.flops == sum(s.flops_per_token * s.tokens for s in training) + calibrate.fitting_flops
    assert calibrate.fitting_flops > 0 == calibrate.flops_per_token and not any(s.fitting_flops for s in training)
    assert found.disk == sum(stage.disk for stage in found.stages)
    assert found.peak == max(stage.peak for stage in found.stages)
    assert [layer["kind"] for layer in found.layers] == ["attention", "rwkv", "rwkv", "rwkv"]
    assert json.loads(json.dumps(found.to_dict()))["total"]["tokens"] == found.tokens


def test_a_choice_takes_a_forward_for_each_layer_and_a_calibration_its_time_in_fp32(teacher):
    found = expected(teacher, "student.attention_layers={choose: restore, keep: 1}")
    calibrate, align, choose, distill = found.stages
    assert choose.name == "choose" and align.flops_per_token < choose.flops_per_token
    slow = Rate(1e9, 1e6, "")
    assert calibrate.seconds(slow) == calibrate.fitting_flops / 1e6
    assert found.seconds(slow) == sum(stage.seconds(slow) for stage in found.stages)
    assert distill.seconds(slow) == distill.flops / 1e9


def test_what_is_left_after_a_stage(teacher):
    found = expected(teacher)
    align, distill = found.stages[1:]
    assert found.work_after("calibrate") == align.flops + distill.flops
    assert found.work_after("align") == distill.flops and found.work_after("distill") == 0
    assert found.work_after("calibrate", ["distill"]) == align.flops
    assert found.work_after("another") == 0


def test_the_verdict_comes_first(teacher, monkeypatch):
    for size, start in (
        (2**40, "fits: "),
        (2**20, "does not fit the memory of this machine: "),
        (None, "fits a GPU of"),
    ):
        monkeypatch.setattr(module, "device_memory", lambda device, gpu, size=size: size)
        found = expected(teacher)
        assert found.fits is (None if size is None else size > 2**30)
        assert forecast_text(found).startswith(start)


def test_the_verdict_is_of_the_gpu_that_is_named(teacher):
    found = expected(teacher, *GPU, ranks=8, gpu="H100")
    rate = expected_rate(found)
    assert found.fits and re.match(r"fits an H100 of 80 GB: [\d.]+ MiB on each of 8; about ", verdict(found, rate))
    large = replace(found, stages=(replace(found.stages[0], peak=200 * 2**30),))
    refused = "does not fit an H100 of 80 GB: 200 GiB on each of 8"
    assert not large.fits and verdict(large, rate) == f"{refused}; try --variant multi-card"
    assert verdict(replace(large, variants=("quantized",)), rate) == refused
    one = replace(large, ranks=1, gpu="B200", available=180 * 10**9)
    assert verdict(one) == "does not fit a B200 of 180 GB: 200 GiB; try --variant one-card"
    assert verdict(replace(one, gpu=None, available=None)) == "fits a GPU of 288 GB"
    assert expected(teacher, *GPU, gpu="A100-40GB").available == 40 * 10**9


def test_years_on_a_cpu_are_said_with_the_verdict(teacher):
    slow = Rate(1e4, 1e4, "")
    assert re.fullmatch(r"fits: [^,;]+, but takes about [\d.]+ years on this CPU", verdict(expected(teacher), slow))


def test_time_cost_and_warnings(teacher):
    found = expected(teacher, *GPU, "student.preset=hxa079", ranks=4)
    rate = Rate(found.flops / 7200, found.flops / 7200, "as it was said", found.ranks)
    lines = forecast_text(found, rate, price=2.5).splitlines()
    assert "; about 2 h; 8 GPU hours; cost 20.00" in lines[0]
    assert any(line.startswith("time: ") and "as it was said" in line for line in lines)
    assert lines[-1].startswith("warning: not the published hxa079")
    assert all(len(line) <= 80 for line in lines[1:] if not line.startswith(("warning", found.teacher, "time")))
    assert "about" not in forecast_text(found, None).splitlines()[0]


def test_where_a_rate_is_from(teacher):
    rate = expected_rate(expected(teacher, *GPU, ranks=2, gpu="h100"), 0.25)
    assert rate.flops == 2 * 0.25 * 989e12
    assert rate.origin == "25 % of the peak of h100 by its data sheet, 2 ranks"
    with pytest.raises(UserError, match="GPU abacus is not known"):
        expected(teacher, *GPU, gpu="abacus")
    here = expected_rate(expected(teacher))
    assert here.flops > 0 and here.origin == "20 % of the peak of this machine as measured now"


def test_a_host_is_shared_by_its_ranks():
    memory = Memory({"weights": 1}, saving=1, evaluating=1, offloaded=10, loaded=100, gathered=300)
    assert memory.host() == 310 and memory.host(8) == 80 + 800


def test_plan_prints_little_unless_asked(teacher, tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = ["plan", "--teacher", teacher, "--mfu", "0.5", "--json", str(file)]
    assert main(command) == 0
    short = capsys.readouterr().out
    assert short.startswith("fits: ") and "  group  " not in short
    values = json.loads(file.read_text())
    assert values["hours"] == pytest.approx(values["total"]["flops"] / values["rate"]["flops"] / 3600)
    assert main([*command, "-v"]) == 0
    assert "  group  " in capsys.readouterr().out
    assert main(["plan", "--teacher", teacher, "--mfu", "1.5"]) == 2
    assert "--mfu 1.5" in capsys.readouterr().err
    assert main(["plan", "--teacher", teacher, "--gpu", "H100", "device=cpu"]) == 2
    assert "the device is cpu" in capsys.readouterr().err
    assert main(["plan", "--teacher", teacher, "--gpu", "H100", "-v"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("fits an H100 of 80 GB: ") and "\ndevice    H100, " in shown
    assert "half the fp32 peak of H100 " in shown and "fits a GPU of" not in shown
    (line,) = plan._fit_lines(79 * 10**9, "cuda", "H100")  # with a context of 1 GiB
    assert line.strip() == "DOES NOT FIT: H100 has 74.5 GiB"
