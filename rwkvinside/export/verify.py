"""Verification that an exported directory is what its run makes, and computes the same.

First the files: those that were written, the code and configurations that this version writes, every tensor. Only then
the directory is loaded, in a fresh process that cannot import this package (`reload.py`), and what it computes is
compared with the trained model in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batch import Batch
from ..data.chat import TemplateRefusal, render
from ..errors import UserError, VerificationError
from ..hybrid.adapters import is_adapter
from ..hybrid.assemble import adapter_names, make_plain, take_adapters
from ..hybrid.model import HybridModel
from ..runs.trained import TrainedRun
from ..support.names import ALLOWED, is_name
from ..support.progress import Progress
from ..support.quiet import quiet_libraries
from ..support.weight_index import check_shards
from .build import build_hybrid, write_files
from .manifest import CONVERSION, files_of, read_with_run
from .probe import ROWS, TOKENS, batch_of, fixed_batch, max_difference, mean_kl, run_tokenizer, student_logits
from .reload import tokenizer_facts
from .validation import validation_rows
from .weights import DTYPES, stored_dtype

SAMPLE = "Once upon a time, 12 naïve dragons\n\tsaid: “{}”"
VALIDATION_SECONDS = 30.0  # for the trained model; the exported one needs as long again
PROBES = 8  # logits of a position that are compared, beside that of the next token and the log of the normalizer
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
CARDS = {CONVERSION, "README.md", "report.png"}
MAKERS = {"transformers_version", "peft_version"}  # fields of configurations that say which library wrote them

# Logits of the directory loaded in fp32 against the trained model whose weights were rounded to the directory's dtype.
# Both run the same operations in the same order with the same number of threads: the usual difference is 0. A millionth
# of the largest logit (8 units in its last place) is allowed where that is more than the promised 1e-5.
TOLERANCE, RELATIVE_TOLERANCE = 1e-5, 1e-6
# The same directory run in pieces through its cache: other operations (single steps instead of chunks), whose rounding
# errors grow with depth. A state that is lost or applied twice shows as a difference as large as the logits.
CACHE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Expected:
    """What the run computes.

    Attributes:
        batch: fixed tokens.
        logits: see `_expected`.
        rows: token ids of validation documents.
        probes: of each row (T, n) ids whose logits are compared.
        values: of each row (T, n + 1) logits of the probes, and the log of the sum of all exponentials.
        unread: why there are no rows, or "".
    """

    batch: Batch
    logits: dict[str, Tensor]
    rows: list[Tensor]
    probes: list[Tensor]
    values: list[Tensor]
    unread: str


def verify(folder: str | Path, against: str | Path) -> dict:
    """Compare an exported directory with its run. Nothing is written.

    Args:
        folder: exported directory.
        against: run directory.

    Returns:
        The result, see `compare`.

    Raises:
        UserError: not an exported directory, or a run that cannot be read.
        VerificationError: a file is damaged, or is not what this version writes for this run; the directory does not
            load on its own; a difference exceeds its tolerance.
    """
    quiet_libraries()
    folder = Path(folder)
    conversion, run = read_with_run(folder, against)
    directories = (conversion.get("adapters") or {}).get("directories", [])
    _check_names(folder, directories)
    return compare(folder, run, directories)


def compare(folder: Path, run: TrainedRun, adapters: list[str]) -> dict:
    """Compare the files of an export, and what it computes, with its run.

    Args:
        folder: exported directory; conversion.json, card and figures are not looked at.
        run: where it comes from.
        adapters: names of directories with adapters that are not merged.

    Returns:
        The result: `passed`; `files` and `tensors` that were compared; `max_difference` (of fp32 logits, against the
        trained weights in the directory's dtype), `validation_difference` over `validation_rows` documents with
        `validation_tokens` (`validation`: why there are none) and their `tolerance`; `cache_difference`,
        `generation_difference` (a padded batch through the cache, against one pass for each) and their tolerance;
        `rounding_kl` (mean KL in nats from the trained fp32 model to the directory in its stored dtype; a
        measurement without a limit); `token_ids` and `renderings` of chat templates that were compared. For a run with
        quantized weights or adapters also `plain_difference` (between the model as it ran in training and with weights
        unpacked and adapters merged) and, where adapters are separate, `adapter_difference` (loaded by PEFT).

    Raises:
        VerificationError: see `verify`.
    """
    folder = folder.resolve()  # it is loaded by a process in another directory
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype, tied = DTYPES[config["dtype"]], bool(config.get("tie_word_embeddings"))
    tokenizer = run_tokenizer(run)
    result: dict[str, Any] = {"passed": True, "dtype": config["dtype"], "tokens": ROWS * TOKENS}
    with Progress("verifying", 4, unit="parts") as progress:
        trained = run.load_model()
        expected, separate = _expected(run, trained, dtype, bool(adapters), tokenizer)
        progress.advance(detail="what the run computes")
        model = build_hybrid(trained, run, dtype, tied)
        result["files"] = _compare_files(folder, run, model, trained, separate)
        progress.advance(detail="files")
        result["tensors"] = _compare_tensors(folder, model)
        progress.advance(detail="tensors")
        del trained, model, separate
        facts = tokenizer_facts(tokenizer, _texts(tokenizer), _rendered) if tokenizer else {}
        reloaded, own_facts = _reload(folder, expected, _texts(tokenizer) if tokenizer else [], adapters)
        progress.advance(detail="what the export computes")
    result |= _measure(expected, reloaded, bool(adapters))
    problems = _differences(result)
    if not reloaded["stored"].isfinite().all():
        problems.append(f"logits in {result['dtype']} are not finite")
    if facts:
        result |= {"token_ids": len(facts["vocabulary"]), "renderings": len(facts["chat templates"])}
        problems += _unlike(own_facts, facts)
    if problems:
        raise VerificationError(f"{folder} does not reproduce {run.path}: {'; '.join(problems)}")
    return result


def _check_names(folder: Path, adapters: list[str]) -> None:
    """Refuse a directory that names files elsewhere."""
    check_shards(folder)
    if outside := [name for name in adapters if not is_name(name)]:
        raise UserError(f"{folder} names the adapter directory {outside[0]!r}", ALLOWED)


def _compare_files(folder: Path, run: TrainedRun, model: PreTrainedModel, trained: HybridModel, separate: list) -> int:
    """Compare code, configurations, tokenizer and adapters with what this version writes; return how many files."""
    with tempfile.TemporaryDirectory() as scratch:
        write_files(model, trained.lm.generation_config, separate, run, Path(scratch))
        wanted, found = files_of(Path(scratch)), files_of(folder)
        weights = {file.name for pattern in WEIGHTS for file in folder.glob(pattern)}
        for name in sorted((found.keys() | wanted.keys()) - CARDS - weights):
            where = f"{folder} does not reproduce {run.path}: {name}"
            if name not in found:
                raise VerificationError(f"{where} is missing")
            if name not in wanted:
                raise VerificationError(f"{where} is not part of an export of this run")
            if difference := _file_difference(found[name], wanted[name]):
                hint = "use the version of rwkvinside that exported it" if name.endswith(".py") else ""
                raise VerificationError(f"{where} is not what this version writes{difference}", hint)
        return len(wanted)


def _file_difference(found: Path, wanted: Path) -> str:
    """Return "" for files that say the same, else words that follow "is not what this version writes"."""
    if found.read_bytes() == wanted.read_bytes():
        return ""
    if found.name not in ("config.json", "generation_config.json", "adapter_config.json"):
        return " (other bytes)"
    try:
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in (found, wanted)]
        has, needs = ({key: value for key, value in content.items() if key not in MAKERS} for content in contents)
    except (ValueError, AttributeError, RecursionError) as error:
        return f": {error}"
    return next(
        (
            f": {key} is {has.get(key)!r}, not {needs.get(key)!r}"
            for key in needs | has
            if has.get(key) != needs.get(key)
        ),
        "",
    )


def _compare_tensors(folder: Path, model: PreTrainedModel) -> int:
    """Compare every stored tensor with the run's, bit for bit; return how many."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()  # stored once
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    problems, seen = [], set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    seen.add(name)
                    if difference := _tensor_difference(tensors.get_tensor(name), wanted.get(name)):
                        problems.append(f"{name} ({difference})")
        except (OSError, SafetensorError) as error:
            raise VerificationError(f"{file} cannot be read: {error}") from error
    problems += [f"{name} (missing)" for name in sorted(wanted.keys() - seen)]
    if problems:
        raise VerificationError(f"{folder}: {len(problems)} tensors are not those of the run, first {problems[0]}")
    return len(wanted)


def _tensor_difference(found: Tensor, wanted: Tensor | None) -> str:
    """Return "" for equal tensors, else what differs."""
    if wanted is None:
        return "unknown"
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}"
    count = int((found != wanted).sum())
    return f"{count:,} of {found.numel():,} numbers" if count else ""


