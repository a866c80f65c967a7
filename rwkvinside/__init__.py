"""RWKVInside turns a pretrained softmax-attention language model into a linear-time RWKV-7 hybrid by distillation.

What others may rely on is listed in `__all__`; it is imported on first use, so that the command line answers at once.
"""

from importlib import import_module

_PUBLIC = {
    "HybridModel": ".hybrid.model",
    "StudentSpec": ".hybrid.model",
    "TimeMixer": ".modeling.time_mixer",
    "TimeMixerConfig": ".modeling.mixer_presets",
    "VFirstHolder": ".modeling.first_layer",
    "wkv7": ".modeling.wkv7",
    "export_hf": ".export.huggingface",
    "verify": ".export.verify",
}

__all__ = list(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    return getattr(import_module(_PUBLIC[name], __name__), name)
