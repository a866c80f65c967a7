"""The table of configurations, what it compiles to on GPUs that are not there, and how it is tuned on one that is."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkvinside.kernels.gpu import autotune, table
from rwkvinside.kernels.gpu import compile as survey
from rwkvinside.kernels.gpu.compile import (
    Usage,
    differences,
    is_current,
    main,
    problems,
    read_baseline,
    write_baseline,
)

BASELINE = Path(__file__).with_name("compile_baseline.json")


def run(*arguments, **environment):
    """The command in a separate process, without the interpreter unless asked for."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rwkvinside.kernels.gpu.compile", *map(str, arguments)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


@pytest.mark.integration
def test_every_shipped_configuration_compiles_as_the_baseline_says():
    """All of them where sources or Triton have changed; else the same comes out again, and a sample is enough."""
    sample = ("--only", "sm_90/64/balanced") if is_current(BASELINE) else ()
    result = run("--check", BASELINE, *sample)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_baseline_is_current_until_the_sources_change(tmp_path, monkeypatch):
    path = tmp_path / "baseline.json"
    write_baseline(path, {"a": Usage(128, 0, 1024, 40, 0)})
    assert is_current(path)
    monkeypatch.setattr(survey, "source_hash", lambda: "another")
    assert not is_current(path)


@pytest.mark.integration
def test_nothing_is_compiled_under_the_interpreter():
    result = run("--only", "sm_90/64/step", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_baseline_that_is_not_one_is_refused_before_compiling(tmp_path, capsys):
    for name, content in (("missing", None), ("text", "spills"), ("other", '{"triton": "3"}')):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        assert main(["--check", str(path)]) == 2
        assert "cannot check the kernels" in capsys.readouterr().err


@pytest.mark.parametrize(
    "usage, complaint",
    [
        (Usage(255, 512, 163 * 1024, 10, 0), None),
        (Usage(255, 1281, 0, 10, 0), "spills 1281 bytes"),
        (Usage(32, 8, 0, 10, 0), "fell back to 32 registers"),
        (Usage(32, 0, 0, 0, 0), None),
        (Usage(100, 0, 163 * 1024 + 1, 10, 0), "shared memory"),
    ],
)
def test_limits(usage, complaint):
    lines = problems({"sm_80/64/balanced/gradient": usage})
    assert lines == [] if complaint is None else complaint in lines[0]


def test_shared_memory_is_judged_by_the_architecture():
    usage = Usage(100, 0, 200 * 1024, 0, 0)
    assert len(problems({"sm_80/64/fast/gradient": usage, "sm_90/64/fast/gradient": usage})) == 1


def test_a_baseline_allows_another_register_allocation_and_nothing_more(tmp_path):
    known = {"a": Usage(128, 0, 1024, 40, 0), "gone": Usage(40, 0, 0, 0, 0)}
    write_baseline(tmp_path / "baseline.json", known)
    (baseline,) = read_baseline(tmp_path / "baseline.json").values()
    assert baseline == known
    assert differences({"a": Usage(136, 100, 1024, 40, 0), "gone": known["gone"]}, baseline) == []
    lines = differences({"a": Usage(137, 0, 1024, 40, 0), "new": known["gone"]}, baseline)
    assert [line.split(":")[0] for line in lines] == ["a", "gone", "new"]
    assert differences({**known, "a": Usage(128, 0, 1024, 44, 0)}, baseline)
    assert differences({**known, "a": Usage(128, 0, 4096, 40, 0)}, baseline)
    assert differences({**known, "a": Usage(128, 0, 1024, 40, 3)}, baseline)


def test_a_baseline_keeps_what_another_triton_gave_for_the_same_sources(tmp_path, monkeypatch):
    path = tmp_path / "baseline.json"
    write_baseline(path, {"a": Usage(128, 0, 1024, 40, 0)})
    mine = survey.triton.__version__
    monkeypatch.setattr(survey.triton, "__version__", "0.1")
    write_baseline(path, {"a": Usage(64, 0, 1024, 40, 0)})
    assert {version: usages["a"].registers for version, usages in read_baseline(path).items()} == {mine: 128, "0.1": 64}
    monkeypatch.setattr(survey, "source_hash", lambda: "another")
    write_baseline(path, {"a": Usage(32, 0, 1024, 40, 0)})
    assert set(read_baseline(path)) == {"0.1"}


@pytest.mark.integration
def test_scans_load_the_next_chunks_while_they_compute():
    usages = read_baseline(BASELINE)
    assert len(usages) > 1, "more than one Triton"
    for kernels in usages.values():
        scans = {name: usage for name, usage in kernels.items() if "/scan_" in name and "/fp32/" not in name}
        assert scans and all(usage.ahead > 0 for usage in scans.values())


def test_the_table_has_an_entry_for_everything_it_may_be_asked():
    for size in table.HEAD_SIZES:
        for capability in (None, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)):
            assert table.lookup_step(size, capability).block_v <= size
            for precision in table.PRECISIONS:
                config = table.lookup(size, capability, precision)
                assert max(config.block_v, config.grad_block_v, config.grad_block_k) <= size


