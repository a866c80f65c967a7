import pytest
from tiny import save_configuration

from rwkvinside.config.load import load_config
from rwkvinside.errors import UserError
from rwkvinside.runs.directory import RunDirectory, settings_digest
from rwkvinside.runs.records import StageRecord


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


def test_a_run_keeps_the_steps_of_stages_that_began_or_are_as_long_as_they_were(tmp_path):
    teacher, run = save_configuration(tmp_path / "tiny"), RunDirectory(tmp_path / "run")

    def config(align, distill):
        return load_config(
            teacher=teacher, overrides=[f"stages.align.tokens={align}", f"stages.distill.tokens={distill}"]
        )

    first, later = config("10k", "10k"), config("10M", "10M")
    assert run.step_tokens(first) == {}
    run.path.mkdir()
    run.describe(first, "", {})
    assert run.step_tokens(first) == {name: stage.batch.tokens for name, stage in first.stages.items()}
    assert not {"align", "distill"} & run.step_tokens(later).keys()
    (run.stage("align") / "step-00000001").mkdir(parents=True)
    found = run.step_tokens(later)
    assert (
        found["align"] == first.stages["align"].batch.tokens < later.stages["align"].batch.tokens
        and "distill" not in found
    )
    (run.path / "config.yaml").write_text("stages: {align: {batch: {tokens: some}}, distill: 3}")
    assert run.step_tokens(later) == {}


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


@pytest.fixture
def configured(tmp_path):
    """Configurations by their overrides."""
    teacher = save_configuration(tmp_path / "teacher")
    return lambda *overrides: load_config(teacher=teacher, out=str(tmp_path / "run"), overrides=overrides)


def test_every_configuration_that_a_run_had_is_kept(configured, tmp_path):
    run, texts = RunDirectory(tmp_path / "run"), []
    assert run.changes(configured()) == []
    for overrides in ([], [], ["seed=1"], ["seed=1"], ["seed=2"], []):
        run.describe(configured(*overrides), "a plan", {})
        text = (run.path / "config.yaml").read_text()
        texts += [text] if texts[-1:] != [text] else []
    kept = [run.path / name for name in ("config.1.yaml", "config.2.yaml", "config.3.yaml", "config.yaml")]
    assert [file.read_text() for file in kept] == texts and len(texts) == 4
    assert sorted(file.name for file in run.path.glob("config*")) == sorted(file.name for file in kept)


def test_what_a_power_cut_left_twice_is_not_kept_twice(configured, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.describe(configured(), "a plan", {})
    (run.path / "config.1.yaml").write_text((run.path / "config.yaml").read_text())
    run.describe(configured("seed=1"), "a plan", {})
    assert not (run.path / "config.2.yaml").exists()


def test_changes_name_the_key_and_both_values(configured, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.describe(configured(), "a plan", {})
    assert run.changes(configured()) == [] == run.changes(configured(f"out={tmp_path / 'elsewhere'}"))
    changes = run.changes(configured("seed=1", "stages.align.tokens=512k", "stages.align.train=[mixer.lora]"))
    assert sorted(map(str, changes))[0] == "seed was 0, is 1"
    assert {change.key for change in changes} >= {"seed", "stages.align.tokens", "stages.align.train"}
    # a version that knew fewer fields has written it
    lines = (run.path / "config.yaml").read_text().splitlines()
    (run.path / "config.yaml").write_text("\n".join(line for line in lines if not line.startswith("log_every")))
    assert run.changes(configured()) == []
    assert [str(change) for change in run.changes(configured("log_every=3"))] == ["log_every was 10, is 3"]


def test_a_stage_has_the_configuration_it_ran_with(configured, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.records.make_identity({})
    identity = run.records.identity()
    for stage, before, seed in (("align", None, 0), ("distill", "align", 1)):
        run.describe(configured(f"seed={seed}"), "a plan", {})
        digest, after = settings_digest(run.config()), run.records.digest_before(before)
        run.records.write(StageRecord(identity.run, stage, before, after, digest, checkpoint="step-1"))
    assert [run.config_of(stage)["seed"] for stage in ("align", "distill")] == [0, 1]
    assert run.records.followers("align") == ["distill"] and run.records.followers("distill") == []
    file = run.path / "config.yaml"
    file.write_text(file.read_text().replace(str(tmp_path / "teacher"), "/moved"))
    assert run.config_of("distill")["teacher"]["path"] == "/moved"
    file.write_text(file.read_text().replace("seed: 1", "seed: 5"))
    assert run.config_of("align")["seed"] == 0
    with pytest.raises(UserError, match="config.yaml is not the configuration that stage distill was trained with"):
        run.config_of("distill")


@pytest.mark.parametrize("text", ["[]", "{", '{"finished_stages": 3}', '{"finished_stages": ["../x"]}'])
def test_a_damaged_conversion_is_said(run, text):
    (run.path / "conversion.json").write_text(text)
    with pytest.raises(UserError, match="conversion.json is damaged"):
        run.finished()


def test_a_stage_that_comes_after_itself_is_refused(run):
    run.records.make_identity({})
    identity = run.records.identity()
    for stage, before in (("align", "distill"), ("distill", "align")):
        run.records.write(StageRecord(identity.run, stage, before, "0", "0", checkpoint="step-1"))
    with pytest.raises(UserError, match="began after itself"):
        run.records.finished("distill")


@pytest.mark.parametrize("window, mix", [(8, "sum"), (0, "softmax")])
def test_a_run_of_before_the_softmax_is_a_sum(window, mix, configured, tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.describe(configured(f"student.window={window}", "student.window_mix=sum"), "a plan", {})
    file = run.path / "config.yaml"
    written = settings_digest(run.config())
    file.write_text("".join(line for line in file.open() if "window_mix" not in line))
    assert run.config()["student"].get("window_mix", "softmax") == mix and settings_digest(run.config()) == written
    assert run.changes(configured(f"student.window={window}", f"student.window_mix={mix}")) == []
