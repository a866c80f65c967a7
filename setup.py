"""Packaging of RWKVInside.

The kernels and the recipes live at the top of the repository and are installed inside the package, because a top-level
package named `kernels` would hide Hugging Face's package of that name.
"""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
KERNELS = ["rwkvinside.kernels", *(f"rwkvinside.kernels.{part}" for part in ("bench", "gpu", "native"))]
sys.path.insert(0, str(ROOT))  # for `rwkvinside.support`, which the build uses
spec = importlib.util.spec_from_file_location("wkv7_native_build", ROOT / "kernels" / "wkv7" / "native" / "build.py")
native = importlib.util.module_from_spec(spec)  # by its path: the package that it belongs to is not installed yet
spec.loader.exec_module(native)


class BuildKernels(build_ext):
    """Compiles the CPU kernels, which are no Python module but a library behind a plain C interface.

    Without a compiler the installation goes on; `rwkvinside doctor` says what is missing.
    """

    def build_extension(self, ext: Extension) -> None:
        try:
            native.compile_library(Path(self.get_ext_fullpath(ext.name)))
        except native.CompileError as error:
            self.warn(f"the native WKV-7 kernels were not built: {error}")


setup(
    name="rwkvinside",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "rwkvinside/__init__.py").read_text(encoding="utf-8"))[1],
    description="Converts transformer language models into RWKV-7 and RWKV-attention hybrids by distillation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="RWKV, linear attention, distillation, hybrid language models",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=[*find_packages(include=["rwkvinside", "rwkvinside.*"]), *KERNELS, "rwkvinside.recipes"],
    package_dir={"rwkvinside.kernels": "kernels/wkv7", "rwkvinside.recipes": "configs"},
    ext_modules=[
        Extension(
            "rwkvinside.kernels.native._wkv7",
            [f"kernels/wkv7/native/{name}" for name in native.SOURCES],
            optional=True,  # an editable installation copies the result, if there is one
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    package_data={
        "rwkvinside.kernels.gpu": ["*.json"],
        "rwkvinside.kernels.native": ["*.cpp", "*.h"],
        "rwkvinside.recipes": ["*.yaml", "variants/*.yaml"],
    },
    install_requires=[
        "torch>=2.11",  # GPU users bring the build for their machine; `make venv` pins it in constraints.txt
        "transformers==5.23.*",  # attention and cache interfaces differ between minor versions
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "huggingface_hub>=2.0,<3",
        "deepspeed>=0.19.8,<0.20",
        "peft>=0.21,<0.22",  # adapters; how it marks quantized layers differs between minor versions
        "bitsandbytes>=0.50",  # quantized frozen weights, 8-bit optimizers
        "accelerate>=1.10",  # needed by peft and by transformers' loading
        "datasets>=5.0,<6",
        "pyarrow>=20",
        "numpy>=2,<3",
        "pydantic>=2.11,<3",
        "omegaconf>=2.3,<3",
        "PyYAML>=6",
        "Jinja2>=3.1",
        "rich>=14",
        "matplotlib>=3.9",
        "psutil>=6",
        "packaging",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "triton>=3.6; platform_system == 'Linux'",  # for its interpreter; torch for CUDA brings its own
            "flash-linear-attention>=0.6",  # its naive recurrence is an outside oracle
            "tensorboard>=2.18",
        ],
        "tensorboard": ["tensorboard>=2.18"],  # loggers, see `loggers:` in the configuration
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.20"],
        "eval": ["lm-eval>=0.4.9,<0.5"],  # benchmarks on exported directories
    },
    entry_points={"console_scripts": ["rwkvinside = rwkvinside.cli.main:main"]},
)
