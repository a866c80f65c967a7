"""GGUF files: what llama.cpp itself computes of them, what is refused, and that damage is noticed."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from finished_run import save_run, save_teacher
from tiny import byte_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from rwkvinside.errors import UserError, VerificationError
from rwkvinside.export import probe
from rwkvinside.export.gguf.engine import GGUFModel
from rwkvinside.export.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary
from rwkvinside.export.gguf.write import CONVERSION, TYPES, export_gguf
from rwkvinside.export.probe import batch_of, student_logits
from rwkvinside.export.registry import export, verify
from rwkvinside.report.facts import run_facts
from rwkvinside.runs.trained import open_run
from rwkvinside.support.sealed import unsealed

TEXTS = ["Once upon a time", "The naïve dragons\n\tsaid: “Hi 12345” 你好", "x<|user|>y"]
SIZES = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_hidden_layers": 3,
    "bos_token_id": 256,
    "eos_token_id": [258],
    "pad_token_id": None,
}


def teacher(folder, family="llama", tokenizer=None, **fields):
    if tokenizer is None:
        named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ x }}"}
        tokenizer = byte_tokenizer("<s>", "<|user|>", "</s>", **named)
    save_teacher(folder, family, vocab_size=len(tokenizer) + 5, **SIZES | fields)
    tokenizer.save_pretrained(folder)
    return folder


def finished(folder, student=None, **fields):
    of_student = {"preset": "arwkv7", "attention_layers": []} | (student or {})
    return save_run(folder / "run", teacher(folder / "teacher", **fields), ("mixer", "mlp", "norms"), of_student)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("arwkv7"))


@pytest.fixture(scope="module")
def file(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "student.gguf"
    return out, export(run, out, "gguf")


class LlamaCpp:
    """llama.cpp's own server over a file, in this process."""

    def __init__(self, path):
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp itself is not installed")
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 256, 1, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.verbosity = 0
        self.server = xllamacpp.Server(params)

    def ask(self, path, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, json.dumps(body).encode(), headers)
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def log_probabilities(self, ids, vocabulary):
        """(V,) of the next token; nan for what it does not tell."""
        asked = {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "temperature": 0.0, "cache_prompt": False}
        # it says nothing of a token that ends the text or is half a character: a bias makes it write "!", and leaves
        # the probabilities alone
        asked["logit_bias"] = [[0, 1000.0]]
        found = torch.full((vocabulary,), torch.nan)
        for entry in self.ask("/completion", **asked)["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


# the token shift, the group norm and learned k_k and k_a are of x070; biases and norms of queries are left out
@pytest.mark.parametrize(
    "family, student, fields",
    [
        ("llama", {}, {"tie_word_embeddings": True}),
        ("qwen3", {}, {"hidden_size": 256, "head_dim": 128}),
        ("qwen2", {}, {}),
        ("llama", {"preset": "x070"}, {}),
        ("mistral", {"output_scale": 0.5}, {}),
    ],
)
def test_llama_cpp_computes_the_trained_model(tmp_path, family, student, fields):
    run = finished(tmp_path, student, family=family, **{"tie_word_embeddings": False} | fields)
    out = tmp_path / "s.gguf"
    export(run, out, "gguf", dtype="float32")
    engine, model = LlamaCpp(out), open_run(run).load_model()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "teacher")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert engine.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == ids
        ours = student_logits(model, batch_of(torch.tensor([ids])))[0, -1].log_softmax(-1)
        theirs = engine.log_probabilities(ids, len(ours))
        assert theirs.isfinite().all()
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    # step by step through its state, as it writes
    written = engine.ask("/completion", prompt=ids, n_predict=12, temperature=0.0, return_tokens=True, ignore_eos=True)
    for _ in range(12):
        logits = student_logits(model, batch_of(torch.tensor([ids])))[0, -1]
        logits[258] = -torch.inf
        ids = [*ids, int(logits.argmax())]
    assert written["tokens"] == ids[-12:]


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2, LLAMA3 = (rf"{WORDS}|{digits}|{REST}" for digits in (r"\p{N}", r"\p{N}{1,3}"))
MARKS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")


