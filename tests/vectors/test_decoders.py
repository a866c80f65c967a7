"""Vectors to text: retrieval, inverter and corrector, vec2text behind a fake of its package, smoothing."""

import importlib.util
import json
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import byte_tokenizer, save_qwen3
from torch import nn

from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.errors import UserError
from rwkvinside.vectors.converter import Converter
from rwkvinside.vectors.data import VectorData, split
from rwkvinside.vectors.decoders import edits
from rwkvinside.vectors.decoders.corrector import HYPOTHESES
from rwkvinside.vectors.decoders.inverter import load_inverter, train_inverter
from rwkvinside.vectors.decoders.registry import Through, build_decoder
from rwkvinside.vectors.decoders.retrieval import Retrieval
from rwkvinside.vectors.decoders.scoring import agreement
from rwkvinside.vectors.decoders.smoothing import REQUEST, Smoother
from rwkvinside.vectors.embedders import embedder, hashed
from rwkvinside.vectors.settings import DataConfig, InverterConfig, load_config
from rwkvinside.vectors.steps import read_again
from rwkvinside.vectors.store import embed, read_store, write_store

SMALL = ("d_model=64", "heads=2", "layers=2", "slots=4", "vocab=600", "evaluate_every=0", "noise=0.1", "optim.lr=1e-2")


def quiet(_):
    pass


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "store"
    embed("stories", "hash768", out, limit=130)
    return out


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    small = ["model.d_model=32", "model.layers=1", "steps=2", "batch=8", "model.arch=gru", "evaluate_every=0"]
    assert rwkvinside(["vectors", "train", "--data", str(store), "--out", str(out), "data.val=0.4", *small]) == 0
    return out


@pytest.fixture(scope="module")
def inverter(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("inverter") / "inverter"
    config = load_config(InverterConfig, overrides=[*SMALL, "steps=200"], out=str(out), source=str(store))
    return out, train_inverter(config, quiet)


def test_retrieval(store):
    data = read_store(store)
    assert Retrieval(data).decode(data.vectors[10:13]) == data.texts[10:13]


def test_inverter_writes_what_it_has_read(store, inverter):
    folder, result = inverter
    assert result["train"]["words"] > 0.75, result
    assert 0 <= result["held_out"]["words"] < result["train"]["words"]  # 64 sentences are not a language
    data = read_store(store)
    decoder = build_decoder(f"inverter:{folder}", data)
    true = data.texts[:64] if not _validates(data, 0) else data.texts[64:]
    at = [data.texts.index(text) for text in true]
    assert agreement(decoder.decode(3 * data.vectors[at]), true)["words"] > 0.7  # whatever their length
    cross_entropy = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["cross_entropy"] for row in cross_entropy if row["kind"] == "eval"]


def _validates(data, document):
    from rwkvinside.vectors.data import validating

    return bool(validating(data, 0.2)[document])


def test_finished_inverter_is_only_read(store, inverter):
    folder, result = inverter
    config = load_config(InverterConfig, overrides=[*SMALL, "steps=200"], out=str(folder), source=str(store))
    assert train_inverter(config, quiet) == json.loads(json.dumps(result))
    with pytest.raises(UserError, match="holds a run with other settings"):
        train_inverter(config.model_copy(update={"seed": 1}), quiet)


def test_inverter_is_checked(inverter, tmp_path):
    with pytest.raises(UserError, match="reads vectors of hash768, these are of all-MiniLM-L6-v2"):
        load_inverter(inverter[0], "all-MiniLM-L6-v2")
    with pytest.raises(UserError, match=r"holds no inverter: it has no inverter\.json"):
        load_inverter(tmp_path, "hash768")
    with pytest.raises(UserError, match="heads=5 does not divide d_model=64"):
        load_config(InverterConfig, overrides=["d_model=64", "heads=5"])


def test_edits():
    text = "Ada's coat hung at the mill."
    places = edits.spans(text)
    assert [text[start:end] for start, end in places] == ["Ada", "s", "coat", "hung", "at", "the", "mill"]
    assert edits.replaced(text, places[0], "ben") == "Ben's coat hung at the mill."
    assert edits.removed(text, places[1]) == "Ada coat hung at the mill."
    assert edits.removed(text, places[-1]) == "Ada's coat hung at the."
    assert edits.removed("Two dogs sat.", (0, 3)) == "Dogs sat." and edits.removed("Two", (0, 3)) == ""
    assert edits.inserted("Dogs sat.", 0, "two") == "Two Dogs sat."
    assert edits.inserted("Dogs sat.", 2, "down") == "Dogs sat down." and edits.inserted("", 0, "dogs") == "dogs"
    found = edits.rearranged("The sat dog.", ["it"])
    assert {"The dog sat.", "The sat dogs.", "The sat do.", "The it sat dog."} <= set(found)


