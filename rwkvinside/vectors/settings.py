"""Configuration of a run: model, data, loss, phases; and how it is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field, model_validator

from ..config.load import check_section, merge_settings, read_settings
from ..support.settings import Fraction, NotNegative, Positive, Rate, Section, problem
from ..training.settings import DecayConfig, OptimConfig

Beta = Annotated[float, Field(ge=0, lt=1)]
REFERENCE = "all fields: rwkvinside vectors fields"
WIDTH = 768  # of the study's vectors

# name -> settings of the model that a configuration may override; the first twelve are the study's
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "lstm": {"pattern": "lstm", "block": "plain"},
    "mamba2": {"pattern": "mamba2"},
    "lcm": {"pattern": "attention"},
    "rwkv7": {"pattern": "rwkv7"},
    "hyena": {"pattern": "hyena"},
    "retnet": {"pattern": "retnet"},
    "s4": {"pattern": "s4"},
    "gpt2": {"pattern": "gpt2"},
    "linformer": {"pattern": "linformer"},
    "performer": {"pattern": "performer"},
    "gru": {"pattern": "gru", "block": "plain"},
    "hybrid": {"pattern": "mamba2*5,attention"},
    "rwkv_gru": {"pattern": "rwkv_gru", "block": "plain"},
    "lcm_one": {"pattern": "attention", "diffusion": {"towers": "one"}},
    "lcm_two": {"pattern": "attention", "diffusion": {"towers": "two"}},
}


class DiffusionConfig(Section):
    """A head that denoises the next vector instead of predicting it at once (large concept models)."""

    towers: Literal["one", "two"] = Field("two", description="Denoise in the context's stack, or in one of its own.")
    denoiser_layers: Positive = Field(3, description="Blocks of the second tower.")
    train_steps: Positive = Field(100, description="Steps of the noise schedule.")
    steps: Positive = Field(20, description="DDIM steps of a prediction.")
    guidance: Rate = Field(1.0, description="Classifier-free guidance; 1: none.")
    drop: Fraction = Field(0.15, description="Part of the training rows without a context, for guidance.")
    noise: Rate = Field(0.6, description="Scale of the noise that a prediction starts from.")


class ModelConfig(Section):
    """A latent vector model."""

    known_as: ClassVar = {  # in the study
        "d_input": "model.d_in",
        "d_hidden": "model.d_model",
        "n_layers": "model.layers",
        "attn_every": "model.pattern; every sixth layer: mamba2*5,attention",
        "d_state": "model.options.mamba2.d_state, or of s4",
        "k": "model.options.linformer.k",
        "l_max": "model.options.hyena.l_max",
        "nb_features": "model.options.performer.features",
        "heads": "model.options.KIND.heads",
        "bidirectional": "model.options.lstm.bidirectional, or of gru",
        "d_tmd": "model.tmd: concat, film or mixer",
    }
    arch: Literal[tuple(ARCHITECTURES)] = Field("rwkv7", description="Architecture by name.")  # type: ignore[valid-type]
    pattern: str | None = Field(
        None,
        description="Kinds of layers as in mamba2*5,attention; with a bar between them they share a layer, as in "
        "mamba2|attention; null: the architecture's.",
    )
    options: dict[str, dict[str, Any]] = Field(
        {}, description="Options by kind of layer; a list gives the layers of a kind their values in turn."
    )
    d_in: Positive | None = Field(None, description="Width of the vectors; null: the data's.")
    d_model: Positive = Field(512, description="Width of the layers.")
    layers: Positive = Field(6, description="Number of layers.")
    block: Literal["plain", "residual"] | None = Field(
        None, description="Layers alone, or with norm, residual and feed-forward layer; null: the architecture's."
    )
    streams: Positive = Field(1, description="Stacks of layers side by side; their outputs are averaged.")
    skip_every: NotNegative = Field(0, description="Plain layers: a skip connection over so many; 0: none.")
    ffn: Rate = Field(4.0, description="Width of the feed-forward layers times d_model; 0: none.")
    adapter: Literal["affine_ln", "none"] = Field("affine_ln", description="Linear and LayerNorm before the layers.")
    dropout: Fraction = Field(0.1, description="Dropout after the head.")
    residual: Literal["none", "context_mean", "recent_mean"] = Field(
        "none",
        description="What the head predicts: the vector; what to add to the mean of the context; or to a mean in which "
        "vectors count less with age, started as the best such mean of the training data.",
    )
    normalize: bool = Field(True, description="L2-normalize the prediction.")
    readout: Literal["last", "attention"] = Field(
        "last", description="Head of the last hidden state, or of it and a weighted sum of all before it."
    )
    tmd: Literal["none", "concat", "film", "mixer"] = Field(
        "none", description="TMD codes: not, 16 more inputs, scale and shift (of a denoiser: its step), or in mixers."
    )
    pretrained: str | None = Field(
        None, description="GPT-2 that gpt2's blocks begin as, a directory or hub id such as distilgpt2; null: random."
    )
    quantize: NotNegative = Field(0, description="Codes of a vector quantizer after the adapter; 0: none.")
    resolutions: tuple[Positive, ...] = Field((), description="Widths of further heads on PCA-compressed targets.")
    diffusion: DiffusionConfig | None = Field(None, description="Denoise the next vector; null: the architecture's.")

    def resolved(self) -> ModelConfig:
        """Return the configuration with what its architecture says in place of null; without data the study's width."""
        values = {"pattern": None, "block": "residual", "diffusion": None, "d_in": WIDTH} | ARCHITECTURES[self.arch]
        if isinstance(values["diffusion"], dict):
            values["diffusion"] = DiffusionConfig(**values["diffusion"])
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return self.model_copy(update=missing)