def _texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return texts in which every token occurs: each alone, and beside its neighbors."""
    words = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return [SAMPLE, *words, *("".join(words[i : i + 64]) for i in range(0, len(words), 64))]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict], *, chat_template: str | None, **options: Any
) -> str:
    """Return what `reload.rendered` does, within bounds; so its process renders no template that exceeds them."""
    try:
        return render(tokenizer, messages, template=chat_template, **options).text
    except TemplateRefusal as refusal:
        return f"{refusal.kind}: {refusal.reason}"


def _unlike(found: dict, wanted: dict) -> list[str]:
    """Return in which kinds of facts two tokenizers differ, each with an example."""
    problems = []
    for kind, facts in wanted.items():
        theirs = found.get(kind)
        if theirs != facts:
            keys = facts.keys() if isinstance(facts, dict) else range(len(facts))
            same_size = theirs is not None and len(theirs) == len(facts)
            at = next((key for key in keys if not same_size or theirs[key] != facts[key]), None)
            example = f" ({at}: {str(theirs[at])[:80]!r} instead of {str(facts[at])[:80]!r})" if same_size else ""
            problems.append(f"its tokenizer differs from the teacher's in {kind}{example}")
    return problems


def _expected(
    run: TrainedRun, model: HybridModel, dtype: torch.dtype, separate: bool, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[_Expected, list]:
    """Return what the export is compared with, and the adapters that it has in separate directories.

    The model is left plain, with its weights rounded to the export's.

    Args:
        run: the run that was exported.
        model: its trained student.
        dtype: of the export.
        separate: the adapters are in separate directories.
        tokenizer: the teacher's, for validation documents.

    Returns:
        With the logits "trained" as the model ran in training, "plain" unpacked and merged (where that differs),
        "adapted" with the export's rounding, and "full" without the separate adapters.
    """
    for mixer in model.mixers.values():  # the directory has to run where no compiled kernel is installed
        mixer.mixer_config = mixer.mixer_config.replace(backend="chunked")
    batch = fixed_batch(model.lm.config.vocab_size)
    logits = {"trained": student_logits(model, batch)}
    changes = bool(model.quantized or adapter_names(model))
    make_plain(model, keep_adapters=separate)
    if changes:
        logits["plain"] = student_logits(model, batch)
    _round(model, dtype)
    logits["adapted"] = student_logits(model, batch)
    adapters = take_adapters(model, run.layers) if separate else []
    logits["full"] = student_logits(model, batch)
    documents, unread = validation_rows(run, tokenizer) if tokenizer else (iter(()), "the teacher has no tokenizer")
    return _Expected(batch, logits, *_validate(model, documents), unread), adapters


def _validate(model: HybridModel, documents: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return rows, probes and values of `_Expected`, of as many documents as the time suffices for."""
    rows, probes, values = [], [], []
    end = time.monotonic() + VALIDATION_SECONDS
    for ids in documents:
        logits = student_logits(model, batch_of(ids[None]))[0]
        following = torch.cat([ids[1:], ids[:1]])
        probe = torch.cat([logits.topk(min(PROBES, logits.shape[1])).indices, following[:, None]], 1)
        rows.append(ids)
        probes.append(probe)
        values.append(torch.cat([logits.gather(1, probe), logits.logsumexp(1, keepdim=True)], 1))
        if time.monotonic() > end:
            break
    return rows, probes, values


