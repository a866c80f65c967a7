"""Which layers of a model are RWKV and which are attention, chosen in Python.

In a configuration the same is `student.attention_layers`, whose forms and patterns are read by the same function.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Self

from ..errors import UserError
from ..hybrid.layouts import LayerChoice, resolve_layout
from ..support.text import spans


class HybridModelConfigurator:
    """A layout of RWKV and attention layers: even RWKV, odd attention, until it is told otherwise.

        configurator = HybridModelConfigurator(config)
        configurator.configure_layer_architecture(
            rwkv_layer_indices=[0, 1, 2], transformer_layer_indices=[3]
        )
        config = load_lm_config(..., overrides=[configurator.override])

    Args:
        config: of a model, such as a Hugging Face configuration, whose `num_hidden_layers` counts; or their number.

    Attributes:
        num_layers: of the model.
        attention_layers: indices, ascending.
    """

    def __init__(self, config: Any):
        count = config if isinstance(config, int) else getattr(config, "num_hidden_layers", None)
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise UserError(f"{count!r} is not a number of layers", "give a configuration with num_hidden_layers")
        self.num_layers = count
        self.attention_layers: tuple[int, ...] = ()
        self.configure_pattern("alternating")

    @property
    def rwkv_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are not attention, ascending."""
        return tuple(i for i in range(self.num_layers) if i not in self.attention_layers)

    @property
    def layout(self) -> str:
        """A letter a layer: R for RWKV, A for attention."""
        return "".join("A" if i in self.attention_layers else "R" for i in range(self.num_layers))

    @property
    def override(self) -> str:
        """The layout as a setting of a run."""
        return f"student.attention_layers=[{','.join(map(str, self.attention_layers))}]"

    def configure_layer_architecture(
        self,
        rwkv_layer_indices: Iterable[int] | None = None,
        transformer_layer_indices: Iterable[int] | None = None,
    ) -> Self:
        """Choose layers by their indices; with one of the two lists the other layers are of the other kind.

        With neither they alternate again, as in the beginning.

        Raises:
            UserError: names the layers that are in both lists, in none, twice in one, or not in the model; nothing has
                changed.
        """
        if rwkv_layer_indices is None and transformer_layer_indices is None:
            return self.configure_pattern("alternating")
        rwkv = self._indices("rwkv_layer_indices", rwkv_layer_indices)
        attention = self._indices("transformer_layer_indices", transformer_layer_indices)
        layers = set(range(self.num_layers))
        if transformer_layer_indices is None:
            attention = layers - rwkv
        if rwkv_layer_indices is None:
            rwkv = layers - attention
        if both := sorted(rwkv & attention):
            raise UserError(f"layers {spans(both)} are RWKV and attention", "name each layer in one list")
        if none := sorted(layers - rwkv - attention):
            raise UserError(
                f"layers {spans(none)} are neither RWKV nor attention", "name each layer, or give one list alone"
            )
        self.attention_layers = tuple(sorted(attention))
        return self

    def configure_pattern(self, pattern: object) -> Self:
        """Choose the layers that are attention by a pattern: "alternating", {"every": 4}, ..., see `hybrid/layouts.py`.

        Raises:
            UserError: a pattern that is none, or that needs a measurement.
        """
        try:
            layers = resolve_layout(pattern, self.num_layers, allow_all=True)
        except ValueError as error:
            raise UserError(f"the layout {error}") from error
        if isinstance(layers, LayerChoice):
            raise UserError(
                f"the layout {layers.choose} is measured on a model", "name the layers, or a pattern that needs none"
            )
        self.attention_layers = layers
        return self

    def to_json(self) -> str:
        """Return the layout as JSON text."""
        return json.dumps(
            {
                "num_hidden_layers": self.num_layers,
                "rwkv_layer_indices": self.rwkv_layers,
                "transformer_layer_indices": self.attention_layers,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the configurator that `to_json` was called on.

        Raises:
            UserError: it is not its text, or contradicts itself.
        """
        try:
            fields = json.loads(text)
            configurator = cls(fields["num_hidden_layers"])
            rwkv, attention = fields["rwkv_layer_indices"], fields["transformer_layer_indices"]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"this is not the JSON of a layout: {error!r}", "use what to_json returned") from error
        return configurator.configure_layer_architecture(rwkv, attention)

    def _indices(self, name: str, indices: Iterable[int] | None) -> set[int]:
        listed = list(indices or ())
        if wrong := [i for i in listed if not isinstance(i, int) or isinstance(i, bool)]:
            raise UserError(f"{name} has {wrong[0]!r}", "layers are named by whole numbers")
        if outside := sorted({i for i in listed if not 0 <= i < self.num_layers}):
            raise UserError(f"{name} has layers {spans(outside)}", f"the model has layers 0 to {self.num_layers - 1}")
        if twice := sorted({i for i in listed if listed.count(i) > 1}):
            raise UserError(f"{name} has layers {spans(twice)} twice", "name each layer once")
        return set(listed)
