"""Causal attention within documents, for the attention layers that run in training.

They are a teacher's own, and those that a student keeps. transformers keeps packed documents apart by a mask of
B * T * T elements; here their bounds travel with the call, and no mask is made: `run_backbone` hands them to the
model's forward, and the attention function that is registered below finds them among its keyword arguments. A model
from `attend_within_documents` that is called in another way attends as transformers' "sdpa" does, masks included.

A sliding window is flash attention's own on a GPU; elsewhere, and where scores have a soft cap, which no kernel of
PyTorch knows, a block of queries meets the keys that it sees.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import ModelOutput

from ..data.batch import Batch, Documents
from ..families.registry import find
from ..modeling.first_layer import ForwardContext
from ..modeling.kept_attention import grown, is_cut
from ..modeling.mixer_presets import TimeMixerConfig
from ..modeling.window_attention import Form as WindowForm
from ..modeling.window_attention import window_attention
from .carried_rows import CarriedRows

IMPLEMENTATION = "rwkvinside_documents"
QUERIES = 512  # of a block that meets its keys under a mask of its own
# PyTorch 2.12 has to be told that query heads share keys and values, earlier ones see it
_SHARED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class Window(NamedTuple):
    """The tokens that an attention is cut to.

    Attributes:
        tokens: the last so many, the own one included; 0: none at all, the output is zero.
        sinks: the first so many of the document.
    """

    tokens: int
    sinks: int


def windows_of(mixers: Mapping[int, TimeMixerConfig]) -> dict[int, Window]:
    """Return what the attention of converted layers is cut to in a student's control, by layer.

    The control is the teacher with nothing but the windows of the student in its converted layers: what the student
    would be if its recurrences gave nothing.

    Args:
        mixers: configurations by layer.

    Returns:
        One for every mixer; {} where none has a window, and so there is no control.
    """
    windows = {i: Window(c.window, c.sinks) for i, c in mixers.items()}
    return windows if any(window.tokens for window in windows.values()) else {}


def windows_in(config: PretrainedConfig) -> dict[int, Window]:
    """Return the `windows_of` an exported student, from its configuration; {} for any other model."""
    layers, mixer = getattr(config, "rwkv_layers", ()), getattr(config, "mixer", {})
    differences = getattr(config, "mixer_layers", {})  # plain values: the class is the export's own
    windows = windows_of({i: TimeMixerConfig.from_dict(mixer | differences.get(str(i), {})) for i in layers})
    kept = Window(getattr(config, "attention_window", 0), getattr(config, "attention_sinks", 0))
    return windows and windows | kept_windows(config, layers, kept)


def kept_windows(config: PretrainedConfig, rwkv_layers: Sequence[int], window: Window) -> dict[int, Window]:
    """Return what layers that keep attention are cut to, by layer; those that see no more anyway are left out.

    Args:
        config: of the teacher.
        rwkv_layers: the others.
        window: `student.attention_window` and `student.attention_sinks`; 0 tokens: they are not cut.
    """
    kept = (i for i in range(config.num_hidden_layers) if i not in rwkv_layers)
    return {i: window for i in kept if is_cut(config, i, window.tokens)}


@contextmanager
def cut_to_windows(lm: PreTrainedModel, windows: Mapping[int, Window]) -> Iterator[None]:
    """Within it, `run_backbone` of this model cuts the attention of some layers.

    Args:
        lm: from `attend_within_documents`.
        windows: by layer.
    """
    family = find(lm.config.model_type)
    layers = family.layers(lm)
    hooks = [
        family.attention(layers[i]).register_forward_pre_hook(
            lambda module, args, kwargs, window=window: (args, kwargs | {"window": window}), with_kwargs=True
        )
        for i, window in windows.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def attend_within_documents(lm: PreTrainedModel) -> PreTrainedModel:
    """Let a causal language model attend by `document_attention`, and return it."""
    lm.set_attn_implementation(IMPLEMENTATION)
    return lm


def run_backbone(lm: PreTrainedModel, batch: Batch, **kwargs: Any) -> Tensor:
    """Return the final hidden states (B, T, D) of a packed batch; arguments as of `backbone_outputs`."""
    return backbone_outputs(lm, batch, **kwargs).last_hidden_state


def backbone_outputs(lm: PreTrainedModel, batch: Batch, **kwargs: Any) -> ModelOutput:
    """Return what the backbone gives for a packed batch, its `last_hidden_state` (B, T, D) above all.

    Args:
        lm: from `attend_within_documents`.
        batch: packed rows, on the model's device.
        kwargs: more keyword arguments for the decoder layers.
    """
    # without a mask transformers would look for packed rows in position_ids and wait for the device; one of four
    # dimensions is handed on as it is, and none of its elements is needed
    no_mask = torch.empty(0, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return lm.base_model(
        input_ids=batch.input_ids,
        attention_mask=no_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        documents=batch.documents,
        **kwargs,
    )


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    window: Window | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within documents, in transformers' convention for attention functions.

    Args:
        module: the attention.
        query: (B, H, T, N).
        key, value: (B, G, T, N), G dividing H.
        attention_mask: read only without `documents`.
        dropout: share of the weights that is dropped.
        scaling: of the scores; None is 1 / sqrt(N).
        documents: of the batch; None: attend as "sdpa".
        sliding_window: tokens that a token sees, itself included; None: all before it. In masks already.
        window: what each token is cut to; None: all tokens before it. Where rows go on from a step to the next, their
            `forward_context` has the keys and values before them, and takes those after.
        kwargs: what "sdpa" takes, and `softcap`, the c of scores c * tanh(score / c); `log_base` lets scores grow with
            `position_ids`, see `modeling.kept_attention.grown`.

    Returns:
        (output (B, T, H, N), None).

    Raises:
        ValueError: `window` without documents.
    """
    softcap = kwargs.pop("softcap", None)
    if (log_base := kwargs.pop("log_base", None)) is not None:
        query = grown(query, kwargs["position_ids"], log_base)
    if documents is None:
        if window is not None:
            raise ValueError("attention is cut to a window within documents only: hand them over")
        if softcap is None:
            options = {"dropout": dropout, "scaling": scaling, **kwargs}
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        if attention_mask is None and query.shape[2] > 1:
            attention_mask = _visible(query.shape[2], 0, key.shape[2], None, query.device)
        form = _Form(scaling, None, softcap, dropout)
        return _capped(query, key, value, attention_mask, form).transpose(1, 2), None
    if window is not None:
        form, context = _Form(scaling, None, softcap, 0.0), kwargs.get("forward_context")
        return _cut(module, (query, key, value), documents, window, form, context), None
    sliding = None if sliding_window is None or sliding_window >= documents.longest else sliding_window
    form, dtype = _Form(scaling, sliding, softcap, dropout), _flash_dtype(query)
    flash = dtype is not None and softcap is None and not dropout
    if documents.alone and not (flash and sliding):
        return _causal(query, key, value, form), None
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    output = _flash(*(x.to(dtype) for x in tokens), documents, form) if flash else _one_by_one(*tokens, documents, form)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


