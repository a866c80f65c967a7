"""A finished run, made by hand, see `finished_run`."""

import pytest
from finished_run import save_run, save_teacher


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    path = save_teacher(tmp_path_factory.mktemp("teacher") / "tiny-qwen3")
    (path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Tiny\n")
    (path / "LICENSE").write_text("the licence")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, teacher):
    return save_run(tmp_path_factory.mktemp("run"), teacher)


@pytest.fixture(scope="session")
def make_teacher():
    return save_teacher


@pytest.fixture(scope="session")
def make_run():
    return save_run