def _measure(expected: _Expected, reloaded: dict[str, Tensor], separate: bool) -> dict[str, Any]:
    """Return the differences between a run and its export, see `compare`."""
    logits = expected.logits
    largest = max(1.0, logits["full"].abs().max().item())
    result: dict[str, Any] = {
        "max_difference": max_difference(reloaded["full"], logits["full"]),
        "tolerance": max(TOLERANCE, RELATIVE_TOLERANCE * largest),
        "cache_difference": max_difference(reloaded["cached"], reloaded["full"]),
        "cache_tolerance": CACHE_TOLERANCE * largest,
        "generation_difference": max_difference(reloaded["generated"], reloaded["regenerated"]),
        "validation_rows": len(expected.rows),
        "validation_tokens": sum(map(len, expected.rows)),
        "rounding_kl": mean_kl(logits["trained"], reloaded["stored"]),
        "plain_tolerance": TOLERANCE * largest,
    }
    if expected.rows:
        differences = [max_difference(reloaded[f"row.{i}"], values) for i, values in enumerate(expected.values)]
        result["validation_difference"] = max(differences)
    else:
        result["validation"] = expected.unread
    if "plain" in logits:
        result["plain_difference"] = max_difference(logits["plain"], logits["trained"])
    if separate:
        result["adapter_difference"] = max_difference(reloaded["adapted"], logits["adapted"])
    return result