class LossConfig(Section):
    """A weighted sum of losses; at least one has a weight."""

    cosine: Rate = Field(1.0, description="1 - cos(prediction, target).")
    mse: Rate = Field(0.0, description="Squared error, summed over the width.")
    infonce: Rate = Field(0.0, description="Cross-entropy of the target among all targets of the batch.")
    temperature: Annotated[float, Field(gt=0)] = Field(0.07, description="Of infonce.")
    consistency: Rate = Field(0.1, description="Heads of lower resolution against the compressed prediction.")
    positions: Literal["all", "last"] = Field("all", description="Predict after every vector, or the last one only.")
    loop_every: NotNegative = Field(0, description="Decoder in the loop every so many steps; 0: never.")
    loop_decoder: str = Field("retrieval", description="Decoder in the loop, as of `vectors decode`.")
    loop: Rate = Field(0.1, description="Weight of the distance to what was decoded and encoded again.")

    @model_validator(mode="after")
    def _something(self) -> LossConfig:
        if not self.cosine + self.mse + self.infonce:
            raise problem("cosine, mse and infonce are all 0: nothing to train on")
        return self


class DataConfig(Section):
    """Vectors and windows of them."""

    source: str = Field("synthetic:rotor-lin", description="Directory of `vectors embed`, or synthetic:NAME.")
    context: Positive = Field(5, description="Vectors of a window before the one to predict.")
    val: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Part of the documents that validates.")
    limit: Positive | None = Field(None, description="At most so many training windows; null: all.")
    reverse: bool = Field(False, description="Read documents backward: the control for the direction of text.")


