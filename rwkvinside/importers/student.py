"""Which student a checkpoint is: its variant, layers and ranks, from the names and shapes of its tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from ..errors import UserError
from ..families.registry import FAMILIES, find
from ..hybrid.settings import StudentConfig
from ..modeling.mixer_presets import PRESETS
from ..support.text import did_you_mean
from .files import check_finite, read_tensors
from .names import Form, Names

VARIANTS = [name for name, preset in PRESETS.items() if preset["key_scale"] != "k_a"]  # of earlier conversions
RANKS = {"w1": "decay", "a1": "iclr", "v1": "value", "k1": "key", "g1": "gate"}
RESIDUAL = {f"{name}{i}" for name in "vk" for i in range(3)}  # of the mixes with the first RWKV layer
STOCK = {"x_r", "k_k", "k_a", "ln_x.weight"}
ADAPTERS = (".lora_", ".bone", ".miss_", ".diff")
NO_ROTATION = ("hxa079", "hxa07a")  # published hybrids, whose kept attention has no positions
# What a published config.json must say as the teacher's does, where both say it
SHARED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")


@dataclass(frozen=True)
class Student:
    """A student as a checkpoint has it.

    Attributes:
        form: whose names the file has.
        spec: what the student is.
        tensors: by canonical name, as the file has them; without those that nothing reads.
    """

    form: Form
    spec: StudentConfig
    tensors: dict[str, Tensor]


def read_student(
    path: Path, teacher: PretrainedConfig, *, preset: str | None = None, attention_rope: bool | None = None
) -> Student:
    """Return the student in a checkpoint.

    Args:
        path: a file, or a directory of shards.
        teacher: configuration of the model that it was made from.
        preset: the variant; None: as names and shapes say.
        attention_rope: whether kept attention rotates; None: as published hybrids of its variant.

    Raises:
        UserError: a damaged file, tensors of something else, a variant that has to be named.
    """
    if preset is not None and preset not in VARIANTS:
        raise UserError(f"--preset {preset}{did_you_mean(preset, VARIANTS)}", f"allowed: {', '.join(VARIANTS)}")
    names = _names(teacher)
    read = read_tensors(path)
    form = names.form_of(read)
    tensors = {here: read[name] for name, here in names.canonical(read, form).items()}
    if adapted := [name for name in tensors if any(part in name for part in ADAPTERS)]:
        raise UserError(f"{path} has adapters that are not merged, such as {adapted[0]}", "merge them first")
    published = _published(path, teacher) if form is Form.HUGGING_FACE else {}
    layers = _mixer_parts(path, names, tensors, teacher.num_hidden_layers)
    first, *others = sorted(layers)
    parts = layers[others[0] if others else first]
    preset = preset or _preset(path, parts, published.get("rwkv_architecture"))
    kept = tuple(i for i in range(teacher.num_hidden_layers) if i not in layers)
    config = PRESETS[preset]
    if config is PRESETS["cxa079"]:  # two names of one mixer
        preset = "hxa079" if kept else "cxa079"
    mixes = config["key_residual"] or config["value_path"].startswith("residual")
    if mixes and first and form is Form.TRAINING:
        raise UserError(
            f"{path} is of a model whose layer 0 keeps attention: the earlier project took the values that its layers "
            f"mix in from there, and here they are those of layer {first}",
            "such a model cannot be imported",
        )
    if mixes:  # the first layer has them where programs read them without need
        unread = [(first, name) for name in RESIDUAL]
        tensors = {name: tensor for name, tensor in tensors.items() if names.mixer_part(name) not in unread}
    check_finite(path, tensors)
    spec = StudentConfig.model_validate(
        {
            "preset": preset,
            "init": "published",
            "key_scale": config["key_scale"],
            "attention_layers": kept,
            "attention_rope": True if not kept else _rotates(path, form, preset, published, attention_rope),
            "ranks": _ranks(path, {i: parts for i, parts in layers.items() if i != first or not others}),
        }
    )
    return Student(form, spec, tensors)


def _names(teacher: PretrainedConfig) -> Names:
    """Return the names of a teacher's students; refuse one whose mixers have another order of dimensions here."""
    family = find(teacher.model_type)
    size = family.attention_fields(teacher, 0)["head_size"]
    if family.llama_layers and family.rotated(teacher, size) == size:
        return Names(family)
    works = ", ".join(name for name in FAMILIES if find(name).llama_layers)
    raise UserError(
        f"the teacher's family is {teacher.model_type}, and mixers of such teachers differ between programs",
        f"checkpoints of these are imported, where all of each head rotates: {works}",
    )


