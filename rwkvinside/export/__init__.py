"""Exports of a finished run: written into a temporary directory, verified in a fresh process, then renamed."""

from .card import changes
from .huggingface import export_hf
from .verify import verify

__all__ = ["changes", "export_hf", "verify"]