def _differences(result: dict) -> list[str]:
    """Return which differences are too large, or not numbers.

    Args:
        result: see `compare`.
    """
    limits = {
        "plain_difference": ("plain_tolerance", "unpacking and merging changes logits by"),
        "adapter_difference": ("plain_tolerance", "with its adapters logits differ by"),
        "max_difference": ("tolerance", "logits differ by"),
        "validation_difference": ("tolerance", "on validation documents logits differ by"),
        "cache_difference": ("cache_tolerance", "through the cache they differ by"),
        "generation_difference": ("cache_tolerance", "in a padded batch that generates they differ by"),
    }
    return [
        f"{text} {result[name]:.3g}"
        for name, (limit, text) in limits.items()
        if not result.get(name, 0.0) <= result[limit]
    ]


@torch.no_grad()
def _round(model: HybridModel, dtype: torch.dtype) -> None:
    """Round the trained model's weights as the export does, still in fp32."""
    for name, parameter in model.canonical_parameters().items():
        if is_adapter(name):  # stored in fp32
            continue
        parameter.copy_(parameter.to(stored_dtype(name, dtype)))


def _reload(
    folder: Path, expected: _Expected, texts: list[str], adapters: list[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what the directory computes and what its tokenizer says, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        files = [scratch / name for name in ("request.safetensors", "result.safetensors", "facts.json", "task.json")]
        request = {"input_ids": expected.batch.input_ids}
        request |= {f"row.{i}": ids for i, ids in enumerate(expected.rows)}
        request |= {f"probe.{i}": ids for i, ids in enumerate(expected.probes)}
        save_file(request, files[0])
        task = {"threads": torch.get_num_threads(), "adapters": adapters, "texts": texts}
        files[3].write_text(json.dumps(task), encoding="utf-8")
        # a separate module cache: code left by an earlier export must not replace the directory's
        environment = os.environ | {"HF_MODULES_CACHE": name, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        script = Path(__file__).with_name("reload.py")
        command = [sys.executable, "-I", *map(str, (script, folder, *files))]
        with (scratch / "stderr").open("w+", encoding="utf-8", errors="replace") as stderr:
            streams = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)
            with subprocess.Popen(command, cwd=scratch, env=environment, **streams) as process:
                process.wait()  # with its input open: it ends with this process
            stderr.seek(0)
            said = stderr.read().strip().splitlines()
        if process.returncode:
            last = said[-1:] or [f"exit status {process.returncode}"]
            raise VerificationError(f"{folder} does not load in a separate process: {last[0]}")
        facts = json.loads(files[2].read_text(encoding="utf-8")) if texts else {}
        return load_file(files[1]), facts