def test_lexicon_spells_names_with_a_capital():
    lexicon = edits.build_lexicon(["The dog saw Ada.", "Ada saw the dog."], ("ada", "zoo"), embedder("hash768").encode)
    assert sorted(lexicon.words) == ["Ada", "dog", "saw", "the", "zoo"] and "zoo" not in lexicon.common[:4]
    torch.testing.assert_close(lexicon.vectors[lexicon.words.index("zoo")], hashed("zoo"))


def test_corrector_finds_what_was_never_read(store, inverter):
    """Another name and another place, which the inverter cannot write; a prediction is left as it was written."""
    data = read_store(store)
    held = [i for i in range(len(data.texts)) if _validates(data, int(data.documents[i]))][:6]
    true = [data.texts[i] for i in held]
    corrector = build_decoder(f"corrector:{inverter[0]}", data)
    before, after = (agreement(decoder.decode(data.vectors[held]), true) for decoder in (corrector.inverter, corrector))
    assert before["decode"] < 0.5 and after["decode"] >= 0.8, (before, after)
    beside = F.normalize(data.vectors[held[:2]] + F.normalize(torch.randn(2, 768), dim=-1), dim=-1)
    hypotheses, likelihood = corrector.inverter.hypotheses(beside, HYPOTHESES)
    assert all(text in texts for text, texts in zip(corrector.decode(beside), hypotheses, strict=True))
    assert bool((likelihood < 0).all()) and bool((likelihood.diff(dim=1) <= 1e-4).all())  # the likeliest first


def test_likelihood_of_hypotheses(store, inverter):
    """Beam search counts with what the model says of the text."""
    data, decoder = read_store(store), load_inverter(inverter[0], "hash768")
    texts, likelihood = decoder.hypotheses(data.vectors[:1], 2)
    ids = torch.tensor([[*decoder.tokenizer(texts[0][0], add_special_tokens=False)["input_ids"], 1]])
    with torch.no_grad():
        assert float(decoder.model(data.vectors[:1], ids)) == pytest.approx(-float(likelihood[0, 0]), rel=1e-3)


def test_corrector_is_checked(inverter, store):
    data = read_store(store)
    spec = f"corrector:{inverter[0]}"
    for card, message in (
        ({}, "vectors of hash768 name no embedder"),
        ({"embedder": "mean:nowhere"}, "needed again: nowhere is neither in the hub's cache nor to be had"),
        ({"embedder": "hash768", "model_sha256": "abc"}, "has SHA-256 None, these vectors are of abc"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            build_decoder(spec, replace(data, card={"space": "hash768"} | card))
        assert "use --decoder inverter:DIR" in refused.value.hint


def test_correction_is_measured(inverter, store, tmp_path, capsys):
    folder, result = inverter
    words = ["vectors", "inverter", "--data", str(store), "--out", str(folder), "steps=200", *SMALL]
    assert rwkvinside([*words, "--correct", "2", "--json", str(tmp_path / "c.json")]) == 0
    assert "held out corrected:" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "c.json").read_text())
    assert numbers["held_out"] == result["held_out"]
    scores = numbers["correction"]
    assert set(scores) == {"train", "train_corrected", "held_out", "held_out_corrected"}
    assert scores["train_corrected"]["decode"] == 1 and scores["train_corrected"]["cosine"] > 0.99


def test_decode_command(run, inverter, store, tmp_path, capsys):
    words = ["vectors", "decode", str(run), "--count", "1", "--score", "6", "--json", str(tmp_path / "d.json")]
    assert rwkvinside([*words, "--decoder", f"inverter:{inverter[0]}"]) == 0
    numbers = json.loads((tmp_path / "d.json").read_text())
    assert numbers["scored"] == 6 and 0 <= numbers["decode"] <= numbers["words"] <= 1
    assert rwkvinside([*words, "--decoder", f"corrector:{inverter[0]}"]) == 0
    assert 0 <= json.loads((tmp_path / "d.json").read_text())["nearer"] <= 1
    assert rwkvinside([*words, "--through", str(store)]) == 0  # the same space: the map is the identity
    assert json.loads((tmp_path / "d.json").read_text())["scored"] == 6
    assert "of the variance of held-out vectors" in capsys.readouterr().out
    for decoder, message in (
        ("invertor", "decoders: retrieval, inverter:DIR, corrector:DIR, vec2text, vec2text:DIR"),
        ("vec2text", "vec2text cannot decode vectors of hash768"),
        (f"inverter:{tmp_path}", "holds no inverter"),
    ):
        assert rwkvinside([*words, "--decoder", decoder]) == 2
        assert message in capsys.readouterr().err


