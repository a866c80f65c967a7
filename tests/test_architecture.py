"""Who may import whom, read from the source; see docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rwkvinside"

# part -> parts of rwkvinside it may import; `errors` and `resident` may be imported by all but the portable code
MAY_IMPORT = {
    "modeling": {"modeling", "kernels"},
    "data": {"data"},
    "training": {"training", "data", "quantization"},
    "distill": {"distill", "modeling", "data", "adapters", "quantization", "rounding"},
    "export": {"export", "training", "distill", "modeling", "data", "adapters", "quantization"},
    "evaluate": {"evaluate", "report", "export", "distill", "modeling", "data"},
    "report": {"report"},
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


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_point_one_way(part):
    allowed = MAY_IMPORT[part] | (set() if part == "modeling" else {"errors", "resident"})
    for file in (PACKAGE / part).rglob("*.py"):
        for name in imported(file):
            if name.startswith("rwkvinside."):
                assert name.split(".")[1] in allowed, f"{file.relative_to(ROOT)} imports {name}"


def test_portable_code_needs_torch_and_transformers_only():
    for file in (PACKAGE / "modeling").glob("*.py"):
        for name in imported(file) - {"rwkvinside"}:  # its kernels, inside try: an export does without
            top = name.split(".")[0]
            assert top in {"torch", "transformers", "rwkvinside", *sys.stdlib_module_names}, (
                f"{file.name} imports {name}"
            )
            # an export carries these files side by side: only `from .file import name` survives that
            assert top != "rwkvinside" or name.count(".") == 2, f"{file.name} imports {name}"


def test_kernels_need_torch_and_triton_only():
    allowed = {"torch", "triton", "rwkvinside", "kernels", *sys.stdlib_module_names}  # kernels: relative imports
    for file in (ROOT / "kernels" / "wkv7").rglob("*.py"):
        assert {name.split(".")[0] for name in imported(file)} <= allowed, file


@pytest.mark.parametrize(
    "library, owners",
    [
        ("deepspeed", {"training/engine.py", "training/deepspeed_engine.py"}),
        ("peft", {"adapters.py", "export/reload.py"}),  # the latter is a process of its own that plays the user
        ("bitsandbytes", {"quantization.py"}),
    ],
)
def test_heavy_libraries_have_one_owner(library, owners):
    users = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == library for name in imported(file))
    }
    assert users <= owners


def test_top_level_import_is_light():
    code = "import sys, rwkvinside; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_public_names_exist():
    import rwkvinside

    for name in rwkvinside.__all__:
        assert getattr(rwkvinside, name).__doc__
    with pytest.raises(AttributeError, match="public names"):
        _ = rwkvinside.nonsense
