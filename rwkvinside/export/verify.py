"""Verification that an exported directory reproduces the model it was made from.

The directory is loaded in a fresh process that cannot import this package (`reload.py`), and its logits on fixed tokens
are compared with those of the trained model in this process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from ..data.batch import IGNORE, Batch
from ..errors import UserError, VerificationError
from ..hybrid.adapters import is_adapter
from ..hybrid.assemble import adapter_names, make_plain, take_adapters
from ..hybrid.lm_head import Logits
from ..hybrid.model import HybridModel
from ..runs.trained import TrainedRun, open_run
from ..support.files import write_json
from ..support.names import ALLOWED, is_name
from ..support.weight_index import check_shards
from .weights import DTYPES, stored_dtype

ROWS, TOKENS, SEED = 2, 41, 0  # 41: not a multiple of any backend's chunk
SAMPLE = "Once upon a time, 12 naïve dragons\n\tsaid: “{}”"

# Logits of the directory loaded in fp32 against the trained model whose weights were rounded to the directory's dtype.
# Both run the same operations in the same order with the same number of threads: the usual difference is 0. A millionth
# of the largest logit (8 units in its last place) is allowed where that is more than the promised 1e-5.
TOLERANCE, RELATIVE_TOLERANCE = 1e-5, 1e-6
# The same directory run in pieces through its cache: other operations (single steps instead of chunks), whose rounding
# errors grow with depth. A state that is lost or applied twice shows as a difference as large as the logits.
CACHE_TOLERANCE = 1e-3


def verify(folder: str | Path, against: str | Path) -> dict:
    """Compare an exported directory with its run; note the result in conversion.json.

    Args:
        folder: exported directory.
        against: run directory.

    Returns:
        The result: `passed`, `max_difference` (of fp32 logits, against the trained weights in the directory's dtype)
        and its `tolerance`, `cache_difference` and its tolerance, `rounding_kl` (mean KL in nats from the trained fp32
        model to the directory in its stored dtype; a measurement without a limit). For a run with quantized weights or
        adapters also `plain_difference` (between the model as it ran in training and with weights unpacked and adapters
        merged) and, where adapters are separate, `adapter_difference` (with the adapters loaded by PEFT).

    Raises:
        UserError: not an exported directory, or a run that cannot be read.
        VerificationError: the directory does not load on its own, or a difference exceeds its tolerance.
    """
    folder = Path(folder).resolve()
    try:
        conversion = json.loads((folder / "conversion.json").read_text())
        dtype = DTYPES[json.loads((folder / "config.json").read_text())["dtype"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} is not an exported model: {error!r}", "name a directory that `rwkvinside export` wrote"
        ) from error
    run = open_run(against)
    directories = (conversion.get("adapters") or {}).get("directories", [])
    _check_source(folder, conversion.get("run"), directories, run)
    batch, expected = _expected_logits(run, dtype, bool(directories))
    sample_ids = _sample_ids(run.teacher_files())
    reloaded = _reload(folder, batch.input_ids, SAMPLE if sample_ids else "", directories)
    largest = expected["full"].abs().max().item()
    result = {
        "passed": False,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": ROWS * TOKENS,
        "max_difference": _max_difference(reloaded["full"], expected["full"]),
        "tolerance": max(TOLERANCE, RELATIVE_TOLERANCE * largest),
        "cache_difference": _max_difference(reloaded["cached"], reloaded["full"]),
        "cache_tolerance": CACHE_TOLERANCE * max(1.0, largest),
        "rounding_kl": _mean_kl(expected["trained"], reloaded["stored"]),
    }
    if "plain" in expected:
        result["plain_difference"] = _max_difference(expected["plain"], expected["trained"])
    if directories:
        result["adapter_difference"] = _max_difference(reloaded["adapted"], expected["adapted"])
    problems = _differences(result, TOLERANCE * max(1.0, largest))
    if not reloaded["stored"].isfinite().all():
        problems.append(f"logits in {result['dtype']} are not finite")
    if (ids := reloaded["sample_ids"].tolist()) != sample_ids:
        problems.append(f"its tokenizer gives {ids} where the teacher's gives {sample_ids}")
    result["passed"] = not problems
    conversion["verification"] = result | ({"problems": problems} if problems else {})
    write_json(folder / "conversion.json", conversion)
    if problems:
        raise VerificationError(f"{folder} does not reproduce {run.path}: {'; '.join(problems)}")
    return result


def _check_source(folder: Path, exported_from: str | None, adapters: list[str], run: TrainedRun) -> None:
    """Refuse a directory of another run, or one that names files elsewhere.

    Exports of runs without an id name none.
    """
    check_shards(folder)
    if outside := [name for name in adapters if not is_name(name)]:
        raise UserError(f"{folder} names the adapter directory {outside[0]!r}", ALLOWED)
    if exported_from not in (None, run.id):
        raise UserError(
            f"{folder} was exported from run {exported_from}, {run.path} is run {run.id}", "name its own run"
        )


def _expected_logits(run: TrainedRun, dtype: torch.dtype, separate: bool) -> tuple[Batch, dict[str, Tensor]]:
    """Return fixed tokens and the logits that the export is compared with.

    Args:
        run: the run that was exported.
        dtype: of the export.
        separate: the adapters are in separate directories.

    Returns:
        The batch, and the logits "trained" as the model ran in training, "plain" unpacked and merged (where that
        differs), "adapted" with the export's rounding, and "full" without the separate adapters.
    """
    model = run.load_model()
    for mixer in model.mixers.values():  # the directory has to run where no compiled kernel is installed
        mixer.mixer_config = mixer.mixer_config.replace(backend="chunked")
    batch = _fixed_batch(model.lm.config.vocab_size)
    logits = {"trained": _logits(model, batch)}
    changes = bool(model.quantized or adapter_names(model))
    make_plain(model, keep_adapters=separate)
    if changes:
        logits["plain"] = _logits(model, batch)
    _round(model, dtype)
    logits["adapted"] = _logits(model, batch)
    if separate:
        take_adapters(model, run.layers)
    return batch, logits | {"full": _logits(model, batch)}


def _differences(result: dict, tolerance: float) -> list[str]:
    """Return which differences are too large.

    Args:
        result: see `verify`.
        tolerance: for unpacking and adapters.
    """
    problems = []
    if not result.get("plain_difference", 0.0) <= tolerance:
        problems.append(f"unpacking and merging changes logits by {result['plain_difference']:.3g}")
    if not result.get("adapter_difference", 0.0) <= tolerance:
        problems.append(f"with its adapters logits differ by {result['adapter_difference']:.3g}")
    if not result["max_difference"] <= result["tolerance"]:
        problems.append(f"logits differ by {result['max_difference']:.3g}, allowed {result['tolerance']:.3g}")
    if not result["cache_difference"] <= result["cache_tolerance"]:
        problems.append(f"through the cache they differ by {result['cache_difference']:.3g}")
    return problems


def _fixed_batch(vocabulary: int) -> Batch:
    ids = torch.randint(vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(SEED))
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        position_ids=torch.arange(TOKENS).repeat(ROWS, 1),
        segment_ids=torch.ones_like(ids, dtype=torch.int32),
        rows=tuple(range(ROWS)),
    )


@torch.no_grad()
def _logits(model: HybridModel, batch: Batch) -> Tensor:
    return model(batch, mode="student", task=Logits())


@torch.no_grad()
def _round(model: HybridModel, dtype: torch.dtype) -> None:
    """Round the trained model's weights as the export does, still in fp32."""
    for name, parameter in model.canonical_parameters().items():
        if is_adapter(name):  # stored in fp32
            continue
        parameter.copy_(parameter.to(stored_dtype(name, dtype)))


def _reload(folder: Path, ids: Tensor, sample: str, adapters: list[str]) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch) / "request.safetensors", Path(scratch) / "result.safetensors"
        save_file({"input_ids": ids}, request)
        # a separate module cache: code left by an earlier export must not replace the directory's
        environment = os.environ | {"HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        script = Path(__file__).with_name("reload.py")
        process = subprocess.run(
            [
                *(sys.executable, "-I", *map(str, (script, folder, request, result, torch.get_num_threads()))),
                *(sample, " ".join(adapters)),
            ],
            cwd=scratch,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise VerificationError(f"{folder} does not load in a separate process: {last[0]}")
        return load_file(result)


def _sample_ids(teacher: Path) -> list[int]:
    """Return the teacher's token ids of the sample; [] if it has no tokenizer."""
    if not any(teacher.glob("tokenizer*")):
        return []
    return AutoTokenizer.from_pretrained(teacher)(SAMPLE)["input_ids"]


def _max_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _mean_kl(reference: Tensor, logits: Tensor) -> float:
    log_p, log_q = F.log_softmax(reference, -1), F.log_softmax(logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
