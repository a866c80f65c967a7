"""The kernel benchmark measures what it says, names what it cannot run, and refuses what makes no sense before it
starts."""

import argparse
import json
import sys
import time
import types

import pytest
import torch

from rwkvinside.errors import UserError
from rwkvinside.kernels.bench.arguments import add_arguments
from rwkvinside.kernels.bench.candidates import CANDIDATES, choose
from rwkvinside.kernels.bench.command import Stage, gpu_suite, main, parse_shapes
from rwkvinside.kernels.bench.measure import Bench, extra_memory_cpu, race
from rwkvinside.kernels.bench.problem import Shape, ideal_bytes, make_inputs, relative_errors
from rwkvinside.modeling.wkv7 import wkv7_reference
from rwkvinside.report.figures import kernel_figure


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args([str(argument) for argument in argv]))


def candidate(name: str):
    return next(c for c in CANDIDATES if c.name == name)


def by_name(shape: dict) -> dict[str, dict]:
    return {result["candidate"]: result for result in shape["results"]}


@pytest.mark.integration
def test_sequences(tmp_path, capsys):
    file, png = tmp_path / "bench.json", tmp_path / "bench.png"
    names = "chunked,reference,loop,attention,triton:fast"
    shapes = "1,40,2,16;1,80,2,16"
    options = ("--device", "cpu", "--repeats", 2, "--json", file, "--png", png)
    assert run("--shapes", shapes, "--candidates", names, *options) == 0
    report = json.loads(file.read_text())
    assert report["copy_bytes_per_s"] > 1e8
    assert report["machine"]["versions"]["torch"] == torch.__version__
    (stage,) = report["stages"]
    assert [[shape[size] for size in "BTHN"] for shape in stage["shapes"]] == [[1, 40, 2, 16], [1, 80, 2, 16]]
    for shape in stage["shapes"]:
        results = by_name(shape)
        assert results["triton:fast"] == {"candidate": "triton:fast", "not_run": "runs on cuda only"}
        assert "error" not in results["attention"] and results["attention"]["forward"]["of_bound"] is None
        for name in ("chunked", "reference", "loop"):
            for which in ("forward", "forward_backward"):
                found = results[name][which]
                assert found["ms"] >= found["fastest_ms"] > 0 and found["repeats"] == found["asked"] == 2
                bound = ideal_bytes(Shape(1, shape["T"], 2, 16), torch.float32, which) / report["copy_bytes_per_s"]
                assert found["of_bound"] == pytest.approx(1e3 * bound / found["ms"])
            error = results[name]["error"]
            assert error["tokens"] == shape["T"] and 0 < max(error["y"], error["state"], error["gradient"]) < 2e-6
    printed = capsys.readouterr().out
    assert "triton:fast: not run: runs on cuda only" in printed and "errors: relative L2" in printed
    assert printed.count("chunked ") == 2
    assert png.read_bytes().startswith(b"\x89PNG")


def test_one_token(tmp_path):
    file = tmp_path / "bench.json"
    options = ("--device", "cpu", "--repeats", 1, "--json", file)
    assert run("--decode", "--shapes", "3,1,2,16", "--candidates", "reference,loop", *options) == 0
    results = by_name(json.loads(file.read_text())["stages"][0]["shapes"][0])
    for name in ("reference", "loop"):
        assert results[name]["forward"]["ms"] > 0 and "forward_backward" not in results[name]
        assert results[name]["error"].keys() == {"tokens", "y", "state"} and results[name]["error"]["state"] < 1e-6


