"""Compilation of the CPU kernels into a shared library: at installation, or once into the user's cache (`cache.py`).

Imports only the standard library and `rwkvinside.support`, because the installation runs it before all else exists.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from rwkvinside.support.files import file_digest, replacing
from rwkvinside.support.system import WINDOWS

HERE = Path(__file__).parent
SOURCES = ("kernels.cpp", "dispatch.cpp", "wkv7.h")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast")
PORTABLE = ("-DWKV7_LANES=4", "-DWKV7_TABLE=wkv7_portable")
X86 = (
    ("-DWKV7_LANES=8", "-DWKV7_TABLE=wkv7_avx2", "-mavx2", "-mfma"),
    (
        "-DWKV7_LANES=16",
        "-DWKV7_TABLE=wkv7_avx512",
        "-mavx512f",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bw",
        "-mfma",
        "-mprefer-vector-width=512",
    ),
)


class CompileError(Exception):
    """The library cannot be built; the message says why and what to install."""


def source_hash() -> str:
    """Return a hash of sources and flags; a library built from others is not used."""
    parts = FLAGS, PORTABLE, X86, [file_digest(HERE / name) for name in SOURCES]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def find_compiler() -> list[str]:
    """Return the command of the compiler: CXX, which may have arguments or begin with ccache, or the first found.

    Raises:
        CompileError: there is none, CXX names none, or the system is Windows.
    """
    if WINDOWS:
        raise CompileError("the CPU kernel is for Linux and macOS, in WSL too")
    given = os.environ.get("CXX", "").strip()
    if not given:
        found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if found is None:
            raise CompileError(
                "no C++ compiler (c++, g++ or clang++) is installed; on Debian or Ubuntu: apt install g++"
            )
        return [found]
    try:
        command = shlex.split(given)
    except ValueError as error:
        raise CompileError(f"CXX is {given!r}: {error}") from error
    if not command or shutil.which(command[0]) is None:
        raise CompileError(f"CXX is {given!r}, and no such program is found")
    return command


def compile_library(target: Path) -> None:
    """Build the library from the sources next to this file.

    Takes about five seconds: three instruction sets on x86-64, compiled in parallel, one elsewhere.

    Args:
        target: file to write, under a temporary name first.

    Raises:
        CompileError: no compiler, its first error, or no place to write.
    """
    compiler = find_compiler()
    try:
        _compile(compiler, target)
    except OSError as error:
        raise CompileError(f"the library cannot be built: {error}") from error


def _compile(compiler: list[str], target: Path) -> None:
    name = " ".join(compiler)
    variants = (PORTABLE, *X86) if platform.machine() in ("x86_64", "AMD64") else (PORTABLE,)
    with tempfile.TemporaryDirectory() as scratch:
        openmp = ("-fopenmp",) if _accepts_openmp(compiler, scratch) else ()
        flags = (*FLAGS, *openmp)
        jobs = [(str(HERE / "kernels.cpp"), variant) for variant in variants]
        jobs.append((str(HERE / "dispatch.cpp"), (f'-DWKV7_SOURCE="{source_hash()}"',)))
        objects = [f"{scratch}/{i}.o" for i in range(len(jobs))]
        running = [
            subprocess.Popen(
                [*compiler, *flags, *extra, "-c", source, "-o", out], stderr=subprocess.PIPE, text=True, cwd=scratch
            )
            for (source, extra), out in zip(jobs, objects, strict=True)
        ]
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                raise CompileError(f"{name} failed: {_first_error(error)}")
        with replacing(target, unique=True) as temporary:
            link = subprocess.run(
                [*compiler, "-shared", *openmp, *objects, "-o", str(temporary)], stderr=subprocess.PIPE, text=True
            )
            if link.returncode:
                raise CompileError(f"{name} failed to link: {_first_error(link.stderr)}")


def _accepts_openmp(compiler: list[str], scratch: str) -> bool:
    program = Path(scratch) / "openmp.cpp"
    program.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
    probe = [*compiler, "-fopenmp", str(program), "-o", f"{scratch}/openmp"]
    return subprocess.run(probe, stderr=subprocess.DEVNULL).returncode == 0


def _first_error(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
