"""The notebooks: their cells run one after the other as Jupyter would run them, with smaller numbers.

They run in this process, without a kernel, so that the libraries are imported once and no other package is needed;
what they display is handed to a stand-in of IPython.display.
"""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"
SMALLER = {  # in place of the values of the cell with the tag "parameters"
    "convert": {"documents": 300, "teacher_tokens": 12_000, "tokens": "3k"},
    "inspect": {"tokens": 1_000},
}


def cells(name):
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def run_cells(name):
    """Run the code cells of a notebook in one namespace, and return it."""
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(cells(name)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {number}", "exec"), namespace)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert SMALLER[name].keys() <= namespace.keys(), "what is made smaller must be a parameter"
                namespace |= SMALLER[name]
    return namespace


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(autouse=True)
def displayed(monkeypatch, folder):
    """What a notebook displays: files, which must be there."""
    found = []
    display = ModuleType("IPython.display")
    display.SVG = display.IFrame = lambda path, **size: found.append(Path(path).read_text(encoding="utf-8"))
    display.display = lambda shown: None
    monkeypatch.setitem(sys.modules, "IPython.display", display)  # alone: a whole IPython would be asked for more
    monkeypatch.chdir(folder)
    return found


def test_notebooks_are_kept_without_outputs_and_linked():
    readme, index = (
        (NOTEBOOKS.parents[1] / name).read_text(encoding="utf-8") for name in ("README.md", "docs/howto.md")
    )
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == SMALLER.keys()
    for name in SMALLER:
        for cell in cells(name):
            assert not cell.get("outputs") and cell.get("execution_count") is None, f"clear the outputs of {name}.ipynb"
            assert max(map(len, "".join(cell["source"]).splitlines())) <= 120
        assert f"docs/notebooks/{name}.ipynb" in readme and f"notebooks/{name}.ipynb" in index


def test_convert_then_inspect(displayed, capsys):
    """The second takes the run of the first."""
    made = run_cells("convert")
    said = capsys.readouterr().out
    assert (made["folder"] / "student" / "model.safetensors").is_file()
    assert "--- teacher\ndef read_lines(path):" in said and "--- student\ndef read_lines(path):" in said
    assert f"KL {made['scores']['kl']:.3f} nats" in said and 0 < made["scores"]["kl"] < 5
    assert displayed == []
    seen = run_cells("inspect")
    said = capsys.readouterr().out
    assert "layers:  RRR" in said
    assert [row.name for row in seen["facts"].scores] == ["teacher", "calibrate", "align", "distill"]
    assert [text.lstrip()[:5] for text in displayed] == ["<?xml", "<?xml", "<!doc"]
    assert said.count("keeps attention") >= 1 and len(seen["found"]["layers"]) == 1
    assert f"attention in {seen['found']['layers']}" in said
