"""From the configuration to the rows of a stage: mixtures, streams, validation documents, masks, contradictions."""

import numpy as np
import pytest
import torch
from tiny import save_configuration

from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.data import sources
from rwkvinside.data.mixture import MixedRows
from rwkvinside.data.rows import ShuffledRows, WholeDocuments
from rwkvinside.data.stream import StreamedRows
from rwkvinside.data.token_pack import write_pack
from rwkvinside.data.token_store import TokenStore
from rwkvinside.errors import UserError
from rwkvinside.stages import rows as stage_rows
from rwkvinside.training.process_group import Distributed

WORLD = Distributed("cpu")
STAGE = [
    "run=[align]",
    "stages.align.tokens=40k",
    "stages.align.data.seq_len=64",
    "stages.align.batch.tokens=1024",
]


@pytest.fixture
def teacher(tmp_path):
    return save_configuration(tmp_path / "tiny", num_hidden_layers=2, vocab_size=260)


@pytest.fixture
def data(tmp_path, write_jsonl):
    """Three sources whose texts begin with different letters: 1200 documents, 12, and conversations."""
    asked = {"role": "user", "content": "c question"}
    chats = [{"messages": [asked, {"role": "assistant", "content": f"{i}"}]} for i in range(60)]
    return [
        str(write_jsonl(tmp_path / "a.jsonl", [{"text": f"a {i} " + "x" * (i % 50)} for i in range(1200)])),
        str(write_jsonl(tmp_path / "b.jsonl", [{"text": f"b {i} " + "y" * 30} for i in range(12)])),
        str(write_jsonl(tmp_path / "c.jsonl", chats)),
    ]


@pytest.fixture
def configure(teacher, tmp_path):
    def configure(train, *overrides):
        cache = f"data.cache_dir={tmp_path / 'cache'}"
        return load_config([], teacher=teacher, data=train, out="run", overrides=[*STAGE, cache, *overrides])

    return configure


@pytest.fixture
def load(configure, tokenizer):
    """(tokens, val, rows) of stage align, closed at the end."""
    opened = []

    def load(train, *overrides, stage="align"):
        plan = resolve(configure(train, *overrides), [stage]).stage(stage)
        needed = plan.run.endless_tokens
        tokens, val = sources.tokens_of(plan.run.data, plan.settings.data, needed, tokenizer, 260, WORLD)
        opened.extend(tokens.parts if isinstance(tokens, sources.Mixture) else [tokens])
        return tokens, val, stage_rows.rows_of(plan, tokens)

    yield load
    for part in opened:
        if not isinstance(part, TokenStore):
            part.close()


def share_of(tokenizer, rows, letter, wanted=600):
    """Part of the tokens that stand in documents that begin with a letter."""
    found = []
    for i in range(wanted):
        row = rows.row(i)
        texts = [
            tokenizer.decode(row["input_ids"][row["segment_ids"] == s]) for s in np.unique(row["segment_ids"]) if s
        ]
        found += [(len(text.encode()), letter in text) for text in texts]
    return sum(n for n, mine in found if mine) / sum(n for n, _ in found)


def test_one_pool_without_weights(load, data):
    tokens, val, rows = load(data[:2])
    assert isinstance(tokens, TokenStore) and isinstance(rows, ShuffledRows)
    assert tokens.num_documents + val.num_documents == 1212


@pytest.mark.parametrize("stream", [False, True])
def test_weights_are_shares_of_the_tokens(load, configure, data, tokenizer, stream):
    options = ["data.weights=[1,3]", f"data.stream={str(stream).lower()}", "data.val_fraction=0.1"]
    tokens, val, rows = load(data[:2], *options)
    assert isinstance(rows, MixedRows) and isinstance(rows.parts[1], StreamedRows if stream else ShuffledRows)
    assert share_of(tokenizer, rows, "y") == pytest.approx(0.75, abs=0.02)
    lines, facts = stage_rows.report(resolve(configure(data[:2], *options)).stage("align"), tokens, rows, val)
    assert [one["share"] for one in facts["sources"]] == pytest.approx([0.25, 0.75], abs=0.03)
    assert lines[0].endswith(f" tokens of 2 sources, {val.num_tokens:,} tokens to validate")
    assert "(asked for 75.00%)" in lines[2] and ("streamed" in lines[2] if stream else "epochs of" in lines[2])
    held = {tokenizer.decode(val.piece(i)[0]) for i in range(val.num_documents)}
    seen = {tokenizer.decode(row["input_ids"][row["segment_ids"] == 1]) for row in (rows.row(i) for i in range(900))}
    assert held and not held & seen
    assert rows.batch([3, 1]).rows == (3, 1)
    for wanted, sizes in ((640, [4, 4, 2]), (641, [4, 4, 3])):  # rows of 64; the last one is full
        assert [len(part.rows) for part in stage_rows.sample(rows, wanted, 4, torch.device("cpu"))] == sizes


