"""The JSON schema of configuration files, against what is shipped and what is wrong."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from rwkvinside.cli.main import main
from rwkvinside.config.show import json_schema

OF_SHIPPED_FILES = ("recipes", "variants", "attention_every")  # what only they may say
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def validator():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    "file",
    [f for kind in ("recipes", "teachers", "variants") for f in sorted((CONFIGS / kind).glob("*.yaml"))],
    ids=lambda f: f.stem,
)
def test_shipped_files_are_valid(validator, file):
    values = yaml.safe_load(file.read_text())
    for name in OF_SHIPPED_FILES:
        values.pop(name, None)
    assert not [error.message for error in validator.iter_errors(values)]


@pytest.mark.parametrize(
    "values",
    [
        {"studnt": {}},
        {"student": {"preset": "cxa07"}},
        {"stages": {"align": {"tokens": "many"}}},
        {"stages": {"align": {"tokens": 0}}},
        {"log_every": 0},
    ],
)
def test_what_is_wrong_is_found(validator, values):
    assert not validator.is_valid(values)


def test_counts_may_be_written_as_people_do(validator):
    assert validator.is_valid({"stages": {"align": {"tokens": "600k"}, "distill": {"tokens": 4096}}})


def test_the_command_writes_it(tmp_path, capsys):
    assert main(["config", "schema", "--out", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == json_schema()
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
