"""Kernels are compiled ahead, in threads, exactly as they are launched; what is tried and timed fits its time."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rwkvinside.bench.gpu_session import compiling, configurations
from rwkvinside.bench.gpu_session.compiling import Compiler
from rwkvinside.bench.gpu_session.configurations import AT_ONCE, CHOICES, Fastest, of_part, rounds
from rwkvinside.bench.gpu_session.wkv_cases import Case
from rwkvinside.kernels.gpu.table import lookup

H100 = (9, 0)
BATCHES = [batch for some in rounds(dry=False) for batch in some]

# In a process of its own: Triton is told of a GPU that is not there, and keeps that.
COMPILE = """
import json, os, sys
import torch, triton
from types import SimpleNamespace
from rwkvinside.bench.gpu_session.compiling import Compiler
from rwkvinside.bench.gpu_session.wkv_cases import Case
from rwkvinside.kernels.gpu.compile import _AbsentGPU

triton.runtime.driver.set_active(_AbsentGPU(90))
os.sched_getaffinity = lambda _: range(4)
records = []
stage = SimpleNamespace(left=lambda: 600.0, record=lambda what, **more: records.append({"what": what, **more}))
case = Case(1, 64, 2, 16)
launches = case.plan(case.placeholders(), (9, 0), **case.ends()).launches
compiler = Compiler(stage)
before = compiler.seconds(launches)
compiler.ahead("all", launches)
again = []
triton.knobs.runtime.jit_post_compile_hook = lambda **more: again.append(more["fn"].name)
real = case.inputs("cpu"), *(torch.zeros(x.shape, dtype=x.dtype) for x in case.ends().values())
for launch in case.plan(real[0], (9, 0), *real[1:]).launches:
    launch.compile()
compiler.ahead("all", launches)
print(json.dumps({"records": records, "again": again, "before": before, "after": compiler.seconds(launches)}))
"""


@pytest.mark.integration
def test_what_was_compiled_in_threads_is_not_compiled_again(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (record,) = found["records"]  # the second time there is nothing to do
    assert record["what"] == "compiled: all" and record["kernels"] == 5 and record["threads"] == 4
    assert record["errors"] == [] and record["left_out"] == 0
    assert found["again"] == [] and found["before"] > found["after"] == 0


def stage_with(seconds, records):
    return SimpleNamespace(left=lambda: seconds, record=lambda what, **more: records.append({"what": what, **more}))


@pytest.mark.parametrize("seconds, fitting", [(4.0, 0), (9.0, 2), (60.0, 5)])
def test_only_what_fits_is_compiled(seconds, fitting, monkeypatch):
    """`gradient` takes twelve seconds, and the last of a plan is what is left out."""
    case, compiled, records = Case(1, 64, 2, 16), [], []
    launches = case.plan(case.placeholders(), H100, **case.ends()).launches
    monkeypatch.setattr(type(launches[0]), "compile", lambda self: compiled.append(self.kernel.__name__))
    monkeypatch.setattr(compiling.triton.knobs.runtime, "interpret", False)
    compiler = Compiler(stage_with(seconds, records))
    compiler._threads = 2
    compiler.ahead("all", launches)
    assert len(compiled) == fitting and records[0]["left_out"] == 5 - fitting
    assert ("gradient" in compiled) == (fitting == 5)
    assert (compiler.seconds(launches) == 0) == (fitting == 5)


def test_batches_have_every_choice_once_and_the_best_of_every_part_first():
    found = BATCHES
    for case, part in dict.fromkeys((batch.case, batch.part) for batch in found):
        of_case = [batch for batch in found if (batch.case, batch.part) == (case, part)]
        choices = [choice for batch in of_case for choice in batch.choices]
        assert choices == [x for x in CHOICES[part] if max(x.rows, x.columns) <= case.padded]
        assert [batch.first for batch in of_case] == list(range(0, len(choices), AT_ONCE))
    assert len({batch.name for batch in found}) == len(found)
    assert [{batch.first for batch in some} for some in rounds(dry=False)] == [{0}, {8}]
    assert found[0].part == "prep" and found[2].part == "grad"


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: batch.name.replace(" ", "-"))
def test_choices_reach_the_launches(batch):
    for (words, case), choice in zip(batch.configured(H100), batch.choices, strict=True):
        launches = of_part(batch.part, case.plan(case.placeholders(), H100).launches)
        assert len(launches) == (1 if batch.part == "grad" else 2)
        for launch in launches:
            tuning = launch.tuning
            assert (tuning.num_warps, tuning.num_stages, tuning.max_registers) == choice[1:4]
            assert launch.constants["L"] == choice.length
            if "BV" in launch.constants:
                assert launch.constants["BV"] == choice.rows
            if "BK" in launch.constants:
                assert launch.constants["BK"] == choice.columns
        assert f"L={choice.length} warps={choice.warps}" in words


def test_the_fastest_length_wins_where_all_parts_are_measured():
    base = lookup(64, H100, "balanced")
    key, fastest = (90, 64, "balanced"), Fastest()
    measured = {16: {"prep": 2.0, "grad": 3.0}, 32: {"prep": 3.0, "grad": 5.0, "scan": 1.0}}
    configured = {}
    for length, parts in measured.items():
        for part, ms in parts.items():
            _, case = configurations._configured(
                Case(1, 64, 2, 64), part, next(x for x in CHOICES[part] if x.length == length), H100
            )
            configured[length, part] = case.config
            fastest.add(key, part, case.config, ms)
            fastest.add(key, part, base if base.length == length else case.config, ms + 1)  # slower
    table = fastest.table()  # of 16 the scans are missing
    assert table[key].length == 32 and table[key].grad == configured[32, "grad"].grad
    fastest.add(key, "scan", replace(base, length=16), 2.0)
    best = fastest.table()[key]
    assert best.length == 16 and best.prep == configured[16, "prep"].prep
    assert (best.grad, best.grad_block_v) == (configured[16, "grad"].grad, configured[16, "grad"].grad_block_v)