def test_the_fingerprint_knows_the_data_and_the_shares(load, data):
    prints = [
        load(data[:2]),
        load(data[:2], "data.weights=[1,3]"),
        load(data[:2], "data.weights=[1,2]"),
        load([data[0], data[2]], "data.weights=[1,2]"),
        load(data[:1]),
        load(data[:1], "data.stream=true"),
        load(data[:1], "data.stream=true", "data.val_fraction=0.2"),
        load([data[0], data[2]], "data.weights=[1,2]", "stages.align.data.loss_on=all"),
    ]
    assert len({tokens.fingerprint for tokens, *_ in prints}) == len(prints)
    assert load(data[:2], "data.weights=[2,6]")[0].fingerprint == prints[1][0].fingerprint


def test_an_endless_source_is_read_as_far_as_the_longest_stage_that_runs(load, tmp_path, write_jsonl):
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "train.jsonl", [{"text": f"{i} " + "x" * 90} for i in range(4000)])

    def read(*overrides, stage="align"):
        """Tokens that were made, and the identity of those to train on."""
        tokens, _, _ = load(
            [f"hub:{tmp_path / 'hub'}"], "data.val_tokens=1k", "stages.long.tokens=100k", *overrides, stage=stage
        )
        return len(tokens.tokens), tokens.fingerprint

    short, both = read(), read("run=[align,long]")
    assert 40_000 < short[0] < 50_000 and 100_000 < both[0] < 130_000
    assert read("run=[align,long]", stage="long") == both  # one identity for all that run, so each resumes alone
    assert read("stages.long.tokens=200k", "stages.sft.tokens=300k") == short  # what does not run changes nothing
    alone = read(stage="long")
    assert alone == both and read(stage="long") == alone  # later, by itself: as far as it needs
    assert read("stages.long.tokens=1k", stage="long") == short  # no less than the run did


@pytest.mark.parametrize("stream", ["true", "false"])
def test_loss_on_completions_or_on_all(load, data, stream):
    masked, _, rows = load(data[2:], f"data.stream={stream}", "data.val_fraction=0.2")
    batch = rows.batch(range(3))
    assert 0 < batch.num_targets < batch.num_tokens / 2
    whole, _, rows = load(data[2:], f"data.stream={stream}", "data.val_fraction=0.2", "stages.align.data.loss_on=all")
    batch = rows.batch(range(3))
    assert batch.num_targets > 0.9 * batch.num_tokens
    assert masked.fingerprint != whole.fingerprint


def test_a_stage_has_its_own_mixture(load, data):
    own = [f"stages.align.data.train=[{data[0]},{data[1]}]", "stages.align.data.weights=[1,1]"]
    tokens, _, _ = load(data[2:], *own)
    assert isinstance(tokens, sources.Mixture) and tokens.sources == tuple(data[:2])
    assert isinstance(load(data[2:], *own, stage="distill")[0], TokenStore)


def test_whole_documents_in_rows_for_sft(load, data):
    sft = ["run=[sft]", "stages.sft.tokens=4k", "stages.sft.data.seq_len=64", "stages.sft.batch.tokens=512"]
    _, _, rows = load(data[2:], *sft, "data.val_fraction=0.2", stage="sft")
    assert isinstance(rows, WholeDocuments)
    _, _, rows = load(data, *sft, "data.weights=[1,1,2]", "data.stream=true", "data.val_fraction=0.2", stage="sft")
    tokens = np.array(rows.tokens_of(400))
    assert tokens / tokens.sum() == pytest.approx([0.25, 0.25, 0.5], abs=0.02)
    assert int(rows.batch(range(20)).segment_ids.max()) > 1


