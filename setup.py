"""Packaging of RWKVInside.

The kernels and the recipes live at the top of the repository and are installed inside the package, because a top-level
package named `kernels` would hide Hugging Face's package of that name.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

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
    packages=[*find_packages(include=["rwkvinside", "rwkvinside.*"]), "rwkvinside.kernels", "rwkvinside.recipes"],
    package_dir={"rwkvinside.kernels": "kernels/wkv7", "rwkvinside.recipes": "configs"},
    package_data={"rwkvinside.recipes": ["*.yaml"]},
    install_requires=[
        "torch>=2.11",  # GPU users bring the build for their machine; `make venv` pins it in constraints.txt
        "transformers==5.23.*",  # attention and cache interfaces differ between minor versions
        "tokenizers>=0.22",
        "safetensors>=0.6",
        "huggingface_hub>=2.0,<3",
        "deepspeed>=0.19.8,<0.20",
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
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12"],
        "eval": ["lm-eval>=0.4.9,<0.5"],  # benchmarks on exported directories
    },
    entry_points={"console_scripts": ["rwkvinside = rwkvinside.cli:main"]},
)
