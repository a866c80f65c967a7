"""Runs a file of test cases in a separate process: whether Triton interprets or compiles is settled when it is
imported, and the process that runs all tests may have imported it either way."""

import os
import subprocess
import sys
from pathlib import Path


def run_cases(*files: str, interpret: bool) -> None:
    """Run the cases of files, next to this one or anywhere by their paths; a failure shows what pytest printed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    cases = [str(Path(__file__).parent / file) for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
