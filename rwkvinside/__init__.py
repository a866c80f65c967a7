"""RWKVInside turns a pretrained softmax-attention language model into a linear-time RWKV-7 hybrid by distillation.

The public names are listed in `__all__`. What `_LAZY` names is imported on first use, and the functions of `api`
import what they need when they are called, so that `import rwkvinside` and the command line respond at once.
"""

from importlib import import_module

# Two functions have the name of a package. The first import of a package sets an attribute of its parent: here, before
# the functions take their names. `from rwkvinside.export...` still reaches the packages.
for _package in ("evaluate", "export"):
    import_module(f".{_package}", __name__)

from .api import evaluate, export, layers, plan, verify  # noqa: E402
from .errors import UserError  # noqa: E402

_LAZY = {
    "CompressedState": ".lm.compression",
    "HybridModelConfigurator": ".lm.configurator",
    "StatefulModel": ".lm.session",
    "load_lm_config": ".lm.build",
    "evaluate_sequence_modeling": ".lm.evaluation",
    "import_checkpoint": ".importers.run",
    "load_config": ".config.load",
    "train": ".conversion.run",
    "HybridModel": ".hybrid.model",
    "TimeMixer": ".modeling.time_mixer",
    "TimeMixerConfig": ".modeling.mixer_presets",
    "VFirstHolder": ".modeling.first_layer",
    "wkv7": ".modeling.wkv7",
}

__all__ = ["UserError", "__version__", "evaluate", "export", "layers", "plan", "verify", *_LAZY]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_LAZY[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