def test_the_nearest_older_architecture_answers_for_a_newer_one():
    assert table.lookup(128, (12, 1), "balanced") is table.lookup(128, (9, 0), "balanced")
    assert table.lookup(128, (8, 9), "balanced") is table.lookup(128, (8, 0), "balanced")
    assert table.lookup(128, None, "fp32") is table.lookup(128, (8, 0), "fp32")
    assert table.lookup_step(128, (7, 5)) is table.lookup_step(128, (8, 0))


def test_lookup_refuses_what_the_table_does_not_know():
    with pytest.raises(ValueError, match="head size 48"):
        table.lookup(48, (9, 0), "fp32")
    with pytest.raises(ValueError, match="head size 512"):
        table.lookup_step(512, (9, 0))
    with pytest.raises(ValueError, match="'tf32'"):
        table.lookup(64, (9, 0), "tf32")


def test_the_shipped_table_is_what_write_would_write(tmp_path):
    table.write(tmp_path / "copy.json", table.read(table.SHIPPED))
    assert (tmp_path / "copy.json").read_text() == table.SHIPPED.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["copy.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"sm_90/64/tf32": {}}', '{"sm_90/64/fast": {"length": 32}}', '{"sm_90/48/fast": {}}']
)
def test_a_table_that_is_not_one_is_named(tmp_path, text):
    path = tmp_path / "configurations.json"
    path.write_text(text)
    with pytest.raises(RuntimeError, match="configurations.json"):
        table.read(path)


def test_tuning_finds_the_fastest_of_what_fits():
    start = dataclasses.replace(table.lookup(64, (9, 0), "fast"), length=16)
    tunings = table.Tuning(4, 1), table.Tuning(4, 3), table.Tuning(8, 1)
    best = table.Config(32, 64, tunings[0], 64, tunings[1], start.narrow, tunings[2], 64, 64)
    parts = {
        "prep": ["prep", "prep_block_k"],
        "scan": ["block_v", "scan"],
        "grad": ["grad", "grad_block_v", "grad_block_k"],
    }

    def measure(config, part):
        """1 for each field that is not the best one; what would be best of all does not fit."""
        if part == "prep" and config.prep.num_warps == 2:
            return math.inf
        wrong = sum(getattr(config, field) != getattr(best, field) for field in parts[part])
        return 1.0 + wrong + (config.length != best.length)

    assert autotune.tune(start, 64, measure) == (3.0, best)


@pytest.mark.parametrize("size", table.HEAD_SIZES)
def test_tuning_tries_only_what_the_head_size_allows(size):
    config = table.lookup(size, (9, 0), "balanced")
    for part in ("prep", "scan", "grad"):
        choices = autotune.variants(config, part, size)
        assert len(set(choices)) == len(choices) > 1
        assert all(max(c.block_v, c.grad_block_v, c.grad_block_k) <= max(size, 64) for c in choices)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--head-sizes", "48"], "head size 48"),
        (["--head-sizes", "many"], "many"),
        (["--precisions", "tf32"], "tf32"),
        (["--shape", "8,4096"], "B,T,H"),
        (["--output", "/nowhere/table.json"], "/nowhere"),
    ],
)
def test_tuning_refuses_in_one_line(capsys, arguments, message):
    assert autotune.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_tuning_needs_a_gpu(tmp_path, capsys):
    assert autotune.main(["--output", str(tmp_path / "table.json")]) == 2
    assert capsys.readouterr().err == "cannot autotune: no CUDA device\n"
    assert not any(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.integration
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_writes_what_lookup_reads(tmp_path):
    path = tmp_path / "table.json"
    assert autotune.main(["--head-sizes", "16", "--shape", "1,256,2", "--output", str(path)]) == 0
    assert sorted(key[1:] for key in table.read(path)) == [(16, "balanced"), (16, "step")]
