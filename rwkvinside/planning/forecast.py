"""The plan of a run as numbers: what each stage reads, computes, needs and leaves; how long it takes at a given speed.

`plan.py` has the details as text. A run keeps these numbers, and its report shows them next to what was measured.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import cast

import torch

from ..config.schema import Config
from ..hybrid.model import HybridModel
from ..stages.plan import RunPlan, StagePlan
from ..stages.teacher import meta_online_teacher
from ..support.text import rounded_bytes, rounded_count, rounded_flop, rounded_time
from ..teacher.kinds import TeacherKind
from ..training.loggers import check_loggers
from .devices import RESERVED, card_for, device_memory, named_peak, peak_flops
from .fit_flops import calibration_flops
from .flops import flops_per_token
from .plan import disk_bytes, meta_student, prepared_stages, run_warnings, teacher_parameters
from .stage_memory import stage_memory

LONG = 14 * 24 * 3600  # seconds that nobody waits for
NODE = 8  # ranks that share a host, at most
MFU = {"cpu": 0.2, "cuda": 0.15}  # share of the peak that is assumed: docs/benchmarks.md has measured ones


@dataclass(frozen=True)
class StageForecast:
    """What a stage is expected to take.

    Attributes:
        name: of the stage.
        tokens, steps, seq_len: its length; steps 1 of a stage that is computed at once.
        ranks: processes that share the work.
        flops_per_token: operations of a token, forward and backward; 0 of a calibration.
        fitting_flops: operations of a calibration in all, in fp32; 0 of other stages.
        memory: bytes on the device of a rank by purpose, at the largest moment of a step.
        peak: bytes on the device of a rank at the largest moment of all.
        host: bytes in the memory of a host in addition, when its devices have their own: of all ranks on it.
        disk: bytes of its checkpoints, at most.
        may_end_early: whether it stops where validation does not improve any more.
    """

    name: str
    tokens: int
    steps: int
    seq_len: int
    ranks: int
    flops_per_token: float
    fitting_flops: float
    memory: dict[str, int]
    peak: int
    host: int
    disk: int
    may_end_early: bool

    @property
    def flops(self) -> float:
        """Operations of the stage."""
        return self.flops_per_token * self.tokens + self.fitting_flops

    def seconds(self, rate: Rate) -> float:
        """Return how long it takes on a machine."""
        flops = rate.flops * self.ranks / rate.ranks
        return self.flops_per_token * self.tokens / flops + self.fitting_flops / rate.fp32_flops


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take.

    Attributes:
        teacher: path or hub id.
        model_type: of the teacher.
        parameters: of the teacher, or of a model from nothing.
        hidden_size, heads, head_size: of its layers.
        layers: for each "rwkv" or "attention", with "window" and "sinks" of a windowed mixer.
        device, precision, ranks: what it runs on.
        gpu: name of the GPU that it is planned for, which is not here; None: the device of this machine.
        available: bytes of that device; None: this machine has none.
        variants: shipped ones that it has.
        stages: that run, in order.
        warnings: what one may not expect.
    """

    teacher: str
    model_type: str
    parameters: int
    hidden_size: int
    heads: int
    head_size: int
    layers: tuple[dict, ...]
    device: str
    precision: str
    ranks: int
    gpu: str | None
    available: int | None
    variants: tuple[str, ...]
    stages: tuple[StageForecast, ...]
    warnings: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Bytes on the device of a rank, of the largest stage."""
        return max((stage.peak for stage in self.stages), default=0)

    @property
    def fits(self) -> bool | None:
        """Whether the device is large enough; None: this machine has no such device, and none is named."""
        if self.available is None:
            return None
        return self.peak + (RESERVED if self.gpu else 0) <= self.available

    @property
    def host_per_node(self) -> int:
        """Bytes of a host's memory that the ranks on it need, in addition to their devices'."""
        return max((stage.host for stage in self.stages), default=0)

    @property
    def disk(self) -> int:
        """Bytes of all checkpoints, at most."""
        return sum(stage.disk for stage in self.stages)

    @property
    def may_end_early(self) -> list[str]:
        """Names of stages that stop where validation does not improve any more."""
        return [stage.name for stage in self.stages if stage.may_end_early]

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Operations of all stages."""
        return sum(stage.flops for stage in self.stages)

    def seconds(self, rate: Rate) -> float:
        """Return how long all stages take on a machine."""
        return sum(stage.seconds(rate) for stage in self.stages)

    def work_after(self, stage: str, done: Collection[str] = ()) -> float:
        """Return the operations of the stages after one, but those that are done."""
        names = [each.name for each in self.stages]
        later = self.stages[names.index(stage) + 1 :] if stage in names else ()
        return sum(each.flops for each in later if each.name not in done)

    def to_dict(self) -> dict:
        """Return plain JSON."""
        totals = {name: getattr(self, name) for name in ("peak", "fits", "host_per_node", "disk", "tokens", "flops")}
        return asdict(self) | {"total": totals}


