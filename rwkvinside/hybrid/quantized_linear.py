"""Frozen linear layers in 4 or 8 bits.

Only this file imports bitsandbytes, and only when it is needed. bitsandbytes packs and unpacks; the module that holds
the result is ours, because bitsandbytes' own layers repack themselves on some CPUs in evaluation mode, round
activations to fp16 (int8), and put parts of their state where neither a sharding engine nor a checkpoint finds them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..support.extras import import_extra

# it warns of an optional kernel that is not installed, whether it is used or not
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

FORMATS = ("nf4", "fp4", "int8")
BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale, unless told; scales that share one when they are quantized


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is unpacked whenever it is used.

    That is in the forward and again in the backward. Gives gradients to its input and bias, never to its weight.
    Products run in the dtype of autocast where that is on, else in the input's.

    Args:
        in_features, out_features: of the weight (out, in).
        bias: the layer's own parameter, which stays as it is.
        format: nf4, fp4 or int8.
        tensors: what `pack` or `tensors` gave.
        block: nf4 and fp4: weights with a common scale.

    Attributes:
        error: squared norms of what quantization changed and of the original weight, (0, 0) where they are not known.
        packed: the weight, uint8 (two values a byte) or int8; a frozen parameter, so that ZeRO 3 shards it. Scales are
            buffers that hold the bits of fp32 values as int32, because `module.bfloat16()` would round them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        format: str,
        tensors: Mapping[str, Tensor],
        block: int = BLOCK,
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format, self.block = in_features, out_features, format, block
        self.error = (0.0, 0.0)
        self.packed = nn.Parameter(tensors["packed"], requires_grad=False)
        self.register_parameter("bias", bias)
        for name in ("scales", "outer", "offset"):
            self.register_buffer(name, tensors.get(name))

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, in fp32; a new tensor each time."""
        return self.unpack()

    @property
    def weight_numel(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take, scales included."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the weight is made of, by name; integers only."""
        tensors = {"packed": self.packed.detach(), "scales": self.scales, "outer": self.outer, "offset": self.offset}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight (out, in) in `dtype`."""
        if self.packed.is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        bnb = _library().functional
        if self.format == "int8":
            return bnb.int8_vectorwise_dequant(self.packed, self.scales.view(torch.float32)).to(dtype)
        if self.outer is None:
            nested = {"absmax": self.scales.view(torch.float32)}
        else:
            code = _dynamic_code(self.packed.device)
            state = bnb.QuantState(
                self.outer.view(torch.float32), code=code, blocksize=OUTER_BLOCK, dtype=torch.float32
            )
            nested = {"absmax": self.scales, "offset": self.offset.view(torch.float32)[0], "state2": state}
        # on a CPU, bitsandbytes lets blocks begin anew with each row, whatever its length: give it rows of one block
        count, rest = divmod(self.weight_numel, self.block)
        rows = (1, self.weight_numel) if rest else (count, self.block)
        direct = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        state = bnb.QuantState(
            shape=torch.Size(rows),
            blocksize=self.block,
            quant_type=self.format,
            dtype=direct,
            **nested,
        )
        return bnb.dequantize_4bit(self.packed, state).view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y = _Product.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Return what `repr` says in addition to the class."""
        return f"{super().extra_repr()}, format={self.format}"


class _Product(torch.autograd.Function):
    """x W^T without keeping W.

    The module, not its tensors, is remembered, so that ZeRO 3 may gather them anew.
    """

    @staticmethod
    def forward(ctx, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, module.unpack(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.module.unpack(gradient.dtype), None


@torch.no_grad()
def pack(weight: Tensor, format: str, double: bool = True, block: int = BLOCK) -> dict[str, Tensor]:
    """Return the tensors of a `QuantizedLinear`; on the meta device their shapes.

    Args:
        weight: (out, in).
        format: nf4 or fp4: blocks with a common scale; int8: a scale for each output row.
        double: nf4 and fp4: scales in 8 bits too, 256 of them with a common scale.
        block: nf4 and fp4: consecutive weights with a common scale: 32, 64 or 128.
    """
    rows, columns = weight.shape
    if weight.is_meta:
        return _shapes(rows, columns, format, double, block)
    bnb = _library().functional
    weight = weight.detach().float().contiguous()
    if format == "int8":
        packed, scales, _ = bnb.int8_vectorwise_quant(weight)
        return {"packed": packed, "scales": scales.view(torch.int32)}
    packed, state = bnb.quantize_4bit(weight, blocksize=block, compress_statistics=False, quant_type=format)
    return {"packed": packed, **pack_scales(state.absmax, double)[0]}


@torch.no_grad()
def pack_scales(scales: Tensor, double: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Pack the scales of all blocks.

    Args:
        scales: (blocks,) fp32.
        double: see `pack`.

    Returns:
        What `pack` returns except "packed", and the scales as they will be used.
    """
    bnb = _library().functional
    if not double:
        return {"scales": scales.view(torch.int32)}, scales
    offset = scales.mean()
    packed, state = bnb.quantize_blockwise(scales - offset, blocksize=OUTER_BLOCK)
    outer = {"outer": state.absmax.view(torch.int32), "offset": offset.reshape(1).view(torch.int32)}
    return {"scales": packed, **outer}, bnb.dequantize_blockwise(packed, state) + offset


def codebook(format: str, device: torch.device) -> Tensor:
    """Return the 16 values of nf4 or fp4, in units of their block's scale."""
    bnb = _library().functional
    return bnb.get_4bit_type(format, device)


def quantize(
    model: nn.Module,
    names: Collection[str],
    format: str,
    double: bool = True,
    block: int = BLOCK,
    device: torch.device | None = None,
) -> list[str]:
    """Replace linear layers by quantized ones.

    They are replaced one after the other, so that no second copy of the model is made.

    Args:
        model: changed in place.
        names: of modules below it.
        format, double, block: see `pack`.
        device: where to compute; None: where each weight is.

    Returns:
        The quantized modules in the model's order, exactly those named.

    Raises:
        UserError: a name that is not a linear layer's, or an unknown format.
    """
    if format not in FORMATS:
        raise UserError(f"quantization format {format!r}", f"allowed: {', '.join(FORMATS)}")
    for name in names:
        linear = model.get_submodule(name)
        if type(linear) is not nn.Linear:
            raise UserError(
                f"{name} is a {type(linear).__name__}, which cannot be quantized", "name plain linear layers only"
            )
        home = linear.weight.device
        packed = pack(linear.weight.to(device or home), format, double, block)
        del linear
        insert_quantized(model, name, format, {part: t.to(home) for part, t in packed.items()}, block)
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    if missing := set(names) - set(quantized):
        raise RuntimeError(f"not quantized: {', '.join(sorted(missing))}")
    return [name for name in quantized if name in set(names)]


def linear_names(model: nn.Module, skip: Collection[str] = ()) -> list[str]:
    """Return the names of plain linear layers.

    Args:
        model: with the layers.
        skip: last components of names that are left out.
    """
    names = (name for name, module in model.named_modules() if type(module) is nn.Linear)
    return [name for name in names if name.rsplit(".", 1)[-1] not in skip]


def dequantized(module: QuantizedLinear, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """Return a plain linear layer that computes with the same weight."""
    device = module.packed.device
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(module.unpack(dtype).to(device), requires_grad=False)
    linear.register_parameter("bias", module.bias)
    return linear.train(module.training)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def flat_tensors(modules: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    """Return tensors for a file, by "<module>/<format>-<block>/<tensor>"."""
    return {f"{n}/{m.format}-{m.block}/{name}": t for n, m in modules.items() for name, t in m.tensors().items()}


def read_flat(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, dict[str, Tensor], int]]:
    """Return what `flat_tensors` was made from, {module: (format, tensors, block)}."""
    modules: dict[str, tuple[str, dict[str, Tensor], int]] = {}
    for key, tensor in tensors.items():
        module, kind, name = key.split("/")
        format, block = kind.split("-")
        modules.setdefault(module, (format, {}, int(block)))[1][name] = tensor
    return modules


def restore(model: nn.Module, name: str, format: str, tensors: Mapping[str, Tensor], block: int = BLOCK) -> None:
    """Replace a linear layer by one that was quantized before.

    Raises:
        UserError: the tensors do not have the layer's shape.
    """
    linear = model.get_submodule(name)
    double = "outer" in tensors
    shapes = _shapes(linear.out_features, linear.in_features, format, double, block)
    if {key: t.shape for key, t in shapes.items()} != {key: t.shape for key, t in tensors.items()}:
        raise UserError(f"the stored {format} tensors of {name} do not fit it", "use the teacher they were made from")
    insert_quantized(model, name, format, {key: t.to(linear.weight.device) for key, t in tensors.items()}, block)


def relative_error(modules: Iterable[QuantizedLinear]) -> float:
    """Return the norm of what quantization changed over that of the original weights."""
    difference, norm = (sum(squares) for squares in zip((0.0, 0.0), *(m.error for m in modules), strict=True))
    return (difference / norm) ** 0.5 if norm else 0.0


def insert_quantized(
    model: nn.Module, name: str, format: str, tensors: Mapping[str, Tensor], block: int = BLOCK
) -> QuantizedLinear:
    """Replace a linear layer by a quantized one made of these tensors.

    The new layer knows how far they are from the old weight, see `QuantizedLinear.error`.
    """
    linear = model.get_submodule(name)
    module = QuantizedLinear(linear.in_features, linear.out_features, linear.bias, format, tensors, block)
    if not linear.weight.is_meta:
        original = linear.weight.detach().float()
        module.error = (float((module.unpack() - original).square().sum()), float(original.square().sum()))
    replace(model, name, module)
    return module


def _shapes(rows: int, columns: int, format: str, double: bool, block: int) -> dict[str, Tensor]:
    """Return what `pack` returns on the meta device."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if format == "int8":
        return {"packed": empty(rows, columns, dtype=torch.int8), "scales": empty(rows, dtype=torch.int32)}
    blocks = -(-rows * columns // block)
    packed = {"packed": empty((rows * columns + 1) // 2, 1, dtype=torch.uint8)}
    if not double:
        return packed | {"scales": empty(blocks, dtype=torch.int32)}
    return packed | {
        "scales": empty(blocks, dtype=torch.uint8),
        "outer": empty(-(-blocks // OUTER_BLOCK), dtype=torch.int32),
        "offset": empty(1, dtype=torch.int32),
    }


@cache
def _dynamic_code(device: torch.device) -> Tensor:
    """Return the 256 values of 8-bit scales."""
    bnb = _library().functional
    return bnb.create_dynamic_map().to(device)


@cache
def _library():
    return import_extra("bitsandbytes", "quantized layers", "or leave quantize.groups empty")
