"""Loads an exported directory without this package, or with one whose kernels have another interface.

Executed by path (`python -I carried_worker.py DIR PACKAGE`), under TRITON_INTERPRET=1. PACKAGE is "none" or "other".
Prints JSON: warnings, and for each backend the greedy continuation, the largest difference of its logits from those of
"auto", how often the carried kernel was called, and why it is no assistant of another model.
"""

import json
import sys
import types
import warnings


class Blocked:
    """Import hook that hides the training package even where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "rwkvinside":
            raise ImportError(f"{name} is hidden")


def pretend_to_install():
    """Put a package in place whose kernels are known by other names."""
    package, kernels = types.ModuleType("rwkvinside"), types.ModuleType("rwkvinside.kernels")
    package.kernels = kernels
    sys.modules |= {"rwkvinside": package, "rwkvinside.kernels": kernels}


def main(folder, package):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    ids = torch.arange(3, 25).view(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    results, expected = {}, None
    torch.set_grad_enabled(False)
    for backend in ("auto", "triton"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        config.mixer["backend"] = backend
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, trust_remote_code=True, local_files_only=True, dtype=torch.float32
        ).eval()
        calls = count_launches() if backend == "triton" else [0]
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        expected = logits if expected is None else expected
        calls_of_forward = calls[0]
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        results[backend] = {
            "tokens": tokens[:, ids.shape[1] :].tolist(),
            "difference": float((logits - expected).abs().max()),
            "calls": [calls_of_forward, calls[0]],
            "assisting": why_not_assisting(model, ids),
            "loaded": any(name.endswith(".wkv7_triton") for name in sys.modules),
        }
    return results


def why_not_assisting(model, ids):
    """Return what a plain decoder hears that generates with this model as its assistant, None if it hears nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    target = LlamaForCausalLM(LlamaConfig(vocab_size=model.config.vocab_size, **sizes)).eval()
    try:
        target.generate(ids[:1], max_new_tokens=4, assistant_model=model)
    except ValueError as error:
        return str(error)
    return None


def count_launches():
    """Count the calls of the export's own kernel."""
    import importlib

    [door] = [name for name in sys.modules if name.startswith("transformers_modules") and name.endswith(".wkv7")]
    module = importlib.import_module(f"{door}_triton")
    calls, plan = [0], module.plan

    def counted(*args, **kwargs):
        calls[0] += 1
        return plan(*args, **kwargs)

    module.plan = counted
    return calls


if __name__ == "__main__":
    if sys.argv[2] == "none":
        sys.meta_path.insert(0, Blocked())
    else:
        pretend_to_install()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = main(*sys.argv[1:])
    said = [str(warning.message) for warning in caught if "rwkvinside" in str(warning.message)]
    print(json.dumps(results | {"warnings": said}))