def test_decoder_in_the_loop(store, inverter, tmp_path):
    """Predictions are pulled to the vector of the text that they are decoded to."""
    data = read_store(store)
    train = split(data, DataConfig(source=str(store), val=0.4)).train
    texts = load_inverter(inverter[0], "hash768").decode(data.vectors[:3])
    again = read_again(f"inverter:{inverter[0]}", train)(data.vectors[:3])
    torch.testing.assert_close(again, torch.stack([hashed(text) for text in texts]))
    retrieved = read_again("retrieval", train)(data.vectors[train.targets[:3]] + 0.01)
    torch.testing.assert_close(retrieved, data.vectors[train.targets[:3]])
    small = ["model.d_model=32", "model.layers=1", "steps=2", "batch=2", "model.arch=gru", "evaluate_every=0"]
    loop = ["data.val=0.4", "loss.loop_every=2", f"loss.loop_decoder=inverter:{inverter[0]}"]
    words = ["vectors", "train", "--data", str(store), "--out", str(tmp_path / "run"), *small, *loop]
    assert rwkvinside(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loop"] > 0 for row in rows if row["kind"] == "train"] == [True, False]


def test_through_another_space():
    vectors, turn = torch.randn(60, 8), torch.linalg.qr(torch.randn(8, 8))[0]
    documents, texts = torch.zeros(60, dtype=torch.long), [f"text {i}" for i in range(60)]
    ours = VectorData(vectors, documents, texts, None, {"space": "ours", "dim": 8})
    theirs = VectorData(vectors @ turn + 1, documents, [*texts], None, {"space": "theirs", "dim": 8})
    through = Through("retrieval", ours, theirs)
    assert through.decode(vectors[5:8]) == texts[5:8] and through.r2 > 0.999
    theirs.texts[3] = "another text"
    with pytest.raises(UserError, match="vectors of theirs are not of the same texts as those of ours"):
        Through("retrieval", ours, theirs)


def test_converter_says_how_much_it_explains():
    source = torch.randn(200, 8)
    matrix = torch.randn(8, 5)
    exact = Converter(source, source @ matrix + 3)
    assert exact.r2 > 0.9999
    torch.testing.assert_close(exact(source), source @ matrix + 3, rtol=1e-4, atol=1e-4)
    lengths = torch.rand(200, 1) * 4 + 0.5  # what L2 normalization drops does not come back
    unit = nn.functional.normalize(source, dim=-1)
    assert 0.2 < Converter(unit, lengths * unit).r2 < 0.95


def test_agreement_of_texts():
    assert agreement(["The dog sat."], ["the  dog sat."]) == {"decode": 1.0, "words": 1.0}
    numbers = agreement(["a b c d", ""], ["a b x y", "z"])
    assert numbers == {"decode": 0.0, "words": 0.25}


class _Pretend(nn.Module):
    """Stands for vec2text's models: `encoder_decoder` and weights of its own."""

    class config_class:  # noqa: N801
        @classmethod
        def from_pretrained(cls, folder):
            return json.loads((folder / "config.json").read_text())

    def __init__(self, config):
        super().__init__()
        self.name = config["name"]
        self.weight = nn.Parameter(torch.zeros(2))
        self.encoder_decoder = types.SimpleNamespace(generation_config=types.SimpleNamespace(length_penalty=None))


@pytest.fixture
def fake_vec2text(monkeypatch, tmp_path):
    """The part of vec2text 0.0.13 that is called, and weights for it; returns what it was called with."""
    import evaluate

    calls = {}

    def load_corrector(inversion, corrector):
        calls["metric"] = evaluate.load("accuracy")  # as its trainers do: from the hub
        calls["models"] = (inversion, corrector)
        return types.SimpleNamespace(model=corrector)

    def invert_embeddings(embeddings, corrector, num_steps):
        calls["shapes"] = [*calls.get("shapes", []), tuple(embeddings.shape)]
        calls["num_steps"] = num_steps
        return [f" {corrector.model.name} " for _ in embeddings]

    package = types.ModuleType("vec2text")
    package.models = types.SimpleNamespace(InversionModel=_Pretend, CorrectorEncoderModel=_Pretend)
    package.load_corrector, package.invert_embeddings = load_corrector, invert_embeddings
    package.__spec__ = importlib.util.spec_from_loader("vec2text", None)
    monkeypatch.setitem(sys.modules, "vec2text", package)
    for name in ("inversion", "corrector"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"name": name}))
        torch.save({"weight": torch.ones(2)}, tmp_path / name / "pytorch_model.bin")
    return calls


