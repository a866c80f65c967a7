"""A training run in its own process that prints how much memory it took: `python memory_worker.py ARGUMENTS...`.

The arguments are those of train_distill.py. Prints, as one line of JSON, the resident bytes before the run (libraries
loaded and used once) and the most there were during it.
"""

import contextlib
import json
import sys

import bitsandbytes.functional
import peft.tuners.lora  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

import rwkvinside.conversion.run  # noqa: F401
import train_distill
from rwkvinside import kernels
from rwkvinside.support.process_memory import forget_peak, peak_bytes


def warm_up() -> None:
    """What is loaded on first use and stays."""
    kernels.why_unavailable("native")
    AutoModelForCausalLM.from_config(Qwen3Config(hidden_size=8, num_hidden_layers=1, vocab_size=8))
    x = torch.randn(64, 64, requires_grad=True)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            (x @ x).sum().backward()
    torch.optim.AdamW([x], fused=True).step()
    bitsandbytes.functional.quantize_4bit(x.detach(), quant_type="nf4")


if __name__ == "__main__":
    warm_up()
    assert forget_peak()
    before = peak_bytes()
    with contextlib.redirect_stdout(sys.stderr):
        code = train_distill.main(sys.argv[1:])
    print(json.dumps({"before": before, "peak": peak_bytes()}))
    sys.exit(code)