@pytest.mark.parametrize(
    "argv, cause",
    [
        (["--shapes", "1,2,3"], "'1,2,3' is not B,T,H,N"),
        (["--shapes", "1,2,3,x"], "'1,2,3,x' is not B,T,H,N"),
        (["--shapes", "1,0,3,8"], "size below 1"),
        (["--shapes", "1,1,3,8"], "--decode is for T = 1"),
        (["--shapes", "1,2,3,8", "--decode"], "--decode is for T = 1"),
        (["--candidates", "chunked,cuda"], "'cuda' is not known"),
        (["--candidates", "chunked", "--decode"], "none that decodes"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--threads", "-1"], "--threads is -1"),
        (["--json", "/nowhere/at/all.json"], "there is no directory"),
        (["--suite", "gpu", "--device", "cpu"], "--suite gpu"),
    ],
)
def test_refusals(argv, cause):
    argv = argv if "--device" in argv else ["--device", "cpu", *argv]
    with pytest.raises(UserError, match=cause) as error:
        run(*argv)
    assert error.value.exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_gpu_is_said_at_once():
    for argv in (["--device", "cuda"], ["--suite", "gpu"]):
        with pytest.raises(UserError, match="no CUDA device"):
            run(*argv)


def test_figure_needs_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs matplotlib"):
        run("--device", "cpu", "--png", tmp_path / "x.png")


@pytest.mark.integration
def test_everyone_takes_turns_and_what_does_not_fit_is_left_out():
    order = []

    def call(name: str, seconds: float):
        def run():
            order.append(name)
            time.sleep(seconds)

        return run

    def fail():
        raise RuntimeError("broken\nin two lines")

    runners = {"a": call("a", 0.02), "b": call("b", 0.02), "slow": call("slow", 1.1), "bad": fail}
    timings = race(runners, "cpu", 3, 1.0, time.monotonic() + 60)
    assert "".join(order).replace("slow", "s") == "aabbsababab"
    assert [timings[name].repeats for name in ("a", "b", "slow")] == [3, 3, 0]
    assert timings["slow"].median >= 1.1 and timings["a"].median >= 0.02
    assert timings["bad"].failure == "broken"
    assert race(runners, "cpu", 1, 1, time.monotonic() - 1)["a"].failure == "no time left"


def test_inputs_are_those_of_the_mixer():
    r, w, k, v, a, b = make_inputs(Shape(2, 9, 3, 16), torch.bfloat16, "cpu")
    assert {x.dtype for x in (r, k, v, a, b)} == {torch.bfloat16} and w.dtype == torch.float32
    assert -0.60654 < w.min() < w.max() < 0
    assert torch.allclose(a.float().norm(dim=-1), torch.ones(2, 9, 3), atol=1e-2)
    rate = -b.float() / a.float()
    assert rate.min() > 0 and rate.max() < 1.02


def test_ideal_bytes_are_those_of_the_documented_bound():
    tokens = Shape(1, 1000, 1, 64)  # 896 + 1664 bytes in bf16, and 128 + 256 for a decay in fp32
    assert ideal_bytes(tokens, torch.bfloat16, "forward") == 1000 * (896 + 128)
    assert ideal_bytes(tokens, torch.bfloat16, "forward_backward") == 1000 * (896 + 1664 + 128 + 256)


def test_a_transposed_state_is_seen():
    shape = Shape(1, 20, 2, 16)
    good = candidate("loop").ops("cpu", 20)[""]

    def wrong(r, w, k, v, a, b, state):
        return good(r, w, k, v, a, b, state.mT)

    error = relative_errors(candidate("loop"), wrong, shape, torch.float32, "cpu")
    assert error["y"] > 0.1 and error["gradient"] > 0.1


def test_fla_is_called_by_its_own_conventions(monkeypatch):
    """A stand-in with fla's signature: (key, value) states, a scale, settings of which older versions lack some."""

    def chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, safe_gate, chunk_size, lower_bound):
        assert scale == 1.0 and output_final_state and safe_gate and chunk_size in (16, 64)
        assert w.detach().min() >= lower_bound
        y, final = wkv7_reference(r, w, k, v, a, b, initial_state.mT)
        return y, final.mT

    fla = types.SimpleNamespace(chunk_rwkv7=chunk_rwkv7)
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", fla)
    ops = candidate("fla:chunk").load()
    assert list(ops) == ["chunk_size=16", "chunk_size=64"]
    for op in ops.values():
        error = relative_errors(candidate("fla:chunk"), op, Shape(1, 20, 2, 16), torch.float32, "cpu")
        assert max(error["y"], error["state"], error["gradient"]) < 1e-6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_memory_is_that_of_the_call():
    shape = Shape(1, 128, 4, 64)  # the backward keeps each of its states
    grown = extra_memory_cpu("reference", "", shape, torch.float32, "forward_backward")
    states = 4 * 128 * 4 * 64 * 64
    assert states < grown < 20 * states


def test_candidates_by_family():
    assert [c.name for c in choose(["triton"])] == ["triton:fp32", "triton:high", "triton:balanced", "triton:fast"]
    assert "fla:recurrent" not in {c.name for c in choose(None)}
    assert {c.name for c in choose(["fla"], decode=True)} == {"fla:recurrent"}
    with pytest.raises(RuntimeError, match="up to T = 2048"):
        candidate("loop").ops("cpu", 4096)


def test_gpu_suite_asks_for_every_mode_shape_and_batch():
    stages = gpu_suite()
    assert {c.name for s in stages for c in s.candidates} >= {"triton:fp32", "triton:fast", "fla:chunk", "attention"}
    sizes = {shape for stage in stages for shape in stage.shapes}
    assert {Shape(1, 4096, 32, 64), Shape(8, 4096, 16, 256), Shape(512, 1, 32, 64)} <= sizes
    for stage in stages:
        assert all(c.decodes for c in stage.candidates) or all(shape.T > 1 for shape in stage.shapes)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    file = tmp_path / "bench.json"
    run("--device", "cuda", "--shapes", "1,256,2,64", "--candidates", "triton,chunked", "--repeats", 1, "--json", file)
    for result in json.loads(file.read_text())["stages"][0]["shapes"][0]["results"]:
        assert result["error"]["gradient"] < 0.02 and result["forward_backward"]["extra_bytes"] > 0
    stage = Stage("small", parse_shapes("2,1,2,64"), "bf16", choose(["triton:balanced", "reference"], decode=True))
    found = Bench("cuda", 1, 1, 1e12, time.monotonic() + 300).problem(stage.candidates, stage.shapes[0], torch.bfloat16)
    assert all(result["forward"]["ms"] > 0 for result in found["results"])


def measured(sizes: str, times: dict[str, list[float]]) -> dict:
    shapes = []
    for i, shape in enumerate(parse_shapes(sizes)):
        results = [{"candidate": name, "forward": {"ms": ms[i]}} for name, ms in times.items() if ms[i]]
        shapes.append(shape._asdict() | {"results": results})
    return {"title": "sequences", "dtype": "fp32", "shapes": shapes}


def test_figure_draws_time_against_what_differs():
    stage = measured("1,512,8,64;1,2048,8,64", {"chunked": [1, 4], "loop": [50, None]})
    (ax,) = kernel_figure([stage], "a machine").axes
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["chunked"].get_xdata().tolist() == [512, 2048] and lines["chunked"].get_ydata().tolist() == [1, 4]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", "tokens T")
    assert "B = 1, H = 8, N = 64" in ax.get_title("left") and ax.get_ylabel() == "milliseconds"
    (ax,) = kernel_figure([measured("1,512,8,64;8,512,4,64", {"chunked": [1, 4]})], "a machine").axes
    assert ax.lines[0].get_linestyle() == "None"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["1, 8", "8, 4"] and ax.get_xlabel() == "B, H"
    assert kernel_figure([measured("1,512,8,64", {})], "a machine") is None