class PhaseConfig(Section):
    """A phase of training; what is null is that of the run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] = Field(description="Name, of its folder too.")
    steps: Positive | None = Field(None, description="Optimizer steps.")
    lr: Rate | None = Field(None, description="Learning rate.")
    limit: Positive | None = Field(None, description="At most so many training windows.")
    band: tuple[float, float] | None = Field(
        None, description="Only windows whose last vector has a cosine in this range with the target."
    )
    loss: LossConfig | None = Field(None, description="Loss.")
    dropout: Fraction | None = Field(None, description="Dropout after the head.")


class AdamWConfig(Section):
    """The optimizer: AdamW with fp32 states."""

    lr: Rate = Field(1e-3, description="Learning rate.")
    lr_final: Rate | None = Field(None, description="Learning rate after the decay; null: a tenth.")
    warmup_steps: NotNegative | None = Field(None, description="Steps of linear warm-up; null: a tenth.")
    decay: DecayConfig = Field(DecayConfig(), description="Decay of the learning rate.")
    clip: Rate = Field(1.0, description="Largest norm of the gradient; 0: no limit.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="Adam's two decay rates.")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon.")
    weight_decay: Rate = Field(0.0, description="Weight decay of linear layers and embeddings; all else has none.")

    def for_engine(self) -> OptimConfig:
        """Return what the engine reads of it."""
        return OptimConfig(**self.model_dump())


class TrainingConfig(Section):
    """What all trainings here share."""

    out: str = Field("runs/vectors", description="Run directory.")
    seed: int = Field(0, description="Of weights, order of rows, noise.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to compute; auto: a GPU if there is one.")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Arithmetic of training.")
    steps: Positive = Field(400, description="Optimizer steps of a phase.")
    batch: Positive = Field(32, description="Windows, or texts, of a step.")
    evaluate_every: NotNegative = Field(100, description="Steps between evaluations; 0: after the last only.")
    save_every: NotNegative = Field(0, description="Steps between checkpoints; 0: after the last only.")
    log_every: Positive = Field(100, description="Steps between lines on the console.")
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field((), description="As for conversions.")
    optim: AdamWConfig = Field(AdamWConfig(), description="The optimizer.")

    def identity(self) -> dict:
        """Return the settings that decide what is computed, as JSON values."""
        return self.model_dump(mode="json", exclude={"out", "log_every", "minutes", "loggers"})


class RunConfig(TrainingConfig):
    """A training run."""

    minutes: Annotated[float, Field(gt=0)] | None = Field(None, description="Time limit of training; null: none.")
    model: ModelConfig = Field(ModelConfig(), description="The model.")
    data: DataConfig = Field(DataConfig(), description="The data.")
    loss: LossConfig = Field(LossConfig(), description="The loss.")
    phases: tuple[PhaseConfig, ...] = Field((), description="Phases in order; empty: one, called train.")

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise problem("phases are named {}: each needs a name of its own", ", ".join(names))
        return self

    def all_phases(self) -> tuple[PhaseConfig, ...]:
        """Return the phases, with the settings of the run in place of null."""
        defaults = {"steps": self.steps, "lr": self.optim.lr, "limit": self.data.limit, "loss": self.loss}
        defaults["dropout"] = self.model.dropout
        phases = self.phases or (PhaseConfig(name="train"),)
        return tuple(
            phase.model_copy(update={n: v for n, v in defaults.items() if getattr(phase, n) is None})
            for phase in phases
        )


class InverterAdamWConfig(AdamWConfig):
    """The optimizer of an inverter."""

    lr: Rate = Field(3e-3, description="Learning rate.")


class InverterConfig(TrainingConfig):
    """A small model that writes the text of a vector, see `decoders.inverter`."""

    out: str = Field("runs/inverter", description="Directory of the inverter.")
    steps: Positive = Field(800, description="Optimizer steps.")
    optim: InverterAdamWConfig = Field(InverterAdamWConfig(), description="The optimizer.")
    source: str = Field("vectors/stories", description="Directory of `vectors embed`.")
    val: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="Part of the documents that validates.")
    all_documents: bool = Field(False, description="Train on the documents that validate, too; then nothing does.")
    d_model: Positive = Field(192, description="Width.")
    heads: Positive = Field(4, description="Of attention.")
    encoder_layers: Positive = Field(1, description="Layers that read the vector.")
    layers: Positive = Field(2, description="Layers that write.")
    slots: Positive = Field(8, description="Tokens that the vector becomes.")
    vocab: Annotated[int, Field(ge=300)] = Field(2048, description="Size of the vocabulary, of the training texts.")
    longest: Positive = Field(64, description="Tokens of a text; longer ones are cut.")
    noise: Rate = Field(0.3, description="Length of the noise on training vectors, relative to theirs.")

    @model_validator(mode="after")
    def _heads_fit(self) -> InverterConfig:
        if self.d_model % self.heads:
            raise problem("heads={} does not divide d_model={}", self.heads, self.d_model)
        return self


Settings = TypeVar("Settings", bound=TrainingConfig)


def load_config(
    kind: type[Settings], files: Sequence[str | os.PathLike] = (), overrides: Sequence[str] = (), **more: Any
) -> Settings:
    """Return the configuration that files, `key=value` overrides and further settings make together; later ones win.

    Args:
        kind: of the configuration.
        files: YAML.
        overrides: as on a command line.
        more: further settings; None: not set.

    Raises:
        UserError: lists all problems.
    """
    layers = [*read_settings(files, overrides), {k: v for k, v in more.items() if v is not None}]
    return checked(kind, merge_settings(layers))


def checked(kind: type[Settings], values: dict) -> Settings:
    """Return settings as a configuration (`UserError`: lists all problems)."""
    return check_section(kind, values, hint=REFERENCE)


def write_config(config: TrainingConfig, path: Path) -> None:
    """Write a configuration as YAML (`UserError`: it cannot be written)."""
    from ..support.files import write_text

    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100))
