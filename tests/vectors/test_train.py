import inspect
import json
import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.config.show import describe
from rwkvinside.errors import UserError
from rwkvinside.vectors.data import load_data, split
from rwkvinside.vectors.fitting import groups_of
from rwkvinside.vectors.mixers.registry import MIXERS, mixer_class
from rwkvinside.vectors.run import evaluate, load_model, load_predictor, read_result, write_ensemble
from rwkvinside.vectors.settings import ModelConfig, RunConfig, load_config
from rwkvinside.vectors.steps import Resolutions
from rwkvinside.vectors.synthetic import synthetic
from rwkvinside.vectors.train import train

TINY = (
    "data.val=0.05",
    "model.d_model=32",
    "model.layers=1",
    "steps=6",
    "batch=8",
    "evaluate_every=0",
    "model.arch=gru",
)


def config(out, *overrides):
    return load_config(RunConfig, overrides=[*TINY, *overrides], out=str(out))


def quiet(_):
    pass


def rows(run, kind="train"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_resumed_run_is_the_same(tmp_path, monkeypatch):
    straight = train(config(tmp_path / "a", "save_every=2"), quiet)
    from rwkvinside.training.trainer import Trainer

    whole = Trainer._update

    def killed(self, *args):
        if self.done == 3:
            raise KeyboardInterrupt
        whole(self, *args)

    monkeypatch.setattr(Trainer, "_update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "b", "save_every=2"), quiet)
    monkeypatch.undo()
    resumed = train(config(tmp_path / "b", "save_every=2"), quiet)
    measured = ("p50_ms", "p95_ms")
    without_times = [{k: v for k, v in r["metrics"].items() if k not in measured} for r in (straight, resumed)]
    assert without_times[0] == without_times[1]
    assert [row["loss"] for row in rows(tmp_path / "a")] == [row["loss"] for row in rows(tmp_path / "b")]
    assert train(config(tmp_path / "b", "save_every=2"), quiet) == resumed  # finished: only read
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(config(tmp_path / "b", "seed=1"), quiet)


def test_loaded_model_is_the_trained_one(tmp_path):
    result = train(config(tmp_path / "run", "model.arch=performer", "model.options.performer.heads=2"), quiet)
    settings = config(tmp_path).data
    both = split(load_data(settings), settings)
    again = evaluate(load_model(tmp_path / "run"), both)
    assert all(again[name] == result["metrics"][name] for name in again)
    model = load_model(tmp_path / "run")
    assert not model.model.training


def test_training_learns(tmp_path):
    """Less of it than the gate of 0.85, which takes a minute: see docs/vectors.md."""
    result = train(
        config(tmp_path / "run", "steps=60", "batch=32", "model.d_model=64", "optim.lr=4e-3", "model.adapter=none"),
        quiet,
    )
    assert result["metrics"]["cosine"] > 0.5 and result["metrics"]["gain_low"] > 0.5


def test_phases_follow_each_other(tmp_path, capsys):
    phases = (
        "phases=[{name: near, steps: 3, band: [-0.2, 1.1]}, {name: contrast, steps: 3, loss: {cosine: 0, infonce: 1}}]"
    )
    train(config(tmp_path / "run", phases), quiet)
    stages = [row["stage"] for row in rows(tmp_path / "run")]
    assert stages == ["near"] * 3 + ["contrast"] * 3
    assert "infonce" in rows(tmp_path / "run")[-1] and "infonce" not in rows(tmp_path / "run")[0]
    with pytest.raises(UserError, match=r"phase none: no window has a cosine of 1.5 to 2.0"):
        train(config(tmp_path / "empty", "phases=[{name: none, band: [1.5, 2.0]}]"), quiet)


def test_lower_resolutions(tmp_path):
    train(config(tmp_path / "run", "model.resolutions=[48, 24]", "steps=25", "optim.lr=4e-3"), quiet)
    consistency = [row["consistency"] for row in rows(tmp_path / "run")]
    assert consistency[-1] < consistency[0]
    vectors = torch.randn(40, 8) * torch.tensor([9.0, 5, 1, 0.1, 0.1, 0.1, 0.1, 0.1])
    compressed = Resolutions(vectors, (2,))
    assert compressed.axes[:3, :2].pow(2).sum(0).min() > 0.99  # the two directions with most variance


def test_decoder_in_the_loop_acts_every_so_many_steps(tmp_path):
    train(config(tmp_path / "run", "loss.loop_every=3"), quiet)
    acts = [row["loop"] > 0 for row in rows(tmp_path / "run")]
    assert acts == [True, False, False] * 2


def test_diffusion_trains_and_is_scored(tmp_path):
    out = tmp_path / "run"
    train(config(out, "model.arch=lcm_two", "model.options.attention.heads=2"), quiet)
    assert {"denoising", "train_cosine"} <= set(rows(out)[0])
    assert rwkvinside(["vectors", "eval", str(out), "--steps", "2", "--json", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["cosine"] != read_result(out)["metrics"]["cosine"]


def test_model_listens_to_tmd(tmp_path):
    """The code alone says which of 16 rotations turns the one vector of the context."""
    out = tmp_path / "run"
    train(
        config(
            out,
            *("data.source=synthetic:rotor-tmd", "data.context=1", "model.tmd=film", "model.adapter=none"),
            *("steps=60", "batch=64", "model.d_model=96", "model.block=residual", "optim.lr=4e-3"),
        ),
        quiet,
    )
    numbers = []
    for codes in ("true", "shuffled"):
        assert rwkvinside(["vectors", "eval", str(out), "--tmd", codes, "--json", str(tmp_path / "e.json")]) == 0
        numbers.append(json.loads((tmp_path / "e.json").read_text())["cosine"])
    assert numbers[0] > numbers[1] + 0.1


def test_ensemble_is_no_worse_than_its_members_on_average(tmp_path):
    runs = [tmp_path / f"run{seed}" for seed in range(2)]
    for seed, run in enumerate(runs):
        train(config(run, "steps=30", f"seed={seed}", "optim.lr=4e-3"), quiet)
    for weighted in (False, True):
        result = write_ensemble(tmp_path / f"vote{weighted}", runs, weighted)
        assert result["metrics"]["cosine"] >= result["members_mean_cosine"]
    batch = split(load_data(config(tmp_path).data), config(tmp_path).data).val.batch(torch.tensor([0, 1]))
    vote = load_predictor(tmp_path / "voteFalse")(batch)
    torch.testing.assert_close(vote.norm(dim=-1), torch.ones(2))
    train(config(tmp_path / "short", "data.context=4"), quiet)
    with pytest.raises(UserError, match=r"have windows of their own: .*'context': 5.*'context': 4"):
        write_ensemble(tmp_path / "vote", [*runs, tmp_path / "short"])
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    torch.testing.assert_close(load_predictor(moved / "voteFalse")(batch), vote)


def test_gpt2_begins_as_a_published_one(tmp_path):
    """Blocks, positions and last norm; a run needs the files at its start alone."""
    torch.manual_seed(5)
    shapes = {"n_embd": 32, "n_head": 2, "n_layer": 3, "n_positions": 64, "vocab_size": 50}
    published = GPT2LMHeadModel(GPT2Config(**shapes, bos_token_id=0, eos_token_id=0)).eval()
    published.save_pretrained(tmp_path / "gpt")
    words = ["model.arch=gpt2", f"model.pretrained={tmp_path / 'gpt'}", "model.options.gpt2.heads=2"]
    words += ["model.options.gpt2.max_len=16", "model.layers=3", "steps=1", "optim.lr=0"]
    result = train(config(tmp_path / "run", *words), quiet)
    (tmp_path / "gpt").rename(tmp_path / "elsewhere")
    trained = load_model(tmp_path / "run").model
    x = torch.randn(2, 5, 32)
    whole = published.transformer(inputs_embeds=x).last_hidden_state
    torch.testing.assert_close(trained.blocks[0].mixer.run(x), whole, rtol=0, atol=1e-5)
    assert result["arch"] == "gpt2"
    here = f"model.pretrained={tmp_path / 'elsewhere'}"
    for more, said in (
        ([*words, here, "model.layers=4"], "3 layers and 64 positions"),
        ([*words, here, "model.options.gpt2.heads=4"], "'n_head': 2"),
        ([*words], "is neither in the hub's cache|holds no model"),
        (["model.arch=gru", here], "only gpt2 begins so"),
    ):
        with pytest.raises(UserError, match=said):
            train(config(tmp_path / "other", *more), quiet)


def test_bad_input_is_one_line(tmp_path, capsys):
    out = str(tmp_path / "run")
    for words, message in (
        (["train", "--out", out, "model.arch=lsmt"], "did you mean lstm"),
        (["train", "--out", out, "model.d_hidden=64"], "model.d_hidden: unknown key; here it is model.d_model"),
        (["train", "--out", out, "model.d_in=96"], "synthetic:rotor-lin has vectors of 768"),
        (["train", "--out", out, "--data", str(tmp_path)], "holds no vectors"),
        (["train", "--out", out, "model.tmd=film"], "has no TMD codes"),
        (["train", "--out", out, "optim.kind=adamw8bit"], "optim.kind"),
        (["train", "--out", out, "loss.cosine=0"], "nothing to train on"),
        (["eval", str(tmp_path)], "is not a run of vector models"),
        (["leaderboard", str(tmp_path)], "has no finished run"),
    ):
        assert rwkvinside(["vectors", *words]) == 2, words
        assert message in capsys.readouterr().err, words
    assert not (tmp_path / "run").exists()


def test_names_of_the_study_lead_to_fields():
    """What stands behind "here it is" is a field, or an option of a kind of layer."""
    fields = {path for path, _, _ in describe(RunConfig)}
    for name, meant in ModelConfig.known_as.items():
        path, _, option = re.split("[:;,]", meant)[0].partition(".options.")
        if option:
            kind, key = option.split(".")
            kinds = MIXERS if kind == "KIND" else [kind]
            assert any(key in inspect.signature(mixer_class(each)).parameters for each in kinds), meant
        else:
            assert path in fields, meant
        assert name not in ModelConfig.model_fields


def test_dynamics_have_a_smaller_rate():
    from rwkvinside.vectors.model import build_model

    groups = groups_of(build_model(config("x", "model.arch=s4").model))
    assert {name.rpartition(".")[2] for name in groups["dynamics"]} == {"log_dt", "log_a", "a_imag"}
    assert not set(groups["all"]) & set(groups["dynamics"])


def test_synthetic_data_is_the_same_every_time():
    assert synthetic("rotor-tanh").digest == synthetic("rotor-tanh").digest
