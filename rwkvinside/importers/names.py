"""The names of a student's tensors in the files of other programs.

Here and in exports (`HybridModel.canonical_parameters`) a mixer's tensor is `model.layers.<i>.self_attn.w0`, and so in
published Hugging Face directories. RWKV-Infer's `.pth` say `blocks.<i>.att.w0`, training files of the earlier project
`model.model.layers.<i>.self_attn.student_attn.w0`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from enum import Enum

from ..errors import UserError
from ..families.base import QK_NORMS, Family

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
WRAPPED = re.compile(r"\.(student_attn|time_mixer)\.")
METADATA = ("layer_architecture", "head_size_record")  # scalars that the earlier project left in its files
NORMS = {"ln_r.weight": "r_norm.weight", "ln_k.weight": "k_norm.weight"}  # of query and key in a mixer


class Form(Enum):
    """Whose names a file has."""

    RWKV_INFER = "RWKV-Infer"
    TRAINING = "training files of the earlier project"
    HUGGING_FACE = "Hugging Face"


class Names:
    """The names of the tensors of a family's students, here and there.

    Args:
        family: of the teacher.
    """

    def __init__(self, family: Family):
        self.family = family
        mlp = (*family.mlp_inputs, family.mlp_output)
        self.outside = {"emb": family.embedding_path, "head": family.head_path, "ln_out": family.final_norm_path}
        self.inside = {f"ffn.{name.removesuffix('_proj')}": f"{family.mlp_path}.{name}" for name in mlp}
        for there, here in (("ln1", family.attention_norm_path), ("ln2", family.mlp_norm_path)):
            self.inside |= {} if here is None else {there: here}

    def form_of(self, names: Collection[str]) -> Form:
        """Return whose names these are.

        Raises:
            UserError: none of the three.
        """
        if any(BLOCK.match(name) for name in names):
            return Form.RWKV_INFER
        if any(name.startswith("model.model.") or WRAPPED.search(name) for name in names):
            return Form.TRAINING
        if any(self.mixer_part(name) for name in names):
            return Form.HUGGING_FACE
        raise UserError(
            f"these are no tensors of an RWKV student; the first is {min(names, default='missing')}",
            "names are blocks.<i>.att.* or those of a model, model.layers.<i>.*, model.model.layers.<i>.*",
        )

    def canonical(self, names: Collection[str], form: Form) -> dict[str, str]:
        """Return the name here of each tensor; those that are no part of a student are left out.

        Raises:
            UserError: two tensors have one name here, or one has none.
        """
        attention = self.family.attention_inputs[0]
        kept = {match[1] for name in names if (match := BLOCK.match(name)) and match[2] == f"att.{attention}.weight"}
        found = {name: self._canonical(name, form, kept) for name in names if not _is_beside(name)}
        used: dict[str, str] = {}
        for name, here in found.items():
            if used.setdefault(here, name) != name:
                raise UserError(f"{used[here]} and {name} are the same tensor, {here}", "leave one of them in the file")
        return found

    def _canonical(self, name: str, form: Form, kept: Collection[str]) -> str:
        if form is Form.HUGGING_FACE:
            return name
        if form is Form.TRAINING:
            name = name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name
            return WRAPPED.sub(".", name)
        if (match := BLOCK.match(name)) is None:
            module, _, rest = name.partition(".")
            if module not in self.outside:
                raise UserError(
                    f"{name} is no name of RWKV-Infer's", "its names are emb, head, ln_out and blocks.<i>.*"
                )
            return f"{self.outside[module]}.{rest}"
        layer, (module, _, rest) = match[1], match[2].rpartition(".")
        if module in self.inside:
            return f"{self.family.layers_path}.{layer}.{self.inside[module]}.{rest}"
        if not match[2].startswith("att."):
            raise UserError(f"{name} is no name of a converted model", f"its blocks have att, {', '.join(self.inside)}")
        part = match[2].removeprefix("att.")
        here = NORMS.get(part, part)
        if layer in kept:  # attention has the teacher's names
            here = _turned(QK_NORMS).get(here, here)
        return self.in_attention(layer, here)

    def rwkv_infer(self, name: str) -> str:
        """Return the name in RWKV-Infer's `.pth` of a tensor that has a canonical one."""
        layer, module, rest = self.family.layer_of(name), *name.rpartition(".")[::2]
        if layer is None:
            return f"{_turned(self.outside)[module]}.{rest}"
        module = module.removeprefix(f"{self.family.layers_path}.{layer}.")
        if module in (inside := _turned(self.inside)):
            return f"blocks.{layer}.{inside[module]}.{rest}"
        part = name.partition(f".{self.family.attention_path}.")[2]
        mixed = QK_NORMS.get(part, part)
        return f"blocks.{layer}.att.{_turned(NORMS).get(mixed, part)}"

    def in_attention(self, layer: int | str, part: str) -> str:
        """Return the canonical name of a tensor of a layer's attention or mixer."""
        return f"{self.family.layers_path}.{layer}.{self.family.attention_path}.{part}"

    def mixer_part(self, name: str) -> tuple[int, str] | None:
        """Return layer and name of a tensor in its attention or mixer; None: it is elsewhere."""
        layer = self.family.layer_of(name)
        if layer is None or not name.startswith(start := self.in_attention(layer, "")):
            return None
        return layer, name.removeprefix(start)


def _is_beside(name: str) -> bool:
    return name.rpartition(".")[2] in METADATA or ".teacher_attn." in name


def _turned(table: dict[str, str]) -> dict[str, str]:
    return {here: there for there, here in table.items()}
