"""Sizes and peak speeds of common devices."""

from __future__ import annotations

import re
import time

import psutil
import torch

from ..errors import UserError
from ..support.text import rounded_time

# Of devices by words in their name, the first that fits: memory in GB, unless the name says another (A100-40GB); peak
# of dense products in TFLOP/s, bf16 with fp32 sums, and fp32 without TF32 (PyTorch's default). Vendors' data sheets.
DEVICES = (
    ("GB200", 186, 2500.0, 80.0),
    ("B200", 180, 2250.0, 75.0),
    ("GH200", 96, 989.0, 67.0),
    ("H200", 141, 989.0, 67.0),
    ("H100 PCIe", 80, 756.0, 51.0),
    ("H100 NVL", 94, 835.0, 60.0),
    ("H100", 80, 989.0, 67.0),
    ("H800", 80, 989.0, 67.0),
    ("H20", 96, 148.0, 44.0),
    ("A100", 80, 312.0, 19.5),
    ("A800", 80, 312.0, 19.5),
    ("L40S", 48, 362.0, 91.6),
    ("L40", 48, 181.0, 90.5),
    ("L4", 24, 121.0, 30.3),
    ("A40", 48, 149.7, 37.4),
    ("A10G", 24, 70.0, 35.0),
    ("A10", 24, 125.0, 31.2),
    ("RTX A6000", 48, 154.8, 38.7),
    ("RTX 6000 Ada", 48, 364.2, 91.1),
    ("RTX 5090", 32, 209.5, 104.8),
    ("RTX 4090", 24, 165.2, 82.6),
    ("RTX 3090", 24, 71.0, 35.6),
    ("MI325X", 256, 1307.4, 163.4),
    ("MI300X", 192, 1307.4, 163.4),
    ("MI250X", 64, 191.5, 47.9),  # of one of its two chips, each of which is a device
)

CORE = 50e9  # operations that one core does in a second, in fp32; measured were 30 to 100
EXAMPLE = "an H100"  # the card that is spoken of where there is none
USED = 0.5  # of a card's peak in fp32 that a calibration is expected to use; not measured

RESERVED = 2**30  # of a GPU: context, allocator, kernels
CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192, 288)  # GB of common GPUs


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return what one device can do at most in a second, and the source.

    Args:
        device: of the run.
        precision: "fp32" or "bf16".

    Returns:
        Operations per second, and "data sheet" or "measured".
    """
    if device.type == "cuda":
        peak = named_peak(torch.cuda.get_device_name(device), precision)
        if peak is not None:
            return peak, "data sheet"
    return measured_flops(device, precision), "measured"


def named_peak(name: str, precision: str) -> float | None:
    """Return what a device can do at most in a second by its data sheet, None where it is not known.

    Args:
        name: as PyTorch says it, or the part that counts, such as H100.
        precision: "fp32" or "bf16".
    """
    known = _data_sheet(name)
    return None if known is None else {"bf16": known[1], "fp32": known[2]}[precision] * 1e12


def named_memory(name: str) -> int:
    """Return the bytes of a device by its data sheet, or that its name says, as in A100-40GB.

    Args:
        name: as of `named_peak`.

    Raises:
        UserError: an unknown device.
    """
    known = _data_sheet(name)
    if known is None:
        raise UserError(f"GPU {name} is not known", f"known: {', '.join(words for words, *_ in DEVICES)}")
    said = re.search(r"\b(\d{1,4}) ?GB\b", name, re.IGNORECASE)
    return (int(said[1]) if said else known[0]) * 10**9


def _data_sheet(name: str) -> tuple[int, float, float] | None:
    """Return GB and the peaks in bf16 and fp32, TFLOP/s, of a device; None: it is not in the table."""
    for words, *numbers in DEVICES:
        if re.search(rf"\b{words}\b", name, re.IGNORECASE) and "Laptop" not in name:
            return tuple(numbers)
    return None


def measured_flops(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """Return the best rate of products of square matrices.

    It is tried for about `seconds`, with PyTorch's current number of threads.
    """
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)

    def time_product() -> float:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    time_product()  # starts the library
    best, spent = time_product(), 0.0
    while spent < seconds:
        elapsed = time_product()
        best, spent = min(best, elapsed), spent + elapsed
    return 2 * size**3 / best


def expected_time(flops: float, device: str, gpu: str | None = None) -> str:
    """Return in words how long fp32 operations will take: an estimate, the same whenever a machine is asked.

    Args:
        flops: operations in all.
        device: "cpu" or "cuda".
        gpu: name of a GPU that is not here, as of `named_memory`.
    """
    if device == "cpu":
        return f"about {rounded_time(flops / CORE)} of one core at {CORE / 1e9:g} GFLOP/s"
    name = gpu or (torch.cuda.get_device_name(0) if torch.cuda.is_available() else EXAMPLE)
    peak = named_peak(name, "fp32")
    if peak is None:
        name, peak = EXAMPLE, named_peak(EXAMPLE, "fp32")
    assert peak is not None, "the example is in the table"
    return f"about {rounded_time(flops / (USED * peak))} at half the fp32 peak of {name} (an estimate)"


def device_memory(device: str, gpu: str | None = None) -> int | None:
    """Return the bytes of this machine's memory, of its first GPU's or of another GPU's; None: it has no GPU.

    Args:
        device: "cpu" or "cuda".
        gpu: name of a GPU that is not here, such as H100.

    Raises:
        UserError: an unknown GPU.
    """
    if gpu is not None:
        return named_memory(gpu)
    if device == "cpu":
        return psutil.virtual_memory().total
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def card_for(size: int) -> int | None:
    """Return the GB of the smallest common GPU that a peak of `size` bytes fits on.

    None: there is no such GPU.
    """
    return next((card for card in CARDS if size + RESERVED <= card * 10**9), None)
