"""The weights that training begins with: random ones that seed and names decide, and the embedding of a given model."""

from __future__ import annotations

import glob
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.files.given_path import expanded, is_path
from pipeline.parallel.topology import Topology
from pipeline.parallel.weight_files import StoredTensor, index_files, model_tensors
from pipeline.parallel.weights import fill, generator_for, load_safetensors
from pipeline.systems.cvfp.config import CvfpConfig

EMBEDDING = "embedding.weight"
PUBLISHED_STD, BIAS_STD = 0.1, 0.01
"""Of the published initialisation: blocks' weights, and their biases."""
RANDOM_EMBEDDING_STD = 0.02
NAMES = ("wte.weight", "embed_tokens.weight", "word_embeddings.weight", "embed_in.weight")
"""How transformers' decoders call their input embedding, behind any prefix."""


def initialise(
    model: nn.Module, sizes: CvfpConfig, seed: int, topology: Topology, *, replaced: Collection[str] = ()
) -> None:
    """Fills all weights. Collective; raises UserError where a given embedding cannot be read or does not fit.

    `replaced`: parameters that a checkpoint fills after this, whose files need not be there.
    """

    def value(name: str, shape: torch.Size) -> Tensor:
        return initial_value(sizes, seed, name, shape)

    given = sizes.embedding is not None
    fill(model, value, [name for name, _ in model.named_parameters() if not (given and name == EMBEDDING)])
    if given and EMBEDDING not in replaced:
        _load_embedding(model, str(sizes.embedding), topology)


def initial_value(sizes: CvfpConfig, seed: int, name: str, shape: torch.Size) -> Tensor:
    """A random parameter, float32, as seed and name decide it."""
    generator = generator_for(seed, name)
    if "norm" in name:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if name.startswith("head."):
        bound = 1 / math.sqrt(sizes.width)
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = PUBLISHED_STD if sizes.as_published else sizes.initial_std
    scale = RANDOM_EMBEDDING_STD if name == EMBEDDING else std if name.endswith("weight") else BIAS_STD
    return torch.randn(shape, generator=generator).mul_(scale)


def _load_embedding(model: nn.Module, name: str, topology: Topology) -> None:
    what = f"--model.embedding {name}"
    found: dict[str, str] = {}

    def find() -> Mapping[str, StoredTensor]:
        folder = embedding_folder(name)
        try:
            stored = model_tensors(folder)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        fitting = [tensor for tensor in stored if tensor.split(".", 1)[-1] in NAMES or tensor.endswith(NAMES)]
        if not fitting:
            raise UserError(f"{what}: no input embedding among its tensors: name a decoder of transformers")
        found[EMBEDDING] = fitting[0]
        return stored

    load_safetensors(model, find, found, topology, what=what)


def embedding_folder(name: str) -> Path:
    """The folder of a model of transformers, downloaded where `name` is that of the hub. Raises UserError."""
    folder = expanded(name)
    if folder.is_dir():
        return folder
    if folder.exists() or is_path(name):
        raise UserError(f"--model.embedding {name}: no folder of a model: give one, or a name of the Hugging Face hub")
    repository, _, revision = name.partition("@")
    from huggingface_hub import snapshot_download

    try:
        listed = Path(snapshot_download(repository, revision=revision or None, allow_patterns=["*.json"]))
        index = listed / "model.safetensors.index.json"
        files = set(index_files(listed).values()) if index.exists() else {"model.safetensors"}
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(repository, revision=listed.name, allow_patterns=patterns))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--model.embedding {name}: cannot be downloaded ({type(error).__name__}): give a local folder of the model"
        ) from error
