"""The docs site builds without a warning and has an entry for each public name."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import rwkvinside

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.integration
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs mkdocs-material and mkdocstrings, which the extra `docs` installs",
)
def test_the_site_builds_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(rwkvinside.__all__) - {"__version__"}:
        public = getattr(rwkvinside, name)
        assert f'id="{public.__module__}.{public.__qualname__}"' in page, name
    assert "Keep a Changelog" in (tmp_path / "site" / "changelog" / "index.html").read_text(encoding="utf-8")
