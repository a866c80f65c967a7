"""`import rwkvinside as rw`: every name of it, and a conversion from configuration to scores with nothing else."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest
from tiny import byte_tokenizer, save_qwen3

import rwkvinside as rw

SMALL = [
    "device=cpu",
    "run=[align,distill]",
    *(
        f"stages.{name}.{field}"
        for name in ("align", "distill")
        for field in ("tokens=128", "data.seq_len=32", "batch.tokens=64", "optim.lr=0.003")
    ),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder with a tiny teacher and texts."""
    root = tmp_path_factory.mktemp("api")
    save_qwen3(root / "teacher", byte_tokenizer("<eos>", eos_token="<eos>"))
    for name, count in (("train", 40), ("val", 5)):
        lines = [json.dumps({"text": f"{name} {i}: the quick brown fox " * (i % 3 + 1)}) for i in range(count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def config(material):
    return rw.load_config(
        teacher=str(material / "teacher"),
        data=[str(material / "train.jsonl")],
        val=[str(material / "val.jsonl")],
        out=str(material / "run"),
        overrides=[*SMALL, f"data.cache_dir={material / 'cache'}"],
    )


@pytest.fixture(scope="module")
def run(config, material):
    rw.train(config)
    return material / "run"


def test_a_plan_is_text_and_writes_nothing(config, material):
    plan = rw.plan(config)
    assert "run       align -> distill" in plan and "\nalign: 128 tokens" in plan
    assert "\nalign: " not in rw.plan(config, stages=["distill"])
    assert "2 ranks, DeepSpeed" in rw.plan(config, ranks=2)
    assert "\ndevice    H100, bf16" in rw.plan(config.model_copy(update={"device": "auto"}), gpu="H100")
    assert {path.name for path in material.iterdir()} <= {"teacher", "train.jsonl", "val.jsonl"}


def test_stages_are_run_and_resumed(run, config):
    assert json.loads((run / "conversion.json").read_text())["finished_stages"] == ["align", "distill"]
    with pytest.raises(rw.UserError, match="not empty"):
        rw.train(config)
    before = (run / "metrics.jsonl").read_bytes()
    rw.train(config, resume=True)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_export_verify_evaluate(run, material, capsys):
    report = rw.export(run, material / "student", dtype="bfloat16")
    assert report["stage"] == "distill" and report["dtype"] == "bfloat16" and report["verification"]["passed"]
    assert rw.verify(material / "student", against=run)["max_difference"] <= 1e-5
    capsys.readouterr()
    val = [material / "val.jsonl"]
    scores = rw.evaluate(material / "student", material / "teacher", data=val, max_documents=3, max_length=16)
    assert scores["documents"] == 3 and scores["max_length"] == 16 and scores["teacher"] == "teacher"
    assert scores["kl"] > 0 and scores["by_position"][0]["first"] == 1
    of_run = rw.evaluate(run, data=val, max_documents=3, max_length=16)  # knows its teacher, and has fp32 weights
    assert of_run["kl"] == pytest.approx(scores["kl"], rel=0.1)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(rw.UserError, match="no teacher is given"):
        rw.evaluate(material / "student", data=val)


def test_layers_are_scored_and_chosen(run, capsys):
    found = rw.layers(run, keep=1, tokens=200)
    (layer,) = found["layers"]
    assert found["scores"][layer] == max(found["scores"]) and found["base"] > 0 and found["tokens"] > 0
    assert rw.layers(run, keep=1, choose="error", tokens=200)["base"] is None
    with pytest.raises(rw.UserError, match="best"):
        rw.layers(run, keep=1, choose="best")


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(rw.UserError) as caught:
        rw.export("run", tmp_path / "out", to="hff")
    assert str(caught.value) == "export format 'hff' is not known; did you mean hf?\nformats: hf, mlx, gguf, rwkv-infer"


def test_every_name_is_there_and_documented():
    for name in rw.__all__:
        assert name in dir(rw) and (getattr(rw, name).__doc__ or name == "__version__")
    for name in ("load_config", "plan", "train", "export", "verify", "evaluate"):
        assert "rw." in inspect.getdoc(getattr(rw, name)), f"{name} has no example"
    with pytest.raises(AttributeError, match="public names: .*HybridModel"):
        _ = rw.nonsense


def test_functions_keep_their_names_when_the_packages_are_imported():
    for name in ("export.verify", "evaluate.compare", "export.registry"):
        importlib.import_module(f"rwkvinside.{name}")
    assert inspect.isfunction(rw.export) and inspect.isfunction(rw.evaluate)


def test_import_is_light_until_something_is_used():
    code = (
        "import sys, rwkvinside as rw; dir(rw), rw.export, rw.UserError\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "rw.wkv7; sys.exit(bool(heavy) or 'torch' not in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("use", [rw.plan, rw.train])
def test_what_is_no_configuration_is_refused(use):
    with pytest.raises(rw.UserError, match="a configuration is expected, not str 'run.yaml'"):
        use("run.yaml")


def test_data_is_looked_for_before_a_model(material):
    # one text is a list of one: of its letters the slash would be the whole disk
    with pytest.raises(rw.UserError, match="data '/no/where.jsonl' does not exist"):
        rw.evaluate("none", material / "teacher", data="/no/where.jsonl")
