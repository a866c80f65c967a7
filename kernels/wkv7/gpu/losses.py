"""Losses over a vocabulary and the gradient of their logits in one launch: cross-entropy, divergence from a teacher.

A program owns one position. It reads the logits of student and teacher once for everything that sums over the
vocabulary (maxima, sums of exponents, the divergence) and once more for the gradient, which it writes over the
student's logits: nothing of the size of the logits is allocated. Columns go in tiles [LANES, WIDTH]; every lane keeps a
maximum and sums of its own, so that a row is reduced across threads once, at its end. Everything is computed in fp32.

The equations are those of `rwkvinside.losses.divergence` and `next_token`, the reference. With s and t the logits of
student and teacher divided by the temperature, and Z the logarithms of their sums of exponents:

    KL(p || q) = E_p[t - s] + Z_s - Z_t          gradient by s   q - p
    KL(q || p) = E_q[s - t] + Z_t - Z_s                          q (log q - log p - value)
    JS = (E_p[log p - log m] + of_q) / 2                         q (log q - log m - of_q) / 2

with m = (p + q) / 2 and of_q = E_q[log q - log m]; this one takes a pass more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rwkvinside.kernels.gpu.kernels import _store
from rwkvinside.kernels.gpu.launch import Launch, run
from rwkvinside.kernels.gpu.table import Tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("forward", "reverse", "js")
# 16 bytes of bf16 a thread and load, two of them a tile
LANES, WIDTH = 512, 8
TUNING = Tuning(num_warps=8, num_stages=1)

NOTHING = tl.constexpr(-1e30)  # a logit of no mass; -inf would turn 0 times it into NaN
LAST = tl.constexpr(2**31 - 1)
LOG_2 = tl.constexpr(0.6931471805599453)


def compare_logits(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    kind: str = "forward",
    kl: float = 1.0,
    ce: float = 1.0,
    temperature: float = 1.0,
    need_grad: bool = True,
) -> Tensor:
    """Compute kl * temperature^2 * divergence + ce * cross-entropy of each position; logits become their gradient.

    Args:
        logits: (n, V) bf16, fp16 or fp32 with contiguous columns; overwritten with the gradient of the sum of the
            losses, if it is needed. Columns past the shared ones count nowhere and get 0.
        labels: (n,) int64. One that is no shared column makes the cross-entropy NaN.
        teacher: (n, any number) of these dtypes with contiguous columns, only read; the columns that both have are
            compared. None: the cross-entropy is all.
        kind: "forward", KL(teacher || student), "reverse" or "js".
        kl, ce: weights.
        temperature: of the divergence.
        need_grad: False: the logits stay as they are.

    Returns:
        (n, 4) fp32: loss, cross-entropy, divergence * temperature^2, and whether both have the same likeliest column,
        the first of several. Without a teacher the first two.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit, an unknown kind.
    """
    launches, rows = plan_compare(
        logits, labels, teacher, kind=kind, kl=kl, ce=ce, temperature=temperature, need_grad=need_grad
    )
    run(launches, logits.device)
    return rows


def plan_compare(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    *,
    kind: str = "forward",
    kl: float = 1.0,
    ce: float = 1.0,
    temperature: float = 1.0,
    need_grad: bool = True,
) -> tuple[list[Launch], Tensor]:
    """Return the launches that `compare_logits` runs, and its result; launch nothing.

    Meta tensors are enough.
    """
    given = (logits,) if teacher is None else (logits, teacher)
    for x in given:
        if x.dim() != 2 or len(x) != len(labels) or x.dtype not in DTYPES or x.stride(1) != 1:
            raise ValueError(
                f"logits {tuple(x.shape)} of {x.dtype} with strides {x.stride()} for {len(labels)} labels: "
                "expected a row of bf16, fp16 or fp32 for each, with contiguous columns"
            )
    if kind not in KINDS:
        raise ValueError(f"unknown divergence {kind!r}: choose one of {', '.join(KINDS)}")
    columns = logits.shape[1]
    rows = torch.empty(len(logits), 2 if teacher is None else 4, dtype=torch.float32, device=logits.device)
    args = {
        "logits_": logits,
        "logits_row": logits.stride(0),
        "teacher_": teacher,
        "teacher_row": 0 if teacher is None else teacher.stride(0),
        "labels_": labels.contiguous(),
        "rows_": rows,
        "columns": columns,
        "shared": min(x.shape[1] for x in given),
        "kl": float(kl),
        "ce": float(ce),
        "temperature": float(temperature),
    }
    constants = {
        "KIND": kind,
        "WARM": teacher is not None and temperature != 1,
        "CE": ce != 0,
        "GRAD": need_grad,
        "LANES": LANES,
        "WIDTH": WIDTH,
    }
    return [Launch(compare_rows, (len(logits),), args, constants, TUNING)], rows


@triton.jit
def _columns(start, LANES: tl.constexpr, WIDTH: tl.constexpr):
    return start + tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _load(row_, column, shared):
    """Return logits in fp32; NOTHING is the least that there is, and what columns past the shared ones have."""
    x = tl.load(row_ + column, mask=column < shared, other=float("-inf")).to(tl.float32)
    return tl.where(x < NOTHING, NOTHING, x)  # NaN stays NaN


@triton.jit
def _raised(x, column, top, best):
    """Return each lane's maximum and its column after one more tile; the first column of several."""
    high = tl.max(x, axis=1)
    at = tl.min(tl.where(x == high[:, None], column, LAST), axis=1)
    return tl.maximum(top, high), tl.where(high > top, at, best)


