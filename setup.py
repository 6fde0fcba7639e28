"""Package metadata and version ranges; constraints.txt pins what is tested.

Native sources in kernels/ are built into pipeline/ from here. Installing without build isolation makes torch, which
they compile against, importable at that time.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "pipeline" / "__init__.py").read_text(), re.M)
assert VERSION, "pipeline/__init__.py does not say __version__"

REQUIREMENTS = [
    "datasets>=5.0",
    # Frozen parameters under activation checkpointing, sequence-parallel checkpoints and the gradients of a compiled
    # all-to-all are right from 0.19.8 on.
    "deepspeed>=0.19.8",
    "einops>=0.8",
    "matplotlib>=3.9",
    "ninja>=1.11",
    "numpy>=2.0",
    "psutil>=6.0",
    "pydantic>=2.10",
    "pyyaml>=6.0",
    "safetensors>=0.8",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    # Older releases have known ways around `weights_only`. A vendor's build of 2.10 calls itself 2.10.0a0+something.
    "torch>=2.10.0.dev0",
    "tqdm>=4.66.3",
    "transformers>=5.17",
    "tyro>=1.0",
]

EXTRAS = {
    "dev": [
        "hypothesis>=6.100",
        "mypy>=2.0",
        "pytest>=9.0",
        "pytest-timeout>=2.3",
        "ruff>=0.17",
        "types-psutil",
        "types-PyYAML",
    ],
    "evals": ["lm-eval>=0.4.9"],
    "flash": ["flash-attn>=2.8"],
    "wandb": ["wandb>=0.20"],
}

setup(
    name="mnemos",
    version=VERSION.group(1),
    description="Language models that remember, trained on one DeepSpeed engine",
    packages=find_packages(include=["pipeline", "pipeline.*"]),
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mnemos = pipeline.cli:main"]},
)
