"""Short names of published data."""

from rwkvinside.cli.main import main
from rwkvinside.data.catalog import CATALOG, resolve_names
from rwkvinside.data.settings import DataConfig


def test_names_become_sources_of_the_hub_unless_a_file_has_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_names(["dclm", "texts.jsonl"]) == [CATALOG["dclm"].source, "texts.jsonl"]
    assert DataConfig(train=["fineweb-edu"]).train == ["hub:HuggingFaceFW/fineweb-edu:sample-10BT"]
    (tmp_path / "dclm").mkdir()
    assert resolve_names(["dclm"]) == ["dclm"]


def test_the_command_lists_name_size_and_license(capsys):
    assert main(["data", "presets"]) == 0
    said = capsys.readouterr().out
    for name, dataset in CATALOG.items():
        assert name in said and dataset.license in said and dataset.size in said
