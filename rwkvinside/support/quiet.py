"""What libraries print by themselves, and a command says better or not at all."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Keep libraries from printing what is no news here, for the rest of this process.

    These are transformers' bars for loading and writing weights, what DeepSpeed says of a machine without a GPU as soon
    as a library looks whether it is there, and PyTorch's warning about norms that are meant to stay fp32 in bf16.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Setting accelerator to CPU")