def trained_tokenizer(kind):
    """A tokenizer with merges, of the parts that a published one of its kind has."""
    byte_level = kind != "sentencepiece"
    tokenizer = Tokenizer(models.BPE(**{} if byte_level else {"byte_fallback": True, "unk_token": "<unk>"}))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "smollm"))
    alphabet, bytes_ = pre_tokenizers.ByteLevel.alphabet() if byte_level else [], [f"<0x{i:02X}>" for i in range(256)]
    if not byte_level:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gpt2":
        tokenizer.pre_tokenizer = level
    else:
        regex = {"qwen2": QWEN2, "llama3": LLAMA3}.get(kind)
        first = pre_tokenizers.Split(Regex(regex), "isolated") if regex else pre_tokenizers.Digits(True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    special = [*MARKS, *([] if byte_level else bytes_)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([__doc__, *TEXTS, Path(__file__).read_text(encoding="utf-8")], trainer)
    facts = json.loads(tokenizer.to_str())
    facts["added_tokens"] = [token for token in facts["added_tokens"] if token["content"] in MARKS]
    facts["model"]["ignore_merges"] = kind == "llama3"
    tokenizer = Tokenizer.from_str(json.dumps(facts))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "qwen2", "llama3", "sentencepiece"])
def test_llama_cpp_cuts_texts_as_the_tokenizer(tmp_path, kind):
    tokenizer = trained_tokenizer(kind)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    run = finished(tmp_path, tokenizer=tokenizer, **ends, num_hidden_layers=1)
    export(run, tmp_path / "s.gguf", "gguf")
    engine = LlamaCpp(tmp_path / "s.gguf")
    texts = [
        *(*TEXTS, "DON'T I'LL we've", "  a   b\r\n\r\n c\t\td  ", "१२३ ⅷ ² 1234567", "한국어 ☃", "", " one"),
        *("[INST] Hello[/INST] the answer</s>", "x [INST]y", "def test(x):\n    return x"),
    ]
    for text in texts:
        wanted = tokenizer(text)["input_ids"]
        assert engine.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"] == wanted, text


@pytest.mark.parametrize("dtype", TYPES)
def test_dtypes(run, tmp_path, dtype):
    report = export(run, tmp_path / "s.gguf", "gguf", dtype=dtype)
    result = report["verification"]
    assert result["passed"] and result["max_difference"] < 1e-4 and result["tensors"] == 3 + 3 * 24
    assert result["rounding_kl"] < {"float32": 1e-6, "float16": 1e-4, "bfloat16": 5e-3, "q8_0": 2e-2}[dtype]
    kinds = {str(t.tensor_type.name) for t in GGUFModel(tmp_path / "s.gguf").tensors.values()}
    # blocks of 32 do not divide the 48 columns of the MLPs' last projection
    assert kinds == {"F32", TYPES[dtype][0]} | ({"F16"} if dtype == "q8_0" else set())
    assert verify(tmp_path / "s.gguf", run)["max_difference"] == result["max_difference"]


def test_header(file, run):
    path, report = file
    model = GGUFModel(path)
    record = unsealed(model.field(CONVERSION))
    assert record == {name: value for name, value in report.items() if name != "verification"}
    assert record["checkpoint"] == "step-00000002" and record["student"]["preset"] == "arwkv7"
    assert str(run) not in model.field(CONVERSION) and "/secret/place" not in model.field(CONVERSION)
    assert model.field("general.architecture") == "arwkv7" and model.number("wkv.head_size") == 64
    assert model.field("tokenizer.chat_template") == "{{ x }}"
    assert model.field("tokenizer.ggml.eos_token_id") == 258 and model.field("tokenizer.ggml.bos_token_id") == 256
    tokens, types = model.field("tokenizer.ggml.tokens"), model.field("tokenizer.ggml.token_type")
    assert len(tokens) == 264 and tokens[257] == "<|user|>" and types[255:260] == [NORMAL, *[CONTROL] * 3, UNUSED]


def test_a_finished_run_names_the_command(run):
    commands = [command for command, _ in run_facts(run).next_commands]
    assert f"rwkvinside export {run} --to gguf --out {run}.gguf" in commands