@pytest.mark.parametrize("sft", [False, True])
def test_a_leading_text_is_real_tokens_in_one_row(load, data, sft):
    """Of short documents as many as it takes, of long rows a part; each document by itself."""
    more = ["stages.align.objective=sft", "stages.align.train=[mixer]"] if sft else []
    _, _, rows = load([data[2] if sft else data[0]], *more)
    for tokens in (50, 200):
        text = stage_rows.leading_text(rows, tokens)
        assert text.input_ids.shape == text.labels.shape == (1, tokens) and text.mask.all()
        ids, positions, segments = text.input_ids[0], text.position_ids[0], text.segment_ids[0]
        first = rows.batch([0])
        known = min(tokens, int(first.mask[0].sum()))
        assert torch.equal(ids[:known], first.input_ids[0, :known])
        begins = torch.cat([torch.tensor([True]), segments[1:] != segments[:-1]])
        assert torch.equal(positions == 0, begins) and torch.equal(segments, begins.cumsum(0).int())
    everything = stage_rows.leading_text(rows, 10**6)
    assert everything.num_tokens == rows.tokens_in(rows.rows_per_epoch)


def test_validation_documents_come_from_every_source_in_proportion(load, data, tokenizer):
    _, val, _ = load(data, "data.weights=[2,1,1]", "data.val_fraction=0.3", "data.val_tokens=800")
    texts = [tokenizer.decode(val.piece(i)[0]) for i in range(val.num_documents)]
    assert {letter for letter in "xyq" if any(letter in text for text in texts)} == set("xyq")
    assert 500 < val.num_tokens <= 800


@pytest.mark.parametrize(
    "overrides, cause",
    [
        (["data.weights=[1]"], "has 1 weights for 2 sources in train"),
        (["data.weights=[1,0]"], "data.weights.1 = 0: must be greater than 0"),
        (["data.stream=true"], "stream reads one source after the other"),
        (["stages.align.data.weights=[1,2]"], "has 2 weights for 0 sources in train"),
    ],
)
def test_contradictions_are_refused_when_the_configuration_is_read(configure, data, overrides, cause):
    with pytest.raises(UserError) as caught:
        configure(data[:2], *overrides)
    assert cause in str(caught.value)


def test_what_only_the_data_can_say(load, configure, data, tmp_path, write_jsonl):
    with pytest.raises(UserError, match="data.stream reads one source after the other, and a stage names 2"):
        load(data[:1], "data.stream=true", f"stages.align.data.train=[{data[0]},{data[1]}]")
    with pytest.raises(UserError, match="takes none of the documents at the beginning"):
        load(data[1:2], "data.stream=true", "data.val_fraction=0.0001")
    with pytest.raises(UserError, match="takes all of"):
        load(data[:2], "data.weights=[1,1]", "data.val_fraction=0.9999")
    write_pack(load(data[:1])[0], tmp_path / "packed", {"tokenizer": "f" * 64, "tokenizer_name": "World"})
    with pytest.raises(UserError, match=r"packed was made with the tokenizer World \(SHA-256 ffffffffffff\), not with"):
        load([data[0], str(tmp_path / "packed")], "data.weights=[1,1]", "data.stream=true")
    high = str(write_jsonl(tmp_path / "high.jsonl", [{"input_ids": [1, 2, 300]}]))
    for options in (["data.weights=[1,1]"], ["data.weights=[1,1]", "data.stream=true"], []):
        with pytest.raises(UserError, match="id 300, but the teacher's vocabulary has 260 entries"):
            load([data[0], high], *options)


def test_the_plan_describes_the_data(configure, data):
    def said(train, *overrides):
        config = configure(train, *overrides)
        return sources.describe(config.data, config.stages["align"].data)

    a, b, _ = data
    assert said([]) == "none given yet (--data)"
    assert said([a, b]) == f"{a}, {b}"
    assert said([a, "hub:x/y", "no.jsonl"]) == f"{a}, hub:x/y, no.jsonl; NOT FOUND: no.jsonl"
    assert said([a, b], "data.weights=[1,3]", "data.stream=true", "stages.align.data.loss_on=all") == (
        f"{a} 25 %, {b} 75 % of the tokens; streamed in blocks of 4,000,000 tokens; "
        "every token of conversations is a target"
    )
