"""An export runs by its own files alone: its Triton kernel, and what it says about a package that does not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

from rwkvinside.export.huggingface import export_hf


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "carried"
    export_hf(run, out)
    return out


def test_no_file_asks_for_more_than_torch_and_transformers(exported):
    """What transformers looks for before it loads a file: what is imported inside `try` does not count."""
    for file in exported.glob("*.py"):
        assert set(get_imports(file)) - sys.stdlib_module_names <= {"torch", "transformers"}, file.name


def load(folder, package):
    worker = str(Path(__file__).with_name("carried_worker.py"))
    done = subprocess.run(
        [sys.executable, "-I", worker, str(folder), package],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(exported):
    return load(exported, "none")


def test_the_kernel_travels_and_computes_the_same(exported, alone):
    assert (exported / "wkv7_triton.py").exists()
    auto, triton = alone["auto"], alone["triton"]
    assert 0 < triton["difference"] < 1e-4, "other operations, the same result"
    assert triton["tokens"] == auto["tokens"] and len(auto["tokens"][0]) == 4
    layers = len(json.loads((exported / "config.json").read_text())["rwkv_layers"])
    assert triton["calls"] == [layers, layers * (1 + 4)], "one launch a layer, for the prompt and for a token"


def test_on_a_cpu_nothing_is_said_and_the_kernel_is_not_loaded(alone):
    assert alone["warnings"] == [] and alone["auto"]["calls"] == [0, 0]
    assert not alone["auto"]["loaded"] and alone["triton"]["loaded"]


def test_it_refuses_to_assist(alone):
    for found in (alone["auto"], alone["triton"]):
        assert "cannot be the assistant_model of another model" in found["assisting"]


def test_a_package_with_another_interface_is_named_once_and_not_used(exported, alone):
    found = load(exported, "other")
    [said] = found.pop("warnings")
    assert "have interface of an early version and this model calls interface 3" in said
    assert found["auto"] == alone["auto"] and found["triton"] == alone["triton"]