class _Form(NamedTuple):
    """How to attend; see `document_attention`."""

    scaling: float | None
    window: int | None
    softcap: float | None
    dropout: float


def _cut(
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    documents: Documents,
    window: Window,
    form: _Form,
    context: ForwardContext | None,
) -> Tensor:
    """Attend to a window and the first tokens of each document; (B, heads, T, N) in, (B, T, heads, N) out."""
    query, key, value = (x.transpose(1, 2) for x in qkv)
    if not window.tokens:
        return torch.zeros_like(query)
    if form.scaling is not None:
        query = query * (form.scaling * query.shape[-1] ** 0.5)
    carried: CarriedRows | None = None if context is None else context.carried
    attended, state = window_attention(
        query,
        key,
        value,
        WindowForm(window.tokens, window.sinks, form.softcap),
        state=None if carried is None else carried.of_window(module.layer_idx),
        cu_seqlens=documents.cu_seqlens.to(query.device),
        keep_state=carried is not None,
    )
    if carried is not None and state is not None:
        carried.leave(module.layer_idx, state)
    return attended.values


def _flash_dtype(query: Tensor) -> torch.dtype | None:
    """Return the type in which flash attention reads such queries; None: it does not take them."""
    if query.device.type != "cuda" or query.shape[-1] % 8 or query.shape[-1] > 256:
        return None
    # autocast does not know the operator
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype
    taken = dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return dtype if taken else None