def _published(path: Path, teacher: PretrainedConfig) -> dict:
    """Return config.json of a directory, {} of a file, after comparing it with the teacher's."""
    file = path / "config.json"
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if "mixer" in config:
            raise UserError(
                f"{path} is an export of this program", "eval, chat and generate take it as it is; training, its run"
            )
        for name in SHARED:
            if name in config and (own := getattr(teacher, name, None)) is not None and config[name] != own:
                raise UserError(
                    f"{file} says {name} = {config[name]!r}, the teacher has {own!r}",
                    "name the model that it was made from with --teacher",
                )
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}", "restore the file") from error
    return config


def _mixer_parts(path: Path, names: Names, tensors: Mapping[str, Tensor], count: int) -> dict[int, dict[str, Tensor]]:
    """Return the tensors of each RWKV layer's mixer by their names in it."""
    inside: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (part := names.mixer_part(name)) is not None:
            inside.setdefault(part[0], {})[part[1]] = tensor
    if inside and max(inside) >= count:
        raise UserError(
            f"{path} has layer {max(inside)}, the teacher has layers 0 to {count - 1}",
            "name the model that it was made from with --teacher",
        )
    layers = {i: parts for i, parts in inside.items() if "receptance.weight" in parts or "w1" in parts}
    if not layers:
        raise UserError(f"{path} has no RWKV layer: none has receptance.weight", "name a checkpoint of a student")
    if stock := sorted(STOCK.intersection(name for parts in layers.values() for name in parts)):
        raise UserError(f"{path} is a stock RWKV-7 model ({stock[0]}), not a converted one", "it cannot be imported")
    return layers


def _preset(path: Path, parts: Mapping[str, Tensor], named: str | None) -> str:
    """Return the variant of a mixer that is not the first one."""
    if named in PRESETS:
        return named
    if "k0" in parts:
        return "cxa079"
    if "v0" in parts and "r_k" not in parts:
        return "rad"
    if "v0" in parts:
        choice = ("cxa078", "cxa076r")
    elif "v1" in parts:
        choice = ("hxa07b", "hxa07c")
    else:
        return "hxa07a"
    different = {"cxa078": "rotation", "hxa07b": "key scale"}[choice[0]]
    raise UserError(
        f"{path} is {' or '.join(choice)}: their tensors are the same, their {different} is not",
        f"say which with --preset {' or --preset '.join(choice)}",
    )


def _rotates(path: Path, form: Form, preset: str, published: Mapping, given: bool | None) -> bool:
    """Return whether the attention that layers keep rotates."""
    if given is not None:
        return given
    if form is Form.RWKV_INFER or published.get("rwkv_architecture") in NO_ROTATION:
        return False
    raise UserError(
        f"{path} ({preset}) keeps attention in some layers, and does not say whether it rotates",
        "say so with --attention-rope true (as in the first stage of the earlier project) or false (later)",
    )


def _ranks(path: Path, layers: Mapping[int, Mapping[str, Tensor]]) -> dict[str, int]:
    """Return the ranks that all layers have."""
    found: dict[str, int] = {}
    for i, parts in sorted(layers.items()):
        for name, rank in RANKS.items():
            if name not in parts:
                continue
            size = parts[name].shape[-1] if parts[name].ndim == 2 else 0
            if size != found.setdefault(rank, size) or not size:
                raise UserError(
                    f"{path}: {name} of layer {i} has shape {tuple(parts[name].shape)}, others have rank {found[rank]}",
                    "all layers have the same ranks, the last size of these matrices",
                )
    return found


def check_shapes(
    path: Path, student: Student, shapes: Mapping[str, tuple[int, ...]], own: set[str], tied: bool
) -> None:
    """Refuse tensors that are not those of a student.

    Args:
        path: of the checkpoint.
        student: with its tensors.
        shapes: of all tensors that such a student has, by canonical name.
        own: those that the teacher does not have.
        tied: whether the teacher's head is its embedding, and may be missing.

    Raises:
        UserError: names the first tensor that is missing, unknown, or has another shape.
    """
    optional = shapes.keys() - own if student.form is Form.TRAINING else {"lm_head.weight"} if tied else set()
    found = {name: tuple(tensor.shape) for name, tensor in student.tensors.items()}
    wrong = sorted(
        name
        for name in found | shapes
        if found.get(name) != shapes.get(name) and (name in found or name not in optional)
    )
    if wrong:
        what = {None: "missing"}.get(found.get(wrong[0]), f"of shape {found.get(wrong[0])}")
        fits = f"needs {shapes[wrong[0]]}" if wrong[0] in shapes else "has no such tensor"
        raise UserError(
            f"{path} does not fit the teacher: {wrong[0]} is {what}, a {student.spec.preset} of it {fits}"
            + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""),
            "name the model that it was made from with --teacher, or the variant with --preset",
        )
