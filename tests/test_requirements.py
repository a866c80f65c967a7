"""What the metadata promises: an oldest Python that dependencies run on, and that tools and CI check against."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
OLDEST = PROJECT["requires-python"].removeprefix(">=")


@pytest.mark.parametrize("name", [Requirement(text).name for text in PROJECT["dependencies"]])
def test_dependencies_run_on_the_oldest_python(name):
    needed = metadata(name)["Requires-Python"]
    assert SpecifierSet(needed or "").contains(f"{OLDEST}.99"), f"{name} needs Python {needed}"


def test_all_say_the_same_python():
    python = "Programming Language :: Python :: "
    named = [line.removeprefix(python) for line in PROJECT["classifiers"] if line.startswith(f"{python}3.")]
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8") if (ROOT / ".github").is_dir() else ""
    tested = re.findall(r'python: \["(.*?)"', workflow)
    assert named[0] == OLDEST and tested in ([], [OLDEST])
    assert SETTINGS["tool"]["ruff"]["target-version"] == f"py{OLDEST.replace('.', '')}"
    assert SETTINGS["tool"]["mypy"]["python_version"] == OLDEST, "mypy knows since when the library has what is used"
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert re.findall(r"Python\s+(3\.\d+) or later", text) == [OLDEST], document


def test_the_readme_names_the_torch_that_is_required():
    [torch] = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch"]
    [promised] = re.findall(r"torch (\d+\.\d+) or later", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert str(torch.specifier) == f">={promised}"
