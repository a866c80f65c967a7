import pytest

from rwkvinside.errors import UserError
from rwkvinside.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("teacher:\n  path: some/model\nseed: 3\n")
    return RunDirectory(tmp_path)


def test_a_run_is_not_a_model(run):
    assert run.is_run
    (run.path / "config.json").write_text("{}")
    assert not run.is_run and not RunDirectory(run.path / "nowhere").is_run


def test_the_configuration_is_plain_values(run):
    assert run.config() == {"teacher": {"path": "some/model"}, "seed": 3}
    for damaged in ("a: [1", "just text", ""):
        (run.path / "config.yaml").write_text(damaged)
        with pytest.raises(UserError, match="config.yaml is damaged"):
            run.config()
    with pytest.raises(UserError, match="nowhere is not a run directory: config.yaml is missing"):
        RunDirectory(run.path / "nowhere").config()


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(run):
    assert run.newest_checkpoint("align") is None
    for name in ("step-99999999", "step-100000000", "step-5", "abandoned-step-200000000", ".step-3.unfinished"):
        (run.stage("align") / name).mkdir(parents=True)
    assert run.newest_checkpoint("align") == run.stage("align") / "step-100000000"


def test_what_ends_twice_is_listed_once(run):
    for stage in ("align", "distill", "align"):
        run.note({"data": {}}, finished=stage, evaluation={"kl": 0.5})
    assert run.finished() == ["distill", "align"]
    assert run.conversion()["evaluations"] == {"align": {"kl": 0.5}, "distill": {"kl": 0.5}}
    assert [path.name for path in run.path.glob(".*")] == []