def gtr(space="mean:gtr-t5-base"):
    return VectorData(torch.randn(20, 768), torch.zeros(20), None, None, {"space": space, "dim": 768})


def test_vec2text(fake_vec2text, tmp_path):
    pytest.importorskip("evaluate")
    import evaluate

    load = evaluate.load
    decoder = build_decoder(f"vec2text:{tmp_path}", gtr())
    assert decoder.decode(torch.randn(20, 768)) == ["corrector"] * 20
    assert fake_vec2text["shapes"] == [(16, 768), (4, 768)] and fake_vec2text["num_steps"] == 20
    inversion, corrector = fake_vec2text["models"]
    assert (inversion.name, corrector.name) == ("inversion", "corrector")
    for model in (inversion, corrector):
        assert model.weight.tolist() == [1, 1] and not model.training
        assert model.encoder_decoder.generation_config.length_penalty == 1
    assert fake_vec2text["metric"] is None and evaluate.load is load


def test_vec2text_is_checked(fake_vec2text, tmp_path):
    with pytest.raises(UserError, match="neither normalized nor through sentence-transformers' Dense layer"):
        build_decoder(f"vec2text:{tmp_path}", gtr("st:gtr-t5-base"))
    (tmp_path / "corrector" / "config.json").unlink()
    with pytest.raises(UserError, match=r"corrector holds no model: it has no config\.json"):
        build_decoder(f"vec2text:{tmp_path}", gtr())
    torch.save({"another": torch.ones(2)}, tmp_path / "inversion" / "pytorch_model.bin")
    (tmp_path / "corrector" / "config.json").write_text('{"name": "corrector"}')
    with pytest.raises(UserError, match="has weights of another model: weight, another"):
        build_decoder(f"vec2text:{tmp_path}", gtr())


@pytest.mark.skipif(importlib.util.find_spec("vec2text") is not None, reason="vec2text is installed")
def test_vec2text_says_how_to_install_it():
    with pytest.raises(UserError, match=r"vec2text is not installed.*") as refused:
        build_decoder("vec2text", gtr())
    assert "pip install .[vec2text]" in str(refused.value.hint)


def test_smoothing(run, tmp_path, capsys):
    tokenizer = byte_tokenizer("<|end|>", pad_token="<|end|>", eos_token="<|end|>")
    save_qwen3(tmp_path / "plain", tokenizer)
    smoother = Smoother(tmp_path / "plain", new_tokens=5)
    text = "The lamp was out."
    assert smoother([text, "It was dark."]) == smoother([f"{text} It was dark."]) != smoother([text])
    long = smoother(["x" * 500, text])  # longer than the model's 128 positions: the oldest are cut
    assert long == smoother(["x" * 300, text])
    words = ["vectors", "decode", str(run), "--count", "1", "--score", "0", "--smooth"]
    capsys.readouterr()
    assert rwkvinside([*words, str(tmp_path / "plain")]) == 0
    assert "smoothed  " in capsys.readouterr().out
    assert rwkvinside([*words, str(tmp_path)]) == 2
    assert "holds no model: it has no config.json" in capsys.readouterr().err


def test_smoothing_asks_a_model_that_chats(tmp_path):
    tokenizer = byte_tokenizer("<|end|>", pad_token="<|end|>", eos_token="<|end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_qwen3(tmp_path, tokenizer, max_position_embeddings=512)
    smoother = Smoother(tmp_path, new_tokens=3)
    asked = []
    generate = smoother._model.generate
    smoother._model.generate = lambda ids, **more: asked.append(ids) or generate(ids, **more)
    smoother(["It was dark."])
    assert tokenizer.decode(asked[0][0]) == f"{REQUEST}\n\nIt was dark."


def test_texts_are_needed(tmp_path):
    bare = VectorData(torch.randn(12, 768), torch.arange(12) // 6, None, None, {"space": "bare", "dim": 768})
    write_store(bare, tmp_path / "bare")
    config = load_config(InverterConfig, overrides=SMALL, out=str(tmp_path / "out"), source=str(tmp_path / "bare"))
    with pytest.raises(UserError, match="has no texts to learn from"):
        train_inverter(config, quiet)
    with pytest.raises(UserError, match="have no texts to retrieve"):
        build_decoder("retrieval", bare)
