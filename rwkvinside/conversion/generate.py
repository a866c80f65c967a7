"""Text that a teacher writes itself, as data to train on: `rwkvinside data generate`.

A chat model is given the beginning of a user's turn and writes what a user might say, then answers it (as in Magpie,
arXiv 2406.08464). Other models continue from the token that begins a text, or from given beginnings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.precision import resolve_device, resolve_precision, teacher_dtype
from ..config.teacher_lookup import find_teacher
from ..errors import Interrupted, UserError
from ..support.digests import FileDigests
from ..support.files import fsync, read_lines, replacing
from ..support.progress import Progress
from ..support.quiet import quiet_libraries
from ..teacher.files import local_hashes
from ..teacher.load import load_teacher, open_tokenizer
from ..teacher.sampling import Advance, Sampling, UserTurn, encode, end_tokens, render_chat, sample, text_start
from ..teacher.settings import TeacherConfig

FORMAT = 1
QUESTION_TOKENS = 128  # of a user's turn, at most
SILENT_BATCHES = 20  # in a row without a text, after which a teacher is given up

Writer = Callable[[list[str | None], Advance], tuple[list[dict], int]]
"""From a batch's prompts (None: the model's own) to its records and the number of tokens that the model wrote."""


def generate_text(
    teacher: str,
    out: Path,
    tokens: int,
    sampling: Sampling,
    *,
    plain: bool = False,
    prompts: Path | None = None,
    device: str = "auto",
) -> None:
    """Write a .jsonl file of texts or conversations by a teacher, or the rest of one that was interrupted.

    The file appears when it is complete. Until then every finished batch is kept in a file beside it, and the same
    command goes on from there; the result is the same as without interruption.

    Args:
        teacher: preset, directory or hub id.
        out: .jsonl file; must not exist.
        tokens: that the teacher is to write in all; the last batch is a full one.
        sampling: how.
        plain: texts even where the tokenizer has a chat template.
        prompts: file with one beginning of a text, or one user's turn, per line, used in order, again and again.
        device: "auto", "cpu" or "cuda".

    Raises:
        UserError: whatever is wrong with the input; `Interrupted` by ctrl-C, with whole batches kept.
    """
    if out.suffix != ".jsonl":
        raise UserError(f"output {out} does not end in .jsonl", "name a .jsonl file")
    if out.exists():
        raise UserError(f"output {out} exists", "remove it, or name another file")
    given = None if prompts is None else read_lines(prompts, "prompts")
    info = find_teacher(teacher)
    tokenizer = open_tokenizer(TeacherConfig(path=info.path))
    chat = bool(tokenizer.chat_template) and not plain
    longest = max((len(encode(tokenizer, prompt)) for prompt in given or ()), default=QUESTION_TOKENS if chat else 0)
    if longest + sampling.max_tokens > info.max_positions:
        cause = f"prompts of up to {longest} tokens and max_tokens {sampling.max_tokens} are too long together"
        raise UserError(cause, f"the teacher was made for {info.max_positions}: lower --max-tokens")
    model = _load(info.path, resolve_device(device))
    write = _conversations(model, tokenizer, sampling) if chat else _texts(model, tokenizer, sampling)
    identity = {
        "format": FORMAT,
        "teacher": local_hashes(info.path, None, FileDigests())[0],
        "tokens": tokens,
        **asdict(sampling),
        "kind": "messages" if chat else "text",
        "prompts": given,
    }
    try:
        count = _write_file(out, identity, tokens, sampling, given, write)
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped writing {out}", "the same command again goes on") from error
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}", "free space, or name another file") from error
    print(f"{out}: {count:,} {'conversations' if chat else 'texts'}; train on it with --data {out}")


def _load(path: str, device: str) -> PreTrainedModel:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but PyTorch finds no CUDA device", "use --device cpu")
    quiet_libraries()
    dtype = teacher_dtype("auto", device, resolve_precision("auto", device))
    return load_teacher(path, None, dtype).to(device)  # type: ignore[arg-type]  # of transformers


def _write_file(
    out: Path, identity: dict, tokens: int, sampling: Sampling, given: list[str] | None, write: Writer
) -> int:
    """Write what is missing of the file, batch by batch, and put it in its place.

    Args:
        identity: settings that must be the same when an interrupted file goes on.
        given: prompts in order; None: none.
        write: makes a batch.

    Returns:
        The number of its records.
    """
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    batches, done = _begin(partial, identity)
    with Progress("writing", tokens, unit="tokens", done=min(done, tokens), stream=sys.stdout) as progress:
        _add_batches(partial, batches, done, tokens, sampling, given, write, progress)
    return _publish(partial, out)


def _add_batches(
    partial: Path,
    batches: int,
    done: int,
    tokens: int,
    sampling: Sampling,
    given: list[str] | None,
    write: Writer,
    progress: Progress,
) -> None:
    """Add batches to the unfinished file, of `batches` and `done` tokens, until it has `tokens`."""
    silent = 0
    with partial.open("a", encoding="utf-8") as file:
        while done < tokens:
            chosen: list[str | None] = [None] * sampling.rows
            if given is not None:
                first = batches * sampling.rows
                chosen = [given[(first + i) % len(given)] for i in range(sampling.rows)]
            with torch.random.fork_rng():
                torch.manual_seed(sampling.seed * 1_000_003 + batches)
                records, count = write(chosen, progress.advance)
            silent = 0 if records else silent + 1
            if silent == SILENT_BATCHES:
                raise UserError(f"the teacher wrote nothing in {silent * sampling.rows} texts", "try --plain")
            file.write(json.dumps({"tokens": count, "records": records}, ensure_ascii=False) + "\n")
            file.flush()
            fsync(partial)
            batches, done = batches + 1, done + count
            progress.update(min(done, tokens))


def _texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Writer:
    end = end_tokens(tokenizer, model)

    def write(prompts: list[str | None], advance: Advance) -> tuple[list[dict], int]:
        starts = [text_start(tokenizer) if each is None else tokenizer(each)["input_ids"] for each in prompts]
        written = sample(model, starts, end, sampling.max_tokens, sampling, advance)
        texts = (
            (p or "") + tokenizer.decode(ids, skip_special_tokens=True) for p, ids in zip(prompts, written, strict=True)
        )
        return [{"text": text} for text in texts if text.strip()], sum(map(len, written))

    return write


def _conversations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> Writer:
    turn = UserTurn.of(tokenizer, model)

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    def write(prompts: list[str | None], advance: Advance) -> tuple[list[dict], int]:
        count = 0
        questions = [each for each in prompts if each is not None]
        if not questions:
            written = sample(model, [turn.before] * len(prompts), turn.end, QUESTION_TOKENS, sampling, advance)
            count += sum(map(len, written))
            questions = [question for question in map(text, written) if question]
        if not questions:
            return [], count
        asked = [[{"role": "user", "content": question}] for question in questions]
        starts = [encode(tokenizer, render_chat(tokenizer, each, add_generation_prompt=True)) for each in asked]
        written = sample(model, starts, turn.end, sampling.max_tokens, sampling, advance)
        count += sum(map(len, written))
        answers = map(text, written)
        return [
            {"messages": [*question, {"role": "assistant", "content": answer}]}
            for question, answer in zip(asked, answers, strict=True)
            if answer
        ], count

    return write


def _begin(partial: Path, identity: dict) -> tuple[int, int]:
    """Make the unfinished file, or cut a half-written batch off its end.

    Returns:
        How many batches it has, and how many tokens the teacher wrote for them.

    Raises:
        UserError: it was begun with other settings, or is damaged.
    """
    whole = 0
    batches = tokens = 0
    if partial.exists():
        with partial.open("rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                values = _parsed(partial, line)
                if number == 0:
                    _same(partial, values, identity)
                else:
                    batches, tokens = batches + 1, tokens + values["tokens"]
                whole += len(line)
        with partial.open("r+b") as file:
            file.truncate(whole)
    if not whole:
        partial.write_text(json.dumps(identity) + "\n", encoding="utf-8")
    return batches, tokens


def _same(partial: Path, begun: dict, identity: dict) -> None:
    for name, value in identity.items():
        if begun.get(name) != value:
            shown = "" if name == "prompts" else f" ({begun.get(name)!r}, now {value!r})"
            raise UserError(
                f"{partial} was begun with another {name}{shown}",
                "use the same settings, remove that file, or name another output",
            )


def _parsed(partial: Path, line: bytes) -> dict:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{partial} is damaged: {error}", "remove it and begin again") from error


def _publish(partial: Path, out: Path) -> int:
    """Write the records of the unfinished file to `out`, remove it, and return how many there are."""
    count = 0
    with replacing(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in _records(partial):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
        file.flush()
    partial.unlink()
    return count


def _records(partial: Path) -> Iterator[dict]:
    with partial.open("rb") as file:
        next(file)
        for line in file:
            yield from _parsed(partial, line)["records"]
