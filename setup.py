"""Packages and the CPU kernel; everything else is in pyproject.toml.

The kernels and the recipes live at the top of the repository and are installed inside the package, because a top-level
package named `kernels` would hide Hugging Face's package of that name.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = "kernels/wkv7/native"


def native_build() -> ModuleType:
    """Load the kernel's build script by its path, as its package is not installed yet."""
    root = Path(__file__).parent
    sys.path.insert(0, str(root))  # for `rwkvinside.support`, which the script uses
    spec = importlib.util.spec_from_file_location("wkv7_native_build", root / NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernel(build_ext):
    """Build of the CPU kernel, a library with a plain C interface.

    Without a compiler, and on Windows, the installation continues; `rwkvinside doctor` says what is missing.
    """

    def get_ext_filename(self, name: str) -> str:
        """Return a name that is not of one Python, as the library is not."""
        return f"{name.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile the library to where setuptools expects the extension."""
        native = native_build()
        try:
            native.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except native.CompileError as error:
            self.warn(
                f"the native WKV-7 kernel was not built: {error}. All works without it, but on a CPU the recurrence "
                "takes about four times as long (rwkvinside doctor)"
            )


class Wheel(bdist_wheel):
    """A wheel for all Pythons: of one platform with the kernel in it, of any without."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, ABI and platform."""
        platform = super().get_tag()[2]
        return "py3", "none", platform if any(Path(self.bdist_dir).rglob("_wkv7.so")) else "any"


setup(
    packages=[
        *find_packages(include=["rwkvinside", "rwkvinside.*"]),
        "rwkvinside.kernels",
        *(f"rwkvinside.kernels.{name}" for name in find_packages("kernels/wkv7")),
        "rwkvinside.recipes",
    ],
    package_dir={"rwkvinside.kernels": "kernels/wkv7", "rwkvinside.recipes": "configs"},
    ext_modules=[
        Extension(
            "rwkvinside.kernels.native._wkv7",
            sources=[f"{NATIVE}/kernels.cpp", f"{NATIVE}/dispatch.cpp"],
            depends=[f"{NATIVE}/wkv7.h", f"{NATIVE}/build.py"],
            optional=True,  # an editable installation copies the result if there is one
        )
    ],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": Wheel},
)