@dataclass(frozen=True)
class Rate:
    """How fast the machine is expected to be.

    Attributes:
        flops: operations in a second that all ranks together do.
        fp32_flops: the same in fp32, of one rank: a calibration runs on one.
        origin: where the numbers are from, for people.
        ranks: of them all.
    """

    flops: float
    fp32_flops: float
    origin: str
    ranks: int = 1


def forecast(plan: RunPlan, config: Config, gpu: str | None = None) -> Forecast:
    """Return the numbers of a plan.

    Args:
        plan: from `config.resolve`.
        config: for how many checkpoints are kept.
        gpu: name of a GPU that is not here, such as H100.

    Raises:
        UserError: as `plan_text`, or an unknown GPU.
    """
    check_loggers(config.loggers)
    run, model = plan.settings, meta_student(plan.settings)
    c = model.lm.config
    heads = model.family.attention_fields(c, 0)
    parameters = sum(p.numel() for p in model.parameters()) if run.teacher.fresh else teacher_parameters(model)
    stages, layers = [], []
    for stage, student, kind in prepared_stages(plan, model):
        if stage.name in plan.selected:
            stages.append(_stage(stage, student, kind, config.checkpoint.keep))
        layers = [_layer(student, i) for i in range(c.num_hidden_layers)]  # a stage may have chosen them
    return Forecast(
        teacher=run.teacher.path,
        model_type=c.model_type,
        parameters=parameters,
        hidden_size=c.hidden_size,
        heads=heads["num_heads"],
        head_size=heads["head_size"],
        layers=tuple(layers),
        device=run.device,
        precision=run.precision,
        ranks=run.ranks,
        gpu=gpu,
        available=device_memory(run.device, gpu),
        variants=tuple(config.variant),
        stages=tuple(stages),
        warnings=tuple(run_warnings(run)),
    )


def _layer(model: HybridModel, i: int) -> dict:
    mixer = model.mixer_configs.get(i)
    if mixer is None:
        return {"kind": "attention"}
    return {"kind": "rwkv"} | ({"window": mixer.window, "sinks": mixer.sinks} if mixer.window else {})


def _stage(plan: StagePlan, model: HybridModel, kind: TeacherKind | None, keep: int) -> StageForecast:
    teacher, trains = meta_online_teacher(plan) if kind is TeacherKind.ONLINE else None, plan.stage.trains
    memory = stage_memory(plan, model, kind, teacher)
    return StageForecast(
        name=plan.name,
        tokens=plan.length.total_tokens,
        steps=plan.length.steps if trains else 1,
        seq_len=plan.length.seq_len,
        ranks=min(plan.run.ranks, 1 + len(model.rwkv_layers)) if plan.trials else plan.shape.ranks,
        flops_per_token=0.0 if plan.stage.fits else flops_per_token(model, plan, kind, teacher),
        fitting_flops=sum(calibration_flops(model, plan).values()) if plan.stage.fits else 0.0,
        memory={name: size for name, size in memory.device.items() if size},
        peak=memory.peak,
        host=memory.host(min(plan.run.ranks, NODE)),
        disk=disk_bytes(plan, model, keep),
        may_end_early=plan.settings.early_stop is not None,
    )


def expected_rate(found: Forecast, mfu: float | None = None) -> Rate | None:
    """Return the speed to expect: a share of the peak of the device, measured where no data sheet is known.

    Args:
        found: what is to run.
        mfu: share of the peak; None is a usual one.

    Returns:
        None where the device is neither here nor named.
    """
    mfu = mfu or MFU[found.device]
    if found.gpu is not None:
        peak, fp32 = (cast(float, named_peak(found.gpu, precision)) for precision in (found.precision, "fp32"))
        origin = f"the peak of {found.gpu} by its data sheet"
    elif found.device == "cuda" and not torch.cuda.is_available():
        return None
    else:
        peak, source = peak_flops(torch.device(found.device), found.precision)
        fp32 = peak if found.precision == "fp32" else peak_flops(torch.device(found.device), "fp32")[0]
        origin = "the peak of this machine" + (" as measured now" if source == "measured" else " by its data sheet")
    ranks = f", {found.ranks} ranks" if found.ranks > 1 else ""
    return Rate(peak * found.ranks * mfu, fp32 * mfu, f"{100 * mfu:g} % of {origin}{ranks}", found.ranks)


