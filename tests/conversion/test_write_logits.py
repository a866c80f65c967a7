"""`rwkvinside data logits` and training on what it wrote: right, resumable, and refused when anything differs."""

import json
import os
import random
import re
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_qwen3
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import train_distill
from rwkvinside.cli.main import main
from rwkvinside.config.load import load_config
from rwkvinside.config.resolve import resolve
from rwkvinside.conversion.write_logits import distillation_plan, write_logits
from rwkvinside.data.sources import tokens_of
from rwkvinside.errors import Interrupted, UserError
from rwkvinside.stages.rows import rows_of
from rwkvinside.stages.teacher import build_teacher, check_teacher, online_teacher
from rwkvinside.support.digests import FileDigests
from rwkvinside.support.lock import locked
from rwkvinside.support.sealed import sealed_text, unsealed
from rwkvinside.teacher.kinds import TeacherKind
from rwkvinside.teacher.load import open_tokenizer
from rwkvinside.teacher.logits_store import LogitsReader, LogitsWriter
from rwkvinside.training.process_group import Distributed

K = 8
SHARD_BYTES = 4 * 32 * (4 * K + 2 * (K + 1))  # four rows
STAGE = [
    "run=[distill]",
    "stages.distill.tokens=384",
    "stages.distill.data.seq_len=32",
    "stages.distill.batch.tokens=128",
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny Qwen3 with a tokenizer of bytes, a wider one of the same family, and texts."""
    root = tmp_path_factory.mktemp("material")
    tokenizer = byte_tokenizer("<eos>", eos_token="<eos>")
    for name, width, vocab in (("teacher", 16, 257), ("wide", 32, 264)):
        sizes = {"hidden_size": width, "vocab_size": vocab, "num_hidden_layers": 2, "initializer_range": 0.3}
        save_qwen3(root / name, tokenizer, seed=width, **sizes)
    rng, words = random.Random(0), ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog"]
    for name, count in (("train", 60), ("val", 4), ("other", 60)):
        texts = [" ".join(rng.choices(words, k=9)) for _ in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def arguments(material, *more):
    files = ["--teacher", material / "teacher", "--data", material / "train.jsonl", "--val", material / "val.jsonl"]
    return [*map(str, files), *STAGE, f"data.cache_dir={material / 'cache'}", *map(str, more)]


def configured(material, *more, teacher="teacher", data="train"):
    return load_config(
        teacher=str(material / teacher),
        data=[str(material / f"{data}.jsonl")],
        val=[str(material / "val.jsonl")],
        overrides=[*STAGE, f"data.cache_dir={material / 'cache'}", *map(str, more)],
    )


def rows_and_tokenizer(config):
    plan, tokenizer = distillation_plan(config, "distill"), open_tokenizer(config.teacher)
    data, needed = plan.settings.data, plan.run.endless_tokens
    tokens, _ = tokens_of(plan.run.data, data, needed, tokenizer, 257, Distributed("cpu"))
    return rows_of(plan, tokens), tokenizer


@pytest.fixture(scope="module")
def written(material):
    """Logits of all 12 rows in three shards."""
    out = material / "logits"
    write_logits(distillation_plan(configured(material), "distill"), out, K, SHARD_BYTES)
    return out


@pytest.fixture
def copied(written, tmp_path):
    return shutil.copytree(written, tmp_path / "logits")


def cached(material, out, *more, **kwargs):
    config = configured(
        material, "stages.distill.teacher=cache", f"stages.distill.teacher_cache={out}", *more, **kwargs
    )
    rows, tokenizer = rows_and_tokenizer(config)
    plan, world = distillation_plan(config, "distill"), Distributed("cpu")
    return build_teacher(plan, TeacherKind.OFFLINE, tokenizer, rows, world, FileDigests()), rows


def test_every_position_has_the_likeliest_tokens_of_the_teacher(material, written):
    assert sorted(f.name for f in written.iterdir()) == [
        "digests.json",
        "index.json",
        *(f"logits-0000{i}.safetensors" for i in range(3)),
    ]
    teacher, rows = cached(material, written)
    lm = AutoModelForCausalLM.from_pretrained(material / "teacher")
    for numbers in ([0, 1], [3, 4, 11], [6]):  # within a shard, across shards
        batch = rows.batch(numbers)
        (chunk,) = teacher.signal(None, batch).chunks(batch.num_targets)
        target = chunk.distribution(slice(None), 257, 1.0)
        expected = []
        for row, segments, labels in zip(batch.input_ids, batch.segment_ids, batch.labels, strict=True):
            for document in range(1, int(segments.max()) + 1):  # each document alone
                here = segments == document
                with torch.no_grad():
                    found = lm(input_ids=row[here][None]).logits[0].log_softmax(-1)
                expected.append(found[labels[here] != -100])
        log_p = torch.cat(expected)
        top, ids = log_p.topk(K)
        rest = (1 - top.exp().sum(-1)).log()
        assert torch.equal(target.ids, ids) and torch.equal(target.best, log_p.argmax(-1))
        kept = torch.cat([top, rest[:, None]], -1)
        kl = (kept.exp() * (kept - target.log_probs)).sum(-1)
        assert kl.abs().max() < 1e-5  # fp16 on disk


def test_a_larger_vocabulary_of_the_teacher_is_cut(material, tmp_path):
    more = [f"stages.distill.teacher_model.path={material / 'wide'}", "stages.distill.loss.temperature=2"]
    write_logits(distillation_plan(configured(material, *more), "distill"), tmp_path / "logits", K)
    teacher, rows = cached(material, tmp_path / "logits", *more)
    batch = rows.batch([5])
    (chunk,) = teacher.signal(None, batch).chunks(batch.num_targets)
    target = chunk.distribution(slice(None), 257, 2.0)
    lm = AutoModelForCausalLM.from_pretrained(material / "wide")
    first = (batch.segment_ids[0] == 1) & (batch.labels[0] != -100)
    with torch.no_grad():
        logits = lm(input_ids=batch.input_ids[:, batch.segment_ids[0] == 1]).logits[0, : int(first.sum()), :257]
    top, ids = (logits / 2).log_softmax(-1).topk(K)
    assert target.vocab == 257 and torch.equal(target.ids[: len(ids)], ids)
    assert torch.allclose(target.log_probs[: len(ids), :-1], top, atol=5e-3)


def test_a_quantized_teacher_of_another_size(material):
    """Every linear layer but the head; its logits move by what nf4 rounds, and not more."""
    path = f"stages.distill.teacher_model.path={material / 'wide'}"
    found = []
    for more in ([path], [path, "stages.distill.teacher_model.quantize=nf4"]):
        config = configured(material, *more)
        teacher = online_teacher(distillation_plan(config, "distill"), Distributed("cpu"))
        batch = rows_and_tokenizer(config)[0].batch([0])
        (chunk,) = teacher.signal(None, batch).chunks(batch.num_targets)
        found.append(chunk.distribution(slice(None), 257, 1.0).log_probs)
    kinds = {type(module).__name__ for name, module in teacher.module.lm.model.named_modules() if "_proj" in name}
    assert kinds == {"QuantizedLinear"} and type(teacher.module.lm.lm_head) is torch.nn.Linear
    kl = (found[0].exp() * (found[0] - found[1])).sum(-1).mean()
    assert 1e-4 < kl < 0.3


def test_killed_at_any_moment_it_goes_on_with_whole_shards(material, written, tmp_path):
    out = tmp_path / "logits"
    if (child := os.fork()) == 0:  # dies between a shard's name and the index that knows it
        calls = []
        write = LogitsWriter._write

        def dying(self, name, content):
            if len(calls) == 4:
                (self.path / ".half.unfinished").write_bytes(content[:10])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(name)
            write(self, name, content)

        LogitsWriter._write = dying
        write_logits(distillation_plan(configured(material), "distill"), out, K, SHARD_BYTES)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    index = json.loads((out / "index.json").read_text())
    assert len(index["shards"]) == 1 and len(list(out.glob("logits-*"))) == 2
    with pytest.raises(UserError, match="incomplete: 4 of 12 rows\nrun the same"):
        cached(material, out)
    before = (out / "logits-00000.safetensors").stat().st_mtime_ns
    write_logits(distillation_plan(configured(material), "distill"), out, K, SHARD_BYTES)
    assert (out / "logits-00000.safetensors").stat().st_mtime_ns == before
    assert (out / "index.json").read_bytes() == (written / "index.json").read_bytes()
    assert cached(material, out)


def test_more_rows_of_the_same_stage_are_added(material, copied):
    more = configured(material, "stages.distill.tokens=640")
    write_logits(distillation_plan(more, "distill"), copied, K, SHARD_BYTES)
    assert len(json.loads((copied / "index.json").read_text())["shards"]) == 5
    LogitsReader(copied).require(20)
    assert cached(material, copied)  # and the shorter stage can use them too


def test_more_ranks_than_rows_in_a_step_need_more_rows(material, tmp_path, capsys):
    """Left out, `batch.tokens` has a row for every rank: 12 steps of one row are 3 of 5."""
    given = [word for word in arguments(material) if not word.startswith("stages.distill.batch")]
    write = ["data", "logits", *given, "--out", str(tmp_path / "logits"), f"--k={K}"]
    assert main(write) == 0
    overrides = [*given[6:], "stages.distill.teacher=cache", f"stages.distill.teacher_cache={tmp_path / 'logits'}"]
    config = load_config(teacher=given[1], data=[given[3]], val=[given[5]], overrides=overrides)
    tokenizer, digests = open_tokenizer(config.teacher), FileDigests()
    check_teacher(resolve(config).stage("distill"), tokenizer, digests)
    plan = resolve(config, ranks=5).stage("distill")
    with pytest.raises(UserError) as error:
        check_teacher(plan, tokenizer, digests)
    assert error.value.cause.endswith("are of 12 rows, and the steps of stage distill read 15: 3 of 5")
    more = re.findall(r"stages\.\S+", error.value.hint)
    assert more == ["stages.distill.tokens=384", "stages.distill.batch.tokens=160"]
    assert main([*write, *more]) == 0  # as the hint says
    check_teacher(plan, tokenizer, digests)
    assert main([*write[:-2], str(tmp_path / "others"), write[-1], "--ranks=5"]) == 0
    shards = [json.loads((tmp_path / name / "index.json").read_text())["shards"] for name in ("logits", "others")]
    assert shards[0] == shards[1] and "15 of 15 rows" in capsys.readouterr().out


def test_ctrl_c_and_a_full_disk_keep_what_is_done(material, tmp_path, monkeypatch):
    out, config = tmp_path / "logits", configured(material)
    write = LogitsWriter.write

    def interrupted(self, part, *tensors):
        if part.start == 4:
            raise KeyboardInterrupt
        write(self, part, *tensors)

    monkeypatch.setattr(LogitsWriter, "write", interrupted)
    with pytest.raises(Interrupted, match="4 of 12 rows"):
        write_logits(distillation_plan(config, "distill"), out, K, SHARD_BYTES)
    monkeypatch.undo()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # less than a shard, as a full disk would cut it
    try:
        with pytest.raises(UserError, match="logits cannot be written to .*\nrun the same"):
            write_logits(distillation_plan(config, "distill"), out, K, SHARD_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(out.glob(".*"))
    write_logits(distillation_plan(config, "distill"), out, K, SHARD_BYTES)
    assert cached(material, out)


@pytest.mark.parametrize(
    "more, kwargs, part",
    [
        (["seed=1"], {}, "seed 0 there, 1 here"),
        (["stages.distill.data.seq_len=64"], {}, "row length 32 there, 64 here"),
        (["stages.distill.loss.temperature=2"], {}, "temperature 1.0 there, 2.0 here"),
        (["stages.distill.teacher_model.path={wide}"], {}, "teacher '"),
        (["stages.distill.teacher_model.quantize=nf4"], {}, "teacher's quantization None there, 'nf4' here"),
        ([], {"teacher": "retrained"}, "teacher '"),
        ([], {"teacher": "rescaled"}, "teacher's configuration '"),
        ([], {"teacher": "chatty"}, "tokenizer '"),
        ([], {"data": "other"}, "data '"),
    ],
)
def test_a_cache_of_something_else_is_refused_with_the_reason(material, written, more, kwargs, part):
    if kwargs.get("teacher") == "retrained" and not (material / "retrained").exists():
        shutil.copytree(material / "teacher", material / "retrained")
        weights = load_file(material / "retrained" / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-3
        save_file(weights, material / "retrained" / "model.safetensors", {"format": "pt"})
    if kwargs.get("teacher") == "rescaled" and not (material / "rescaled").exists():
        shutil.copytree(material / "teacher", material / "rescaled")
        file = material / "rescaled" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 1e-2}))
    if kwargs.get("teacher") == "chatty" and not (material / "chatty").exists():
        shutil.copytree(material / "teacher", material / "chatty")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(material / "chatty")
        tokenizer.add_tokens(["<tool>"])
        tokenizer.save_pretrained(material / "chatty")
    with pytest.raises(UserError) as error:
        cached(material, written, *(text.format(wide=material / "wide") for text in more), **kwargs)
    assert part in error.value.cause and "\n" not in error.value.cause and "data logits" in error.value.hint


@pytest.mark.parametrize("more, kwargs, part", [(["seed=1"], {}, "seed 0 there"), ([], {"data": "other"}, "data '")])
def test_of_something_else_comes_before_incomplete(material, copied, more, kwargs, part):
    (copied / "logits-00001.safetensors").unlink()
    index = unsealed((copied / "index.json").read_text())
    del index["shards"]["logits-00002.safetensors"]
    (copied / "index.json").write_text(sealed_text(index))
    with pytest.raises(UserError, match=f"are not those of this run: {part}"):
        cached(material, copied, *more, **kwargs)
    with pytest.raises(UserError, match="missing"):
        cached(material, copied)


def test_one_process_at_a_time_writes(material, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    with locked(copied), pytest.raises(UserError, match=f"logits is in use by process {os.getpid()} on "):
        write_logits(distillation_plan(configured(material), "distill"), copied, K, SHARD_BYTES)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


def test_an_index_that_names_a_file_elsewhere_is_refused(material, copied):
    file = copied / "index.json"
    named = json.dumps(unsealed(file.read_text())).replace("logits-00001.safetensors", "../logits-00001.safetensors")
    file.write_text(sealed_text(json.loads(named)))
    with pytest.raises(UserError, match="index.json names the file '../logits-00001.safetensors'"):
        LogitsReader(copied)


def test_a_cache_of_an_earlier_version_says_less_of_its_teacher(material, copied):
    index = unsealed((copied / "index.json").read_text())
    del index["identity"]["teacher's configuration"]
    (copied / "index.json").write_text(sealed_text(index))
    assert cached(material, copied)


def test_more_tokens_a_position_than_there_are(material, written):
    assert cached(material, written, f"stages.distill.loss.top_k={K}")
    with pytest.raises(UserError, match=f"have {K} tokens a position, and stages.distill.loss.top_k is 9"):
        cached(material, written, "stages.distill.loss.top_k=9")


def test_damage_is_refused_in_one_line(material, copied):
    shard = copied / "logits-00001.safetensors"
    content = bytearray(shard.read_bytes())

    def read_both_shards():
        teacher, rows = cached(material, copied)
        teacher.signal(None, rows.batch([0]))
        teacher.signal(None, rows.batch([5]))

    def refused(pattern):
        with pytest.raises(UserError, match=pattern) as error:
            read_both_shards()
        assert "\n" not in error.value.cause

    content[-100] ^= 1
    shard.write_bytes(content)
    refused("logits-00001.safetensors is corrupt: its SHA-256")
    shard.write_bytes(content[:-1])
    refused("logits-00001.safetensors is missing or does not have the")
    shard.unlink()
    refused("logits-00001.safetensors is missing")
    (copied / "index.json").write_text('{"format": 1}')
    refused("index.json is damaged")
    (copied / "index.json").unlink()
    refused("there are no logits in")


def test_a_damaged_shard_is_written_again(material, copied, written):
    shard = copied / "logits-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (copied / ".logits-00002.safetensors.unfinished").write_bytes(b"of a killed process")
    write_logits(distillation_plan(configured(material), "distill"), copied, K, SHARD_BYTES)
    assert shard.read_bytes() == (written / shard.name).read_bytes()
    assert {file.name for file in copied.iterdir()} == {file.name for file in written.iterdir()}


def test_what_a_kill_left_in_an_empty_directory_is_no_obstacle(material, tmp_path):
    out = tmp_path / "logits"
    out.mkdir()
    (out / ".index.json.unfinished").write_text("{")
    writer = LogitsWriter(out, {}, k=1, vocab=8, rows=2, rows_per_shard=1)
    assert len(writer.missing()) == 2 and [file.name for file in out.iterdir()] == ["index.json"]


def test_a_row_that_has_changed_is_refused_when_it_is_used(material, written):
    teacher, rows = cached(material, written)
    batch = rows.batch([2])
    batch.input_ids[0, 7] += 1
    with pytest.raises(UserError, match="row 2 of the data is not the one whose logits are in"):
        teacher.signal(None, batch)


def test_what_writing_refuses(material, written, tmp_path, capsys):
    config = configured(material)
    for k in (0, 257):
        with pytest.raises(UserError, match=f"--k {k}\nallowed: 1 to 256"):
            write_logits(distillation_plan(config, "distill"), tmp_path / "new", k)
    with pytest.raises(UserError, match="k 8 there, 9 here"):
        write_logits(distillation_plan(config, "distill"), written, 9)
    with pytest.raises(UserError, match="seed 0 there, 1 here"):
        write_logits(distillation_plan(configured(material, "seed=1"), "distill"), written, K, SHARD_BYTES)
    with pytest.raises(UserError, match="'align' is not a stage that follows a teacher"):
        write_logits(distillation_plan(config, "align"), tmp_path / "new", K)
    arguments = ["data", "logits", "--teacher", str(material / "wide"), "--stage"]
    assert [main([*arguments, name]) for name in ("distill", "nope")] == [2, 2]
    said = capsys.readouterr().err
    assert "name a directory with --out, or stages.distill.teacher_cache" in said
    assert "'nope' is not a stage that follows a teacher" in said
    longer = [*arguments, "long", "run=[align]", "stages.long.data.seq_len=9999"]
    assert main(longer) == 2 and "seq_len = 9999: is longer than the 128 positions" in capsys.readouterr().err
    (tmp_path / "something").write_text("")
    with pytest.raises(UserError, match="not empty and holds no logits"):
        write_logits(distillation_plan(config, "distill"), tmp_path, K)


def test_a_second_teacher_of_another_tokenizer_is_refused(material, tmp_path):
    shutil.copytree(material / "wide", tmp_path / "foreign")
    tokenizer = json.loads((tmp_path / "foreign" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "foreign" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = configured(material, f"stages.distill.teacher_model.path={tmp_path / 'foreign'}")
    with pytest.raises(UserError, match=f"has another tokenizer than .*: token 'a' is {vocab['a']} there"):
        check_teacher(distillation_plan(config, "distill"), open_tokenizer(config.teacher), FileDigests())
    fine = configured(material, f"stages.distill.teacher_model.path={material / 'wide'}")
    check_teacher(distillation_plan(fine, "distill"), open_tokenizer(fine.teacher), FileDigests())


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping = 30.0, which is not computed here"),
        ({"logit_scale": 0.5}, "has logit_scale = 0.5"),
        ({"num_attention_heads": 0}, "its configuration has num_attention_heads = 0"),
        ({"quantization_config": {"quant_method": "awq"}}, "is already quantized .awq."),
        ({"hidden_size": 64}, "has shape .*, the configuration wants"),
    ],
)
def test_a_second_teacher_that_is_not_computed_right_is_refused(material, tmp_path, capsys, fields, said):
    """For training and for logits on disk, before anything is tokenized or written."""
    second = tmp_path / "second"
    shutil.copytree(material / "wide", second)
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | fields))
    more = arguments(material, f"stages.distill.teacher_model.path={second}", f"data.cache_dir={tmp_path / 'cache'}")
    for verb in (["train"], ["data", "logits"]):
        assert main([*verb, *more, "--out", str(tmp_path / "out"), "device=cpu"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and re.search(f"error: .*second.*{said}", lines[0]), lines
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, problem",
    [
        (["stages.distill.teacher=cache"], "teacher cache needs teacher_cache"),
        (["stages.distill.teacher_cache=/x"], "read by teacher cache only, not auto"),
        (["stages.distill.teacher=same", "stages.distill.teacher_model.quantize=nf4"], "leave out teacher_model"),
        (["stages.align.teacher=separate"], "objective align has no choice of teacher"),
        (["stages.sft.loss.divergence=js"], "objective sft has no divergence"),
    ],
)
def test_contradictions(material, more, problem):
    with pytest.raises(UserError, match=problem):
        configured(material, *more)


def test_training_on_stored_logits_is_training_on_the_teachers_top_k(material, tmp_path, capsys):
    """Through the commands; the same losses as with the teacher at hand, to what fp16 rounds."""

    def train(out, *more):
        assert train_distill.main(arguments(material, "--out", out, "log_every=1", *more)) == 0
        found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [row for row in found if row["kind"] == "train"], [row for row in found if row["kind"] == "eval"]

    logits = tmp_path / "logits"
    assert main(["data", "logits", *arguments(material, "--out", logits, "--k", K)]) == 0
    assert "12 of 12 rows are in" in capsys.readouterr().out
    at_hand, judged = train(tmp_path / "at_hand", "stages.distill.teacher=separate", f"stages.distill.loss.top_k={K}")
    stored, alone = train(tmp_path / "stored", "stages.distill.teacher=cache", f"stages.distill.teacher_cache={logits}")
    assert len(stored) == 3 and [row["loss"] for row in stored] == pytest.approx(
        [row["loss"] for row in at_hand], rel=1e-4
    )
    assert alone[-1]["ce"] == pytest.approx(judged[-1]["ce"], rel=1e-4) and "kl" not in alone[-1]
    config = load_config([tmp_path / "stored" / "config.yaml"])
    assert config.stages["distill"].teacher_cache == str(logits)
    code = train_distill.main(
        arguments(material, "--out", tmp_path / "no", "stages.distill.teacher=cache", "seed=5")
        + [f"stages.distill.teacher_cache={logits}"]
    )
    assert code == 2 and "seed 0 there, 5 here" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
