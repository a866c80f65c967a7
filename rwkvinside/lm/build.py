"""From the settings of a language model that is trained from nothing to the configuration of a run.

The run is one of the same stages, trainer and records as a conversion: `teacher` has the shapes and is `fresh`, the
student's mixers begin from `scratch`, and its stage is `pretrain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config.load import REFERENCE, check_section, load_config, merge_settings, read_settings
from ..config.schema import Config
from ..config.teacher_lookup import shipped
from ..errors import UserError
from ..families.registry import FAMILIES
from ..stages.pretrain import Pretrain
from ..support.text import did_you_mean, listed, nearest
from ..teacher.settings import TeacherConfig
from .settings import LanguageModelConfig, ModelShape

STAGE = "pretrain"
STEP = 64  # sizes that are not given are multiples of it, as products of matrices like


def load_lm_config(
    config: str = "model_3b_rwkv",
    *,
    train: Sequence[str] = (),
    val: Sequence[str] = (),
    out: str | None = None,
    max_seq_length: int | None = None,
    seed: int | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """Return the configuration of a run that trains a language model from nothing.

        config = load_lm_config("tiny", train=["train.txt"], val=["val.txt"], out="run")
        rw.train(config)

    Args:
        config: name of a shipped model (tiny, model_3b, model_3b_rwkv) or a YAML file: keys of `LanguageModelConfig`
            beside those of a run.
        train, val: texts.
        out: run directory.
        max_seq_length: tokens of a row.
        seed: of weights and order of the data.
        overrides: `key=value`, later ones beat earlier ones, and all of them the arguments above.

    Raises:
        UserError: lists what is wrong.
    """
    flags: dict = {"data": {name: listed(paths) for name, paths in (("train", train), ("val", val)) if paths}}
    flags |= {name: value for name, value in (("out", out), ("seed", seed)) if value is not None}
    if max_seq_length is not None:
        flags["stages"] = {STAGE: {"data": {"seq_len": max_seq_length}}}
    user = merge_settings([_read(config), flags, *read_settings((), overrides)])
    own = {name: user.pop(name) for name in list(user) if _is_own(name)}
    lm = check_section(LanguageModelConfig, own, hint=REFERENCE)
    layers = [_run_settings(lm, user), user]
    if not lm.use_rwkv:
        layers.append({"student": {"attention_layers": list(range(lm.model.num_hidden_layers))}})
    loaded = load_config(layers)
    if lm.use_rwkv and loaded.student.attention_layers == tuple(range(lm.model.num_hidden_layers)):
        raise UserError("student.attention_layers leaves no layer to RWKV", "say so with use_rwkv=false")
    return loaded


def _is_own(name: str) -> bool:
    """Return whether a section or setting is one of `LanguageModelConfig`, or was meant to be."""
    known = LanguageModelConfig.model_fields
    return name in (*known, *LanguageModelConfig.known_as) or (
        name not in Config.model_fields and nearest(name, known) is not None
    )


def _run_settings(lm: LanguageModelConfig, user: dict) -> dict:
    """Return the settings of a run that follow from those of a language model.

    Args:
        lm: of the model.
        user: what is configured beside it, which beats the result.

    Raises:
        UserError: a family, a layout or a knob that cannot be.
    """
    student = user.get("student")
    preset = student.get("preset", "x070") if isinstance(student, dict) else "x070"
    longest = _longest_row(lm.model, user)
    fields = _model_fields(lm, longest)
    defaults = Pretrain.defaults(fields["hidden_size"], fields["max_position_embeddings"])
    # RWKV-7's own training code gives the decay's bias twice the rate
    decaying = lm.use_rwkv and not lm.rwkv_use_linear_att
    stage = {
        "objective": Pretrain.objective,
        "data": {"seq_len": min(longest, defaults["data"]["seq_len"])},
        "optim": {"rates": {r".*\.w0": "2x"}} if decaying else {},
    }
    return {
        "teacher": {"path": lm.tokenizer, "fresh": True, "config": fields},
        "student": {"init": "scratch", "preset": preset, "attention_layers": "alternating"} | _knobs(lm, preset),
        "data": {"end_of_text": True},  # nobody else teaches the model to end
        "run": [STAGE],
        "stages": {STAGE: stage},
    }


def _model_fields(lm: LanguageModelConfig, longest: int) -> dict:
    """Return the fields of the model's Hugging Face configuration.

    Args:
        lm: of the model.
        longest: tokens of the longest row that it is trained on.

    Raises:
        UserError: an unknown family, heads that do not divide the width, tied embeddings.
    """
    shape = lm.model
    if shape.family not in FAMILIES:
        raise UserError(
            f"model.family {shape.family!r} is not known{did_you_mean(shape.family, FAMILIES)}",
            f"families: {', '.join(FAMILIES)}",
        )
    if shape.fields.get("tie_word_embeddings"):
        raise UserError("model.fields has tie_word_embeddings: training keeps two matrices", "leave it out")
    if shape.head_dim is None and shape.hidden_size % shape.num_attention_heads:
        raise UserError(
            f"model.num_attention_heads {shape.num_attention_heads} does not divide hidden_size {shape.hidden_size}",
            "give heads that do, or model.head_dim",
        )
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads or shape.num_attention_heads,
        "head_dim": shape.head_dim or shape.hidden_size // shape.num_attention_heads,
        "intermediate_size": shape.intermediate_size or STEP * round(8 / 3 * shape.hidden_size / STEP),
        "max_position_embeddings": max(shape.max_position_embeddings or longest, longest),
        "tie_word_embeddings": False,
    }
    return {"model_type": shape.family} | sizes | _ids(lm) | shape.fields


def _read(config: str) -> dict:
    """Return the content of a YAML file, or of a shipped one by its name or by where it is in the repository."""
    if Path(config).is_file():
        return read_settings([config])[0]
    known = shipped("lm")
    name = Path(config).stem
    if config not in (name, f"configs/lm/{name}.yaml") or name not in known:
        raise UserError(
            f"configuration {config} is neither a file nor a shipped model{did_you_mean(name, known)}",
            f"shipped: {', '.join(known)}",
        )
    return known[name]


def _ids(lm: LanguageModelConfig) -> dict:
    """Return the size of the vocabulary, and which tokens begin and end a text.

    None is padding: transformers would never train its embedding, and it may be the token that ends a text.
    """
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if lm.model.vocab_size is not None:  # no tokenizer is needed to plan
        ids["vocab_size"] = lm.model.vocab_size
        return ids
    from ..teacher.load import open_tokenizer

    tokenizer = open_tokenizer(TeacherConfig(path=lm.tokenizer, fresh=True))
    ids |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return ids | {"vocab_size": -(-len(tokenizer) // STEP) * STEP}


def _longest_row(shape: ModelShape, user: dict) -> int:
    """Return the tokens of the rows that are configured, else what the stage would choose."""
    at: object = user
    for name in ("stages", STAGE, "data", "seq_len"):
        at = at.get(name) if isinstance(at, dict) else None
    if isinstance(at, int) and not isinstance(at, bool):
        return at  # what it may be, the stage's own check says
    return Pretrain.defaults(shape.hidden_size, shape.max_position_embeddings or 2**31)["data"]["seq_len"]


def _knobs(lm: LanguageModelConfig, preset: object) -> dict:
    """Return the student's settings of the rwkv_* knobs; a model of attention alone is read in chunks, too.

    Raises:
        UserError: a knob that would change nothing: there is no RWKV layer, or its mixer has no such part.
    """
    knobs = {
        "rwkv_time_mix_ratio": ("shift_ratio", lm.rwkv_time_mix_ratio, 1.0, "token shift"),
        "rwkv_use_linear_att": ("linear_attention", lm.rwkv_use_linear_att, False, "group norm, which it needs"),
        "rwkv_att_scale": ("output_scale", lm.rwkv_att_scale, 1.0, None),
    }
    for name, (_, value, default, part) in knobs.items():
        if value == default:
            continue
        if not lm.use_rwkv:
            raise UserError(f"{name}={value} would change nothing: use_rwkv is false", "leave one of them out")
        if part and preset != "x070":
            raise UserError(f"{name}={value}: mixer {preset} has no {part}", "use student.preset=x070, or leave it out")
    settings = {field: value for field, value, _, _ in knobs.values()}
    return settings | {"chunk_size": lm.rwkv_chunk_size}