def forecast_text(found: Forecast, rate: Rate | None = None, price: float | None = None) -> str:
    """Return a forecast for people: the verdict first, totals, a line for each stage, warnings last; 80 columns.

    Args:
        found: what is expected.
        rate: speed of the machine; None: it is not known, and no time is said.
        price: of a device for an hour, in any currency.
    """
    lines = [_verdict(found, rate, price), ""]
    recurrent = sum(layer["kind"] == "rwkv" for layer in found.layers)
    marks = "".join({"attention": "A"}.get(x["kind"], "W" if "window" in x else "R") for x in found.layers)
    lines += [
        f"{found.teacher}: {found.model_type}, {rounded_count(found.parameters)} parameters, "
        f"{recurrent} of {len(found.layers)} layers recurrent",
        *(marks[i : i + 64] for i in range(0, len(marks), 64)),
        "R recurrent" + ", W with a window" * ("W" in marks) + ", A keeps attention" * ("A" in marks),
        "",
        f"{'stage':<12}{'tokens':>10}{'steps':>8}{'work':>14}{'time':>11}{'memory':>12}{'disk':>12}",
    ]
    for stage in found.stages:
        lines.append(_row(stage, f"{stage.steps:,}", rate))
    lines.append(_row(found, "", rate))
    lines.append("")
    if rate is not None:
        lines += [
            f"time: {rounded_flop(rate.flops)}/s, {rate.origin};",
            "      without evaluating, saving and what is computed again",
        ]
    lines.append(
        f"memory: of one of {found.ranks} devices, {found.device} in {found.precision}"
        if found.ranks > 1
        else f"memory: on {found.device}, in {found.precision}"
    )
    if found.host_per_node:
        shared = f" that {min(found.ranks, NODE)} ranks share" if found.ranks > 1 else ""
        lines.append(f"host: up to {rounded_bytes(found.host_per_node)} of the memory of a machine{shared}")
    if found.may_end_early:
        lines.append(f"early stop: {', '.join(found.may_end_early)} may end before all tokens are read")
    if rate is not None and found.device == "cpu" and found.seconds(rate) > LONG:
        lines.append("warning: too long for a CPU; --gpu H100 plans it for a GPU")
    lines += [f"warning: {text}" for text in found.warnings]
    return "\n".join(lines) + "\n"


def _verdict(found: Forecast, rate: Rate | None, price: float | None) -> str:
    """Return in one line whether it fits, how long it takes and what that costs, or what to try where it does not."""
    peak, each = rounded_bytes(found.peak), f" on each of {found.ranks}" if found.ranks > 1 else ""
    if found.fits is None:
        card = card_for(found.peak)
        fits, verdict = card is not None, f"fits a GPU of {card} GB" if card else f"fits no GPU: {peak}{each}"
    elif found.gpu is not None:
        article = "an" if found.gpu[0].upper() in "AEFHILMNORSX" else "a"  # as the name is read
        where = f"{article} {found.gpu} of {(found.available or 0) / 1e9:g} GB: {peak}{each}"
        fits, verdict = found.fits, f"fits {where}" if found.fits else f"does not fit {where}"
    else:
        here = f"the {'GPU' if found.device == 'cuda' else 'memory'} of this machine"
        sizes = f"{peak} of {rounded_bytes(found.available or 0)}{each}"
        fits, verdict = found.fits, f"fits: {sizes}" if found.fits else f"does not fit {here}: {sizes}"
    if not fits:
        variant = "multi-card" if found.ranks > 1 else "one-card" if found.device == "cuda" else "small-machine"
        return verdict if found.variants else f"{verdict}; try --variant {variant}"
    if rate is None:
        return verdict
    seconds = found.seconds(rate)
    time = f"{'at most ' * bool(found.may_end_early)}about {rounded_time(seconds)}"
    if found.device == "cpu" and seconds > LONG:
        return f"{verdict}, but takes {time} on this CPU"
    hours = seconds / 3600 * found.ranks
    parts = [verdict, time]
    if found.device == "cuda":
        parts.append(f"{hours:.3g} GPU hours")
    if price is not None:
        parts.append(f"cost {hours * price:,.2f}")
    return "; ".join(parts)


def _row(part: StageForecast | Forecast, steps: str, rate: Rate | None) -> str:
    """Return a line of a stage, or of all."""
    name = part.name if isinstance(part, StageForecast) else "all"
    time = "-" if rate is None else rounded_time(part.seconds(rate))
    sizes = rounded_bytes(part.peak), rounded_bytes(part.disk)
    work = rounded_flop(part.flops)
    return f"{name:<12}{rounded_count(part.tokens):>10}{steps:>8}{work:>14}{time:>11}{sizes[0]:>12}{sizes[1]:>12}"