@triton.jit
def _of_row(top, best):
    """Return the maximum of all lanes and its first column."""
    highest = tl.max(top, axis=0)
    return highest, tl.min(tl.where(top == highest, best, LAST), axis=0)


@triton.jit
def _log_middle(log_p, log_q):
    """Return log((p + q) / 2)."""
    return tl.maximum(log_p, log_q) + tl.log(1.0 + tl.exp(-tl.abs(log_p - log_q))) - LOG_2


@triton.jit
def compare_rows(
    logits_,
    logits_row,
    teacher_,
    teacher_row,
    labels_,
    rows_,
    columns,
    shared,
    kl,
    ce,
    temperature,
    KIND: tl.constexpr,
    WARM: tl.constexpr,
    CE: tl.constexpr,
    GRAD: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Compare a row in each program; WARM: the temperature is not 1."""
    row = tl.program_id(0).to(tl.int64)
    logits_ += row * logits_row
    label = tl.load(labels_ + row)
    # before the gradient is written over it, that is before the threads meet
    at_label = tl.load(logits_ + label, mask=(label >= 0) & (label < shared), other=float("nan")).to(tl.float32)
    scale = 1.0
    if WARM:
        scale = 1.0 / temperature
    if teacher_ is not None:
        teacher_ += row * teacher_row

    s_top = tl.full([LANES], NOTHING, tl.float32)
    s_best = tl.full([LANES], LAST, tl.int32)
    s_sum = tl.zeros([LANES], tl.float32)
    cold_sum = tl.zeros([LANES], tl.float32)  # at temperature 1
    t_top = tl.full([LANES], NOTHING, tl.float32)
    t_best = tl.full([LANES], LAST, tl.int32)
    t_sum = tl.zeros([LANES], tl.float32)
    apart = tl.zeros([LANES], tl.float32)  # differences of logits, weighted by exponents
    for start in range(0, shared, LANES * WIDTH):
        column = _columns(start, LANES, WIDTH)
        s = _load(logits_, column, shared)
        top, s_best = _raised(s, column, s_top, s_best)
        shrink = tl.exp((s_top - top) * scale)
        q = tl.exp((s - top[:, None]) * scale)
        s_sum = s_sum * shrink + tl.sum(q, axis=1)
        if WARM:
            cold_sum = cold_sum * tl.exp(s_top - top) + tl.sum(tl.exp(s - top[:, None]), axis=1)
        s_top = top
        if teacher_ is not None:
            t = _load(teacher_, column, shared)
            if KIND == "reverse":
                apart = apart * shrink + tl.sum(q * (s - t), axis=1)
            top, t_best = _raised(t, column, t_top, t_best)
            shrink = tl.exp((t_top - top) * scale)
            p = tl.exp((t - top[:, None]) * scale)
            t_sum = t_sum * shrink + tl.sum(p, axis=1)
            t_top = top
            if KIND == "forward":
                apart = apart * shrink + tl.sum(p * (t - s), axis=1)

    s_max, s_first = _of_row(s_top, s_best)
    s_weight = tl.exp((s_top - s_max) * scale)
    s_total = tl.sum(s_sum * s_weight, axis=0)
    cold_total = s_total
    if WARM:
        cold_total = tl.sum(cold_sum * tl.exp(s_top - s_max), axis=0)
    entropy = s_max - at_label + tl.log(cold_total)
    loss = ce * entropy
    if teacher_ is not None:
        t_max, t_first = _of_row(t_top, t_best)
        t_weight = tl.exp((t_top - t_max) * scale)
        t_total = tl.sum(t_sum * t_weight, axis=0)
        s_log, t_log = tl.log(s_total), tl.log(t_total)
        if KIND == "forward":
            difference = tl.sum(apart * t_weight, axis=0) / t_total + (s_max - t_max)
            value = difference * scale + (s_log - t_log)
        elif KIND == "reverse":
            difference = tl.sum(apart * s_weight, axis=0) / s_total + (t_max - s_max)
            value = difference * scale + (t_log - s_log)
        else:
            of_p = tl.zeros([LANES], tl.float32)
            of_q = tl.zeros([LANES], tl.float32)
            for start in range(0, shared, LANES * WIDTH):
                column = _columns(start, LANES, WIDTH)
                log_q = (_load(logits_, column, shared) - s_max) * scale - s_log
                log_p = (_load(teacher_, column, shared) - t_max) * scale - t_log
                log_m = _log_middle(log_p, log_q)
                of_p += tl.sum(tl.exp(log_p) * (log_p - log_m), axis=1)
                of_q += tl.sum(tl.exp(log_q) * (log_q - log_m), axis=1)
            mean_q = tl.sum(of_q, axis=0)
            value = 0.5 * (tl.sum(of_p, axis=0) + mean_q)
        squared = temperature * temperature * value
        loss += kl * squared
        tl.store(rows_ + row * 4, loss)
        tl.store(rows_ + row * 4 + 1, entropy)
        tl.store(rows_ + row * 4 + 2, squared)
        tl.store(rows_ + row * 4 + 3, (s_first == t_first).to(tl.float32))
    else:
        tl.store(rows_ + row * 2, loss)
        tl.store(rows_ + row * 2 + 1, entropy)

    if GRAD:
        weight = kl * temperature  # of the temperature's square, one went into the logits
        s_inverse, cold_inverse = 1.0 / s_total, 1.0 / cold_total
        for start in range(0, columns, LANES * WIDTH):
            column = _columns(start, LANES, WIDTH)
            s = _load(logits_, column, shared)
            q = tl.exp((s - s_max) * scale) * s_inverse
            grad = tl.zeros([LANES, WIDTH], tl.float32)
            if teacher_ is not None:
                t = _load(teacher_, column, shared)
                log_p = (t - t_max) * scale - t_log
                if KIND == "forward":
                    grad = weight * (q - tl.exp(log_p))
                else:
                    log_q = (s - s_max) * scale - s_log
                    if KIND == "reverse":
                        grad = weight * q * (log_q - log_p - value)
                    else:
                        grad = 0.5 * weight * q * (log_q - _log_middle(log_p, log_q) - mean_q)
            if CE:
                if WARM:
                    q = tl.exp(s - s_max) * cold_inverse
                grad += ce * (q - (column == label.to(tl.int32)).to(tl.float32))
            _store(logits_ + column, tl.where(column < shared, grad, 0.0), column < columns)