def test_damage_is_noticed(file, run, tmp_path):
    content = bytearray(file[0].read_bytes())
    places = {
        "in the last tensor": (len(content) - 40, 0x55, "tensor .* differs"),
        "in the architecture": (content.index(b"arwkv7", 40), 0x01, "has architecture"),
        "in the name of a field": (content.index(b"arwkv7.block_count"), 0x01, "was not written"),
        "in a number": (content.index(b"arwkv7.block_count") + 22, 0x01, "block_count is not what this version writes"),
        "in the record": (content.index(b"step-00000002") + 5, 0x01, "its record"),
        "in a character": (content.index(b"step-00000002") + 5, 0xE0, "damaged: 'utf-8' codec"),
    }
    for where, (offset, bits, what) in places.items():
        damaged = tmp_path / f"{where}.gguf"
        changed = bytearray(content)
        changed[offset] ^= bits
        damaged.write_bytes(changed)
        with pytest.raises(VerificationError, match=what):
            verify(damaged, run)
    # a tensor's shape: the numbers behind its name
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4
    content[at : at + 16] = content[at + 8 : at + 16] + content[at : at + 8]
    (tmp_path / "shape.gguf").write_bytes(content)
    with pytest.raises(VerificationError, match="tensor blk.0.ffn_up.weight differs"):
        verify(tmp_path / "shape.gguf", run)
    (tmp_path / "short.gguf").write_bytes(content[: len(content) // 2])
    with pytest.raises(VerificationError, match="damaged"):
        verify(tmp_path / "short.gguf", run)
    (tmp_path / "text.gguf").write_text("no file of this kind")
    with pytest.raises(VerificationError, match="not a GGUF file"):
        verify(tmp_path / "text.gguf", run)


def test_merging_that_changes_the_model_is_noticed(run, tmp_path, monkeypatch):
    def merged(model):
        model.canonical_parameters()["model.norm.weight"].data.mul_(1.1)

    monkeypatch.setattr(probe, "adapter_names", lambda model: ["one"])
    monkeypatch.setattr(probe, "make_plain", merged)
    with pytest.raises(VerificationError, match="unpacking and merging changes logits by"):
        export(run, tmp_path / "s.gguf", "gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "student, fields, reasons",
    [
        ({"preset": "cxa079"}, {}, ["mixers rotate .rope", "keys have a residual", "keys have another scale"]),
        ({"window": 8}, {}, ["mixers have windows"]),
        ({"attention_layers": [1]}, {}, ["layer 1 keeps attention"]),
        ({}, {"hidden_size": 96}, ["2 heads of 64 are not the width 96"]),
        (
            {},
            {"hidden_size": 64, "head_dim": 32},
            ["heads have 32 dimensions, .* for 64 and 128 only"],
        ),
        ({}, {"mlp_bias": True}, ["the teacher's MLPs are not those of Llama"]),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, student, fields, reasons):
    run = finished(tmp_path, student, **fields)
    for reason in reasons:
        with pytest.raises(UserError, match=f"llama.cpp does not compute this student: .*{reason}"):
            export(run, tmp_path / "s.gguf", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "teacher"]


def test_options_and_places_are_refused(file, run, tmp_path):
    for name, reason in (("student", "no GGUF file"), ("empty.gguf", "a directory")):
        (tmp_path / "empty.gguf").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{name} is {reason}\nname a new FILE.gguf"):
            export(run, tmp_path / name, "gguf")
    with pytest.raises(UserError, match="none.gguf is not a file"):
        verify(tmp_path / "none.gguf", run)
    with pytest.raises(UserError, match="exports to gguf have no option tie_embeddings"):
        export(run, tmp_path / "s.gguf", "gguf", tie_embeddings=True)
    with pytest.raises(UserError, match="'separate'\na GGUF file has them merged"):
        export(run, tmp_path / "s.gguf", "gguf", adapters="separate")
    with pytest.raises(UserError, match="'int4'\nallowed: float32, float16, bfloat16, q8_0"):
        export_gguf(run, tmp_path / "s.gguf", "int4")
    with pytest.raises(UserError, match="exists"):
        export(run, file[0], "gguf")


class TestVocabulary:
    """Tokenizers of which llama.cpp has the like, and others."""

    def made(self, model, pre_tokenizer=None, normalizer=None, added=(), **options):
        """A tokenizer of parts of a tokenizer.json."""
        parts = {"model": model, "pre_tokenizer": pre_tokenizer, "normalizer": normalizer, "added_tokens": list(added)}
        from tokenizers import Tokenizer

        empty = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None, "decoder": None}
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(empty | parts)), **options)

    BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}

    def config(self, rows, **fields):
        return LlamaConfig(vocab_size=rows, **{"bos_token_id": None, "eos_token_id": None} | fields)

    def split(self, pattern):
        cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [cut, self.LEVEL | {"use_regex": False}]}

    def test_rules_by_which_words_are_cut(self):
        digits = {"type": "Digits", "individual_digits": True}
        level = self.LEVEL | {"use_regex": True}
        for pre_tokenizer, name in (
            (level, "gpt-2"),
            ({"type": "Sequence", "pretokenizers": [digits, level]}, "smollm"),
            (self.split(QWEN2), "qwen2"),
            (self.split(LLAMA3), "llama-bpe"),
        ):
            model = self.BPE | {"ignore_merges": name == "llama-bpe"}
            found = vocabulary(self.made(model, pre_tokenizer), self.config(5))
            assert (found.model, found.pre, found.merges) == ("gpt2", name, ["a b"])
            assert found.tokens[:3] == ["a", "b", "ab"] and found.types == [NORMAL] * 3 + [UNUSED] * 2

    def test_sentencepiece(self):
        words = {"<unk>": 0, "<0x41>": 1, "▁": 2, "a": 3, "▁a": 4, "aa": 5}
        merges = [["▁", "a"], ["a", "a"]]
        model = {"type": "BPE", "vocab": words, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
        steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        made = self.made(model, normalizer={"type": "Sequence", "normalizers": steps})
        found = vocabulary(made, self.config(6, bos_token_id=2, eos_token_id=[5, 4]))
        assert (found.model, found.add_space_prefix, found.merges) == ("llama", True, None)
        assert found.types == [UNKNOWN, BYTE] + [NORMAL] * 4
        assert found.scores[4] > found.scores[5], "what merges first has the higher score"
        assert found.ids == {"bos": 2, "eos": 5, "eot": 5}
        for scheme in ("first", "always"):  # which llama.cpp would follow behind special tokens, too
            cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
            with pytest.raises(UserError, match="puts spaces before words by a pre-tokenizer"):
                vocabulary(self.made(model, cut), self.config(6))

    def test_the_end_of_a_turn_is_the_tokenizers_own(self):
        """Llama 3.1 ends texts by three tokens; Qwen begins them by none, and its configuration names one."""
        made = self.made(self.BPE, self.LEVEL | {"use_regex": True}, eos_token="ab")
        found = vocabulary(made, self.config(3, bos_token_id=1, eos_token_id=[0, 1, 2]))
        assert found.ids == {"bos": 1, "eos": 2, "eot": 2}
        assert vocabulary(made, self.config(3, eos_token_id=2)).ids == {"bos": 2, "eos": 2}

    def test_refusals(self):
        for tokenizer, reason in (
            (self.made(self.BPE, self.split(r"\w+")), "by a rule that llama.cpp does not have"),
            (self.made(self.BPE, self.LEVEL | {"add_prefix_space": True}), "by a rule that llama.cpp does not have"),
            (self.made(self.BPE | {"ignore_merges": True}, self.LEVEL), "ignore_merges is not what llama.cpp does"),
            (self.made(self.BPE, self.LEVEL, {"type": "Lowercase"}), "changes texts .* .Lowercase."),
            (self.made({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "its model is WordLevel"),
            (self.made(self.BPE | {"byte_fallback": True}, normalizer={"type": "NFKC"}), "changes texts"),
        ):
            with pytest.raises(UserError, match=reason):
                vocabulary(tokenizer, self.config(5))
        with pytest.raises(UserError, match="'ab' with id 2, and the model 2 rows"):
            vocabulary(self.made(self.BPE, self.LEVEL), self.config(2))