def _flash(query: Tensor, key: Tensor, value: Tensor, documents: Documents, form: _Form) -> Tensor:
    """Attend by PyTorch's flash attention over sequences of any lengths; (B * T, heads, N) in and out."""
    bounds = documents.cu_seqlens.to(query.device)  # layers may be spread over devices
    shared = _SHARED if key.shape[1] != query.shape[1] else {}
    longest = documents.longest
    before = -1 if form.window is None else form.window - 1
    return varlen_attn(
        *(query, key, value, bounds, bounds, longest, longest), scale=form.scaling, window_size=(before, 0), **shared
    )


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, documents: Documents, form: _Form) -> Tensor:
    """Attend in one document after the other; (B * T, heads, N) in and out."""
    if documents.lengths is None:
        raise RuntimeError("attention in one document after the other needs their lengths, which a CUDA graph has not")
    # split, not slices: the backward of each slice is a full-size zero tensor
    parts = zip(*(x.split(documents.lengths) for x in (query, key, value)), strict=True)
    outputs = [_causal(*(x.transpose(0, 1).unsqueeze(0) for x in part), form) for part in parts]
    return torch.cat(outputs, 1).squeeze(0)


def _causal(query: Tensor, key: Tensor, value: Tensor, form: _Form) -> Tensor:
    """Attend causally; (B, heads, n, N) in, (B, n, heads, N) out."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.device.type == "cuda" and _flash_dtype(query) is None:
        # of the kernels for GPUs only flash attention shares keys; the way around them all holds n * n scores
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    length, window = query.shape[2], form.window
    if form.softcap is None and (window is None or window >= length):
        return _attend(query, key, value, None, form).transpose(1, 2)
    outputs = []
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        first = 0 if window is None else max(0, start - window + 1)
        seen = _visible(stop - start, start - first, stop - first, window, query.device)
        part = query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        outputs.append((_attend if form.softcap is None else _capped)(*part, seen, form))
    return torch.cat(outputs, 2).transpose(1, 2)


def _visible(queries: int, before: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query sees, (queries, keys) bool; the first query is at key `before`."""
    at = torch.arange(before, before + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)
    return key <= at if window is None else (key <= at) & (key > at - window)


def _attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, form: _Form) -> Tensor:
    """Attend to the keys that are seen, causally where that is None; (B, heads, n, N) in and out."""
    shared = key.shape[1] != query.shape[1]
    options: dict[str, Any] = {"is_causal": True} if seen is None else {"attn_mask": seen}
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=form.dropout, scale=form.scaling, enable_gqa=shared, **options
    )


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, form: _Form) -> Tensor:
    """Attend with capped scores as transformers' "eager" does; (B, heads, n, N) in and out.

    `mask` is True where a key is seen, or a number that is added to the score.
    """
    assert form.softcap is not None
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scaling = query.shape[-1] ** -0.5 if form.scaling is None else form.scaling
    scores = torch.tanh(query @ key.transpose(2, 3) * scaling / form.softcap) * form.softcap
    if mask is not None:
        hidden = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(F.softmax(scores, -1, dtype=torch.float32).to(query.dtype), form.dropout)
    return weights @ value


AttentionInterface.register(IMPLEMENTATION, document_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
