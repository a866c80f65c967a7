"""The sdist and the wheel: what is in them, and that the wheel works where the repository is not."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from tiny import byte_tokenizer, save_qwen3, save_texts

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("rwkvinside", "kernels", "configs", "docs", "tests")
# folder of the repository -> folder in the wheel
PLACES = {"rwkvinside": "rwkvinside", "kernels/wkv7": "rwkvinside/kernels", "configs": "rwkvinside/recipes"}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("build") is None, reason="needs build, which the extra `dev` installs"
)


def tree(folder):
    """Files below a folder, relative to it, without what is made by tools."""
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix not in (".so", ".pyc")
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The repository as a fresh checkout has it, so that nothing left by earlier builds gets in."""
    copy = tmp_path_factory.mktemp("source")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
        elif path.name in FOLDERS:
            shutil.copytree(path, copy / path.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


@pytest.fixture(scope="module")
def built(source):
    """(sdist, wheel); the wheel is built from the unpacked sdist, as `python -m build` does."""
    command = [sys.executable, "-m", "build", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    [sdist], [wheel] = (source / "dist").glob("*.tar.gz"), (source / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Install the wheel into a fresh environment; return a way to run its programs far from the repository.

    The environment finds this one's other packages through a .pth file, which does not execute their .pth files, so
    that an editable installation of the repository stays out of it.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    [packages] = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    programs = folder / "venv/bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *arguments):
        done = subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "--no-index", "--no-deps", built[1])
    return lambda program, *arguments: run(programs / program, *arguments)


def test_the_sdist_has_what_tests_and_docs_need(built, source):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in FOLDERS:
        assert {f"{folder}/{name}" for name in tree(source / folder)} <= names
    top = {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "constraints.txt"}
    assert top | {"mkdocs.yml", "pyproject.toml", "setup.py"} | {path.name for path in source.glob("*.py")} <= names


def test_the_wheel_is_the_package_and_nothing_else(built, source):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {f"{there}/{name}" for here, there in PLACES.items() for name in tree(source / here)}
    assert {name for name in names if not name.endswith(".so")} == expected
    assert "rwkvinside/py.typed" in names


@pytest.mark.skipif(
    not os.environ.get("CXX") and not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)
def test_the_wheel_has_the_kernel_and_fits_all_pythons(built):
    assert re.fullmatch(r"rwkvinside-[\d.]+-py3-none-(linux|macosx)_\w+\.whl", built[1].name)
    with zipfile.ZipFile(built[1]) as wheel:
        assert "rwkvinside/kernels/native/_wkv7.so" in wheel.namelist()


def test_a_machine_without_a_compiler_gets_a_wheel_that_works(source, tmp_path):
    """As on Windows; it says what is slower when it is built, and when it runs."""
    environment = os.environ | {"CXX": "/none", "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "unpacked")}
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernel was not built: CXX is '/none'" in done.stderr and "takes about four times as long" in done.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        assert not [name for name in content.namelist() if name.endswith(".so")]
        content.extractall(tmp_path / "unpacked")
    code = (
        "import rwkvinside as rw, rwkvinside.kernels as kernels, torch\n"
        "x = [0.1 * torch.randn(1, 40, 2, 16) for _ in range(6)]\n"
        "x[1] = -x[1].abs()\n"
        "y, _ = rw.wkv7(*x)\n"
        "print((y - rw.wkv7(*x, backend='reference')[0]).abs().max() < 1e-4, kernels.why_unavailable('native'))\n"
        "print(rw.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    works, place = done.stdout.splitlines()
    assert works == "tensor(True) CXX is '/none', and no such program is found"
    assert Path(place).is_relative_to(tmp_path)


def test_wheels_are_built_for_the_platforms_that_have_the_kernel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    assert {name.split("-")[1].split("_")[0] for name in settings["build"]} == {"manylinux", "macosx"}
    assert settings["test-environment"]["CXX"] == "/none", "what is tested is the kernel in the wheel"


def test_the_wheel_runs_without_the_repository(installed):
    code = "import rwkvinside, rwkvinside.kernels as k; print(rwkvinside.__file__, k.__file__)"
    assert str(ROOT) not in installed("python", "-c", code)
    assert "all requirements are met" in installed("rwkvinside", "doctor")
    assert "preset:" in installed("python", "-m", "rwkvinside", "config", "show", "--teacher", "Qwen3-0.6B")


def test_the_wheel_trains_exports_and_verifies(installed, tmp_path):
    tokenizer = byte_tokenizer("<|end|>", eos_token="<|end|>")
    save_qwen3(tmp_path / "teacher", tokenizer, eos_token_id=tokenizer.eos_token_id)
    text = tmp_path / "text.jsonl"
    save_texts(text)
    stages = ("calibrate", "align", "distill")
    fields = {"tokens": 512, "data.seq_len": 32, "batch.tokens": 128}
    small = [f"stages.{stage}.{name}={value}" for stage in stages for name, value in fields.items()]
    run, export = str(tmp_path / "run"), str(tmp_path / "export")
    teacher = ["--teacher", str(tmp_path / "teacher"), "--data", str(text)]
    installed("rwkvinside", "train", *teacher, "--out", run, *small)
    installed("rwkvinside", "export", run, "--to", "hf", "--out", export)
    assert "passed: True" in installed("rwkvinside", "verify", export, "--against", run)


def test_importing_setup_runs_nothing_but_setup():
    """Metadata can be read without a compiler and without the package."""
    code = (
        "import setuptools, sys\n"
        "setuptools.setup = lambda **arguments: print(sorted(arguments))\n"
        "import setup; assert not {'rwkvinside', 'wkv7_native_build'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "version" not in done.stdout
