"""Token files that the tests share."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ModelConfig, RunConfig
from pipeline.data.build import build_loader
from pipeline.data.tokens import blocks, http
from pipeline.data.tokens.loader import WindowLoader
from pipeline.data.tokens.remote import Remote, look_up
from pipeline.data_config import DataConfig
from pipeline.parallel.topology import Topology
from tests.data.conftest import refusal  # noqa: F401
from tests.data.tokens.serving import Server

VOCABULARY = 260
IDS = np.random.default_rng(0).integers(0, 256, 5000)
SIZE = 2 * len(IDS)


def write(path: Path, ids: Sequence[int] | np.ndarray, dtype: str = "uint16") -> str:
    """A token file as OLMo's tools write it."""
    np.asarray(ids).astype(np.dtype(dtype).newbyteorder("<")).tofile(path)
    return str(path)


@pytest.fixture
def token_files(tmp_path: Path) -> list[str]:
    """Three files of 1000, 93 and 407 ids."""
    random = np.random.default_rng(0)
    return [write(tmp_path / f"part-{i}.npy", random.integers(0, 256, n)) for i, n in enumerate((1000, 93, 407))]


def config(tokens: Sequence[str], **options: Any) -> RunConfig:
    """A run on token files; `options` are those of the data, or of the run where it has such a field."""
    plain = {"steps": 1, "batch_size": 2, "sequence_length": 16, "lr": 1.0}
    plain |= {key: options.pop(key) for key in list(options) if key in RunConfig.__dataclass_fields__}
    data = DataConfig(tokens=tuple(tokens), **options)
    return RunConfig(recipe="", model=ModelConfig(), data=data, **plain)  # type: ignore[arg-type]


Open = Callable[..., WindowLoader]


def open_loader(
    tokens: Sequence[str], *, rank: int = 0, ranks: int = 1, held_out: bool = False, vocab: int = VOCABULARY,
    **options: Any,
) -> WindowLoader:  # fmt: skip
    topology = Topology(world=ranks, rank=rank)
    found = build_loader(config(tokens, **options), topology, vocab_size=vocab, held_out=held_out)
    assert isinstance(found, WindowLoader)
    return found


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Of tmp_path/served. Blocks have 1024 bytes, and nothing pauses before it tries again."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(blocks, "BLOCK", 1024)
    monkeypatch.setattr(http, "PAUSE", 0.0)
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield found
        found.shutdown()


@pytest.fixture
def file(server: Server) -> str:
    """Of IDS, at `server.url`/a.npy."""
    return write(server.folder / "a.npy", IDS)


@pytest.fixture
def content(file: str) -> bytes:
    return Path(file).read_bytes()


def open_url(url: str, cache: Path) -> Remote:
    """As the first run that reads it does."""
    return Remote(url, cache, look_up([url], cache)[url].version)
