"""A training run in a process of its own that says how much memory it took: `python memory_worker.py ARGUMENTS...`.

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

import rwkvinside.build  # noqa: F401
import train_distill
from rwkvinside import kernels


def resident(key: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS now, VmHWM at most."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(f"{key}:"))


def warm_up() -> None:
    """What is loaded on first use and stays."""
    kernels.unavailable("native")
    AutoModelForCausalLM.from_config(Qwen3Config(hidden_size=8, num_hidden_layers=1, vocab_size=8))
    x = torch.randn(64, 64, requires_grad=True)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            (x @ x).sum().backward()
    torch.optim.AdamW([x], fused=True).step()
    bitsandbytes.functional.quantize_4bit(x.detach(), quant_type="nf4")


if __name__ == "__main__":
    warm_up()
    with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
        reset.write("5")  # VmHWM counts from here
    before = resident("VmRSS")
    with contextlib.redirect_stdout(sys.stderr):
        code = train_distill.main(sys.argv[1:])
    print(json.dumps({"before": before, "peak": resident("VmHWM")}))
    sys.exit(code)
