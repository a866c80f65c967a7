"""The configuration of a conversion: typed models with one sentence per field, checked as a whole.

How files, flags and `key=value` become one of these is in `loading.py`; stage defaults are in `defaults.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_count(value: Any) -> Any:
    """600k, 2.5M, 1B or a plain number as an int."""
    text = "" if isinstance(value, bool) else str(value).strip()
    match = re.fullmatch(r"([0-9][0-9_]*(?:\.[0-9]+)?)([kKmMbB]?)", text)
    number = float(match[1].replace("_", "")) * SUFFIXES[match[2].lower()] if match else 0.0
    if number < 1 or number != int(number):
        raise PydanticCustomError("count", "must be a positive number such as 600k, 100M, 1B or 4096")
    return int(number)


Count = Annotated[int, BeforeValidator(parse_count)]


Positive = Annotated[int, Field(ge=1)]


Fraction = Annotated[float, Field(ge=0, le=1)]


Rate = Annotated[float, Field(ge=0)]


MixtureWeights = list[Annotated[float, Field(gt=0)]]


def _check_weights(train: list[str], weights: MixtureWeights | None) -> None:
    if weights is not None and len(weights) != len(train):
        raise _problem("has {} weights for {} sources in train; give one for each", len(weights), len(train))


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherConfig(_Model):
    path: str = Field(description="Local directory or hub id; when read also the name of a recipe.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the tokenizer.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Type the weights are loaded in; precision fp32 makes them fp32; auto: fp32 on CPU, else bf16.",
    )
    config: dict[str, Any] | None = Field(
        None, description="The teacher's Hugging Face configuration, so that planning needs no network."
    )


class RanksConfig(_Model):
    decay: Positive | None = Field(None, description="Rank of the decay's low-rank part; null: by the model's width.")
    iclr: Positive | None = Field(None, description="Rank of the in-context learning rate; null: by the model's width.")
    value: Positive | None = Field(None, description="Rank of the mix with v_first; null: by the model's width.")
    key: Positive | None = Field(None, description="Rank of the mix with k_first; null: by the model's width.")
    gate: Positive | None = Field(None, description="Rank of the output gate; null: by the model's width.")


class StudentConfig(_Model):
    preset: Literal["cxa079", "hxa079", "hxa07a", "hxa07b", "hxa07c", "cxa078", "cxa076r", "rad", "x070"] = Field(
        "cxa079", description="Variant of the RWKV mixer, see docs/mixer.md."
    )
    attention_layers: tuple[int, ...] = Field((), description="Indices of layers that keep the teacher's attention.")
    key_scale: Literal["decay", "log"] | None = Field(
        "decay", description="Scale of the key; log is how older checkpoints were trained; null: the preset's."
    )
    key_residual: bool | None = Field(None, description="Mix keys with those of the first mixer; null: the preset's.")
    init: Literal["calibrated", "published"] = Field(
        "calibrated", description="Start of the mixers: ready for calibration, or the constants of the published code."
    )
    detach_first: bool = Field(False, description="No gradient from later layers into v_first and k_first.")
    backend: Literal["auto", "reference", "chunked", "native", "triton"] = Field(
        "auto", description="Implementation of the recurrence; auto: native on a CPU, triton on a GPU, if they can run."
    )
    precision: Literal["auto", "fp32", "high", "balanced", "fast"] = Field(
        "auto", description="Products of the triton backend; auto: fp32 for fp32 inputs, else balanced."
    )
    attention_rope: bool = Field(True, description="Layers that keep attention go on rotating queries and keys.")
    ranks: RanksConfig = Field(RanksConfig(), description="Ranks of the low-rank parts.")

    @field_validator("attention_layers")
    @classmethod
    def _layers(cls, layers: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if twice := sorted({i for i in layers if layers.count(i) > 1}):
            raise _problem("has layer {} twice; name each layer once", *twice)
        count = (info.context or {}).get("num_layers")
        if count is not None:
            if bad := sorted(i for i in layers if not 0 <= i < count):
                raise _problem("has layer {}, but the teacher has layers 0 to {}", ", ".join(map(str, bad)), count - 1)
            if len(layers) == count:
                raise _problem("keeps all {} layers; leave at least one to convert", count)
        return tuple(sorted(layers))


class QuantizeConfig(_Model):
    groups: list[str] = Field(
        [], description="Frozen linear layers to quantize: mlp, attention, teacher, mixer.proj, head; or expressions."
    )
    format: Literal["nf4", "fp4", "int8"] = Field("nf4", description="Type of the quantized weights (bitsandbytes).")
    double: bool = Field(True, description="Quantize the scales of nf4 and fp4 too.")
    block: Literal[32, 64, 128] = Field(64, description="MixtureWeights of nf4 and fp4 that share a scale.")
    rounding: Literal["nearest", "inputs"] = Field(
        "nearest",
        description="To the nearest value, or, nf4 and fp4, as suits the inputs of layers (GPTQ, GPTAQ).",
    )


class AdapterConfig(_Model):
    kind: Literal["lora", "miss", "bone"] = Field(
        "lora", description="PEFT method; bone is MiSS in its `bat` form, which is what Bone became."
    )
    groups: list[str] = Field(["mlp"], min_length=1, description="Groups of linear layers, or regular expressions.")
    rank: Positive = Field(16, description="Rank (lora) or block size (miss, bone).")
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="Scale of lora; null: twice the rank.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout in front of the adapter.")
    rank_stabilized: bool = Field(False, description="lora: divide alpha by the root of the rank (rsLoRA).")
    dora: bool = Field(False, description="lora: weight-decomposed (DoRA).")
    init: Literal["default", "pissa"] = Field(
        "default", description="lora: start at zero, or from principal components of the weight (PiSSA)."
    )


class DataConfig(_Model):
    train: list[str] = Field(
        [], description="Files, directories, packed or .idx data, or hub:NAME[:config] to train on."
    )
    weights: MixtureWeights | None = Field(
        None, description="Share of the tokens of each entry of train; null: every document once an epoch."
    )
    stream: bool = Field(False, description="Read and tokenize train while training runs, block by block.")
    block_tokens: Count = Field(
        4_000_000, description="Tokens of a streamed block, in which documents are shuffled; a chunk more at most."
    )
    val: list[str] = Field([], description="The same to validate on; empty: a part of the training documents.")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01, description="Part of the training documents, chosen by their hash, kept for validation when val is empty."
    )
    val_tokens: Count = Field(100_000, description="At most this many validation tokens are read.")
    cache_dir: str | None = Field(None, description="Where tokenized data is kept; null: the user's cache directory.")
    text_column: str = Field("text", description="Field or column that holds a document's text.")
    rotate_options: bool = Field(
        True, description="Every multiple-choice question once with each rotation of its options; false: as it stands."
    )
    check_ids: bool = Field(
        True, description="Refuse token ids in the data that the teacher's tokenizer would not have given."
    )

    @model_validator(mode="after")
    def _mixture(self) -> DataConfig:
        _check_weights(self.train, self.weights)
        if self.stream and self.weights is None and len(self.train) > 1:
            raise _problem("stream reads one source after the other; give weights to mix {}", len(self.train))
        return self


class StageData(_Model):
    seq_len: Annotated[int, Field(ge=2)] = Field(description="Tokens of a row.")
    train: list[str] | None = Field(None, description="Data of this stage alone; null: data.train.")
    weights: MixtureWeights | None = Field(None, description="As data.weights, for this stage's own train.")
    loss_on: Literal["completions", "all"] = Field(
        "completions", description="Of conversations and prompts with completions; all: every token is a target."
    )

    @model_validator(mode="after")
    def _mixture(self) -> StageData:
        _check_weights(self.train or [], self.weights)
        return self

    @field_validator("seq_len")
    @classmethod
    def _within_teacher(cls, seq_len: int, info: ValidationInfo) -> int:
        longest = (info.context or {}).get("max_positions")
        if longest is not None and seq_len > longest:
            raise _problem("is longer than the {} positions that the teacher was made for", longest)
        return seq_len


class BatchConfig(_Model):
    tokens: Count = Field(description="Tokens of an optimizer step over all ranks.")
    micro_rows: Positive | None = Field(None, description="Rows that run at a time on a rank; null: about 4096 tokens.")


class DecayConfig(_Model):
    shape: Literal["cosine", "linear"] = Field("cosine", description="Curve from the learning rate to lr_final.")
    start: Fraction = Field(0.0, description="Part of the stage's tokens after which the decay starts.")
    end: Fraction = Field(1.0, description="Part of the stage's tokens at which lr_final is reached.")

    @model_validator(mode="after")
    def _ordered(self) -> DecayConfig:
        if self.end < self.start:
            raise _problem("ends at {} before it starts at {}", self.end, self.start)
        return self


class OptimConfig(_Model):
    lr: Rate | None = Field(None, description="Learning rate of the mixers; null: by the teacher's width.")
    lr_rest: Rate | None = Field(None, description="Learning rate of all else; null: by the teacher's width.")
    rates: dict[str, Rate] = Field(
        {}, description="Learning rates of groups, or regular expressions over names; the first that matches counts."
    )
    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = Field(
        "adamw", description="AdamW with fp32 states, or bitsandbytes' with 8-bit ones, paged: on CUDA only."
    )
    lr_final: Rate | None = Field(
        None, description="Learning rate after the decay, of what was above it; null: from lr."
    )
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Steps of linear warm-up; null: 50, in a short stage a tenth, at least 10; sft 3 %."
    )
    decay: DecayConfig = Field(DecayConfig(), description="Decay of the learning rate.")
    clip: Rate = Field(1.0, description="Largest norm of the gradient; 0: no limit.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="Adam's two decay rates."
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon.")
    weight_decay: Rate = Field(0.0, description="Weight decay of matrices; vectors have none.")


class LossConfig(_Model):
    divergence: Literal["forward", "reverse", "js"] = Field(
        "forward", description="KL(teacher || student), KL(student || teacher), or Jensen-Shannon."
    )
    top_k: Positive | None = Field(
        None, description="Compare the teacher's k likeliest tokens and the mass of the rest; null: all tokens."
    )
    kl: Rate = Field(1.0, description="Weight of the divergence from the teacher.")
    ce: Rate = Field(0.0, description="Weight of the cross-entropy on the text.")
    temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="Temperature of the divergence.")
    chunk_tokens: Positive | None = Field(
        None, description="Tokens whose logits are in memory at a time; null: 331 of a vocabulary of 152k."
    )


class UnfreezeConfig(_Model):
    at_tokens: Count = Field(description="Tokens of the stage after which these join, with a warm-up of their own.")
    train: list[str] = Field(min_length=1, description="Groups or regular expressions that join `train`.")


class TeacherModelConfig(_Model):
    path: str | None = Field(None, description="Local directory or hub id; null: the model that is converted.")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository.")
    quantize: Literal["nf4", "fp4", "int8"] | None = Field(None, description="Quantize its linear layers.")
    shard: bool = Field(False, description="Shard its weights over the ranks (ZeRO-3 inference; needs a launcher).")


class StageConfig(_Model):
    objective: Literal["calibrate", "align", "distill", "sft"] = Field(description="What the stage minimizes.")
    tokens: Count = Field(description="Tokens to train on.")
    train: list[str] = Field([], description="Groups of parameters, or regular expressions over their names.")
    data: StageData = Field(description="Rows of this stage.")
    batch: BatchConfig = Field(description="Size of a step.")
    optim: OptimConfig | None = Field(None, description="Optimizer; calibrate has none.")
    loss: LossConfig | None = Field(None, description="Loss; of distill and sft only.")
    teacher: Literal["auto", "same", "separate", "cache"] = Field(
        "auto",
        description="The student's frozen weights, a second model, or logits on disk; auto: same where it is exact.",
    )
    teacher_model: TeacherModelConfig = Field(
        TeacherModelConfig(), description="The second model of teacher: separate."
    )
    teacher_cache: str | None = Field(
        None, description="For teacher: cache: directory that `rwkvinside data logits` wrote."
    )
    quantize: list[str] | None = Field(None, description="What this stage quantizes; null: quantize.groups.")
    unfreeze: list[UnfreezeConfig] = Field([], description="What starts to train later in the stage.")
    activation_checkpointing: bool = Field(False, description="Recompute activations in the backward.")
    evaluate_every_tokens: Count | None = Field(None, description="Evaluate this often; null: at the end of the stage.")

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if self.batch.tokens < self.data.seq_len:
            raise _problem("batch.tokens {} is less than data.seq_len {}", self.batch.tokens, self.data.seq_len)
        if self.objective == "calibrate" and (self.optim is not None or self.train or self.unfreeze):
            raise _problem("objective calibrate does not train: leave out optim, train and unfreeze")
        if self.objective != "calibrate" and not self.train:
            raise _problem("train is empty; name groups such as mixer, or regular expressions")
        if self.objective != "calibrate" and self.optim is None:
            raise _problem("optim is null; leave it out for the defaults")
        last = (self.steps - 1) * self.rows * self.data.seq_len
        if late := [entry.at_tokens for entry in self.unfreeze if entry.at_tokens > last]:
            raise _problem("unfreeze.at_tokens {} is after {}, where the last step begins", late[0], last)
        if self.objective in ("calibrate", "align") and self.loss is not None:
            raise _problem("objective {} has a fixed loss: leave out loss", self.objective)
        if self.objective in ("distill", "sft") and self.loss is None:
            raise _problem("loss is null; leave it out for the defaults")
        if self.objective == "distill" and not self.loss.kl:
            raise _problem("loss.kl must be positive; objective sft trains without a teacher")
        if self.objective == "sft" and (self.loss.kl or self.loss.ce != 1):
            raise _problem("objective sft has loss.kl 0 and loss.ce 1; objective distill mixes both")
        if self.objective == "sft" and self.loss != LossConfig(kl=0, ce=1, chunk_tokens=self.loss.chunk_tokens):
            raise _problem("objective sft has no divergence: leave out loss.divergence, loss.top_k, loss.temperature")
        self._check_teacher()
        return self

    def _check_teacher(self) -> None:
        second = self.teacher_model != TeacherModelConfig()
        if self.objective != "distill" and (self.teacher != "auto" or second or self.teacher_cache):
            raise _problem("only objective distill has a choice of teacher: leave out teacher, teacher_model and cache")
        if self.teacher == "same" and second:
            raise _problem("teacher same is the student itself: leave out teacher_model")
        if self.teacher == "cache" and not self.teacher_cache:
            raise _problem("teacher cache needs teacher_cache: the directory that `rwkvinside data logits` wrote")
        if self.teacher != "cache" and self.teacher_cache:
            raise _problem("teacher_cache {} is read by teacher cache only, not {}", self.teacher_cache, self.teacher)

    @property
    def rows(self) -> int:
        """Rows of an optimizer step."""
        return self.batch.tokens // self.data.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the stage."""
        return -(-self.tokens // (self.rows * self.data.seq_len))


class CheckpointConfig(_Model):
    every_steps: Positive = Field(500, description="Optimizer steps between checkpoints.")
    keep: Positive = Field(2, description="Checkpoints of a stage that stay on disk.")
    on_disk_full: Literal["stop", "continue"] = Field(
        "stop", description="When a checkpoint does not fit on the disk: stop the run, or go on to the next try."
    )


class DeepSpeedConfig(_Model):
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO shards: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer states in CPU memory.")
    offload_parameters: bool = Field(False, description="ZeRO 3: keep parameters in CPU memory.")
    bf16_weights: bool = Field(
        False, description="In bf16: DeepSpeed's own bf16 weights with fp32 masters; false: fp32 weights, autocast."
    )
    config: dict[str, Any] | None = Field(None, description="DeepSpeed's own settings (--deepspeed FILE), over ours.")


class Config(_Model):
    teacher: TeacherConfig = Field(description="The model to convert.")
    variant: list[str] = Field([], description="Shipped variants of the recipe, such as one-card; later beat earlier.")
    student: StudentConfig = Field(StudentConfig(), description="What it becomes.")
    quantize: QuantizeConfig = Field(QuantizeConfig(), description="Frozen weights in 4 or 8 bits.")
    adapters: list[AdapterConfig] = Field([], description="Adapters; they train in stages whose train has `adapters`.")
    data: DataConfig = Field(DataConfig(), description="Texts.")
    run: list[str] = Field(description="Stages to run, in order; each starts from the last one's result.")
    stages: dict[str, StageConfig] = Field(description="Settings by stage name; own names need an objective.")
    out: str = Field(description="Run directory; must be new or empty unless resumed.")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of initialization and data order.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto: cuda when there is one.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Arithmetic; bf16 keeps fp32 masters; auto: bf16 on cuda, fp32 on CPU."
    )
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="When to save, and how much is kept.")
    deepspeed: DeepSpeedConfig = Field(DeepSpeedConfig(), description="Used when started by a launcher.")
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        [], description="Where metrics go beside metrics.jsonl; each is an extra of the installation."
    )
    log_every: Positive = Field(10, description="Optimizer steps between lines on the console.")

    @field_validator("run")
    @classmethod
    def _each_once(cls, run: list[str]) -> list[str]:
        if not run:
            raise _problem("is empty; name at least one stage")
        if twice := sorted({name for name in run if run.count(name) > 1}):
            raise _problem("has {} twice; a second pass is a stage of its own name", ", ".join(twice))
        return run


def _problem(message: str, *values: Any) -> PydanticCustomError:
    return PydanticCustomError("problem", message.format(*values).replace("{", "{{").replace("}", "}}"))
