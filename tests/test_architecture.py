"""Who may import whom, and other rules of the house, read from the source; see docs/architecture.md."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from rwkvinside.families.registry import FAMILIES
from rwkvinside.modeling.registry import HYBRIDS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rwkvinside"
PACKAGES = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
MOST_FILES = 24  # of a package

# package -> packages of rwkvinside that it may import, besides itself, `errors` and `support`
MAY_IMPORT = {
    "support": set(),
    "modeling": {"kernels"},
    "families": {"kernels", "modeling"},
    "data": set(),
    "hybrid": {"kernels", "modeling", "families", "data"},
    "losses": {"kernels", "data", "hybrid"},
    "teacher": {"data", "modeling", "families", "hybrid", "losses"},
    "training": set(),
    "layer_choice": {"data", "hybrid", "losses", "teacher"},
    "stages": {"kernels", "data", "families", "hybrid", "losses", "teacher", "training"},
    "config": {"data", "families", "hybrid", "teacher", "training", "stages"},
    "runs": {"hybrid", "teacher", "training", "stages", "config"},
    "planning": {
        *("kernels", "modeling", "families", "data", "hybrid", "losses", "teacher", "training", "stages", "config"),
        "export",  # which engines will run a student
    },
    "importers": {"modeling", "families", "hybrid", "teacher", "training", "stages", "config", "runs"},
    "export": {"data", "modeling", "families", "hybrid", "teacher", "runs", "importers"},
    "evaluate": {"data", "hybrid", "losses", "teacher", "runs", "export"},
    "lm": {"families", "hybrid", "teacher", "stages", "config", "runs", "evaluate"},
    "talk": {"teacher", "training", "config", "runs", "evaluate", "lm"},
    "report": {"runs"},
    "bench": {
        *("kernels", "data", "modeling", "families", "hybrid", "losses", "teacher", "training", "stages"),
        *("config", "planning", "conversion", "demo", "lm"),
    },
    "conversion": {
        *("modeling", "data", "hybrid", "losses", "teacher", "training", "stages", "layer_choice"),
        *("config", "runs", "planning", "evaluate", "report"),
    },
    "vectors": {
        "modeling",
        "training",
        "config",
        "data",
        "runs",
        "report",
        "demo",
    },  # demo: the text of the standard library
    "demo": {"data", "teacher", "config", "runs", "conversion", "evaluate", "export", "report"},
    "cli": {
        *("kernels", "data", "teacher", "training", "config", "runs", "planning"),
        *("evaluate", "export", "importers", "report", "bench", "conversion", "demo", "lm", "talk", "vectors"),
    },
}


def imported(file: Path) -> set[str]:
    """Dotted names of what a file imports, relative imports resolved."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names.add(".".join(filter(None, (base, node.module))))
            if node.level and node.module is None:
                names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def functions(folder: Path):
    """(file, definition) of every function below a folder."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield file, node


def test_every_package_has_its_line():
    assert set(MAY_IMPORT) == set(PACKAGES)


def test_packages_form_no_circle():
    assert list(TopologicalSorter(MAY_IMPORT).static_order())


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    allowed = MAY_IMPORT[package] | {package, "errors", "__version__"}
    allowed |= set() if package == "modeling" else {"support"}
    for file in (PACKAGE / package).rglob("*.py"):
        for name in imported(file):
            if name.startswith("rwkvinside."):
                assert name.split(".")[1] in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_rooms_are_not_crowded():
    assert len(list(PACKAGE.glob("*.py"))) <= 4
    for package in PACKAGES:
        files = {path.name for path in (PACKAGE / package).glob("*.py")}
        # families are a list, one file each: who knows one knows all
        files -= {f"{family}.py" for family in FAMILIES} | {f"{hybrid}.py" for hybrid in HYBRIDS}
        assert len(files) <= MOST_FILES, package


def test_tests_mirror_the_packages():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders - {"kernels", "golden", "faults"} <= set(PACKAGES)


def test_portable_code_needs_torch_and_transformers_only():
    for file in (PACKAGE / "modeling").glob("*.py"):
        for name in imported(file) - {"rwkvinside"}:  # its kernels, inside try: an export does without
            top = name.split(".")[0]
            if (file.name, top) == ("wkv7_triton.py", "triton"):  # inside try, too
                continue
            assert top in {"torch", "transformers", "rwkvinside", *sys.stdlib_module_names}, (
                f"{file.name} imports {name}"
            )
            # an export carries these files side by side: only `from .file import name` survives that
            assert top != "rwkvinside" or name.count(".") == 2, f"{file.name} imports {name}"


def test_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "rwkvinside", "kernels", *sys.stdlib_module_names}  # kernels: relative imports
    of_package = {"errors", "support", "kernels", "modeling", "report"}  # modeling: the carried kernel; the benchmark
    for file in (ROOT / "kernels" / "wkv7").rglob("*.py"):
        names = imported(file)
        assert {name.split(".")[0] for name in names} <= allowed, file
        assert {name.split(".")[1] for name in names if name.startswith("rwkvinside.")} <= of_package, file


@pytest.mark.parametrize(
    "library, owners",
    [
        ("deepspeed", {"training/deepspeed_engine.py"}),
        ("peft", {"hybrid/adapters.py", "export/reload.py"}),  # the latter is a process of its own that plays the user
        ("bitsandbytes", {"hybrid/quantized_linear.py", "training/optimizer_8bit.py"}),
    ],
)
def test_heavy_libraries_have_one_owner(library, owners):
    users = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imported(file))
        or f'import_extra("{library}"' in file.read_text()
    }
    assert users == owners


@pytest.mark.parametrize(
    "module", ["rwkvinside", "rwkvinside.config.load", "rwkvinside.stages.registry", "rwkvinside.families.registry"]
)
def test_imports_are_light(module):
    objectives = "from rwkvinside.stages.registry import *; [find_stage_class(n, None) for n in STAGES]"
    code = f"import sys, {module}; {objectives}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_objectives_are_compared_in_their_own_rooms_only():
    objective = r'"(calibrate|align|distill|sft)"'
    compared = re.compile(rf"(==|!=|\bin\b)\s*\(?\s*{objective}|objective\s*(==|!=)")
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] in ("stages", "config"):
            continue
        for line in file.read_text().splitlines():
            # the mode of a forward may be called as the objective that needs it
            assert not compared.search(line) or "mode" in line, f"{file.relative_to(ROOT)}: {line.strip()}"


def test_families_are_known_to_their_own_rooms_only():
    facts = re.compile(r"\b(self_attn|[qkvo]_proj|gate_proj|up_proj|down_proj|input_layernorm|embed_tokens|q_norm)\b")
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).parts[0] in ("families", "modeling"):
            continue
        for line in code_lines(file):
            assert not facts.search(line), f"{file.relative_to(ROOT)}: {line.strip()}"


def code_lines(file: Path) -> list[str]:
    """The lines of a file without docstrings and comments."""
    source = file.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for i in range(node.lineno - 1, node.end_lineno):
                lines[i] = ""
    return [line.split("  # ")[0] for line in lines if not line.strip().startswith("#")]


def test_functions_can_be_read_in_one_sitting():
    for file, function in functions(PACKAGE):
        arguments = function.args
        names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = len(names) - (names[:1] != [] and names[0].arg in ("self", "cls", "ctx"))
        where = f"{file.relative_to(ROOT)}: {function.name}"
        assert function.end_lineno - function.lineno < 60, f"{where} is too long"
        assert count <= 10 or function.name.startswith("wkv7") or file.stem in ("wkv7", "wkv7_triton"), (
            f"{where} has {count} parameters"
        )


def test_public_names_exist():
    import rwkvinside

    for name in rwkvinside.__all__:
        assert isinstance(getattr(rwkvinside, name), str) or getattr(rwkvinside, name).__doc__, name
    with pytest.raises(AttributeError, match="public names"):
        _ = rwkvinside.nonsense
