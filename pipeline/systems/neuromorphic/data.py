"""The text of each phase, and the loaders of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.checkpoint.loader_state import read_loader_state
from pipeline.checkpoint.manifest import pointed
from pipeline.config import RunConfig, replace
from pipeline.data.batch import StatefulLoader, TokenBatch
from pipeline.data.build import Listings, build_loader, build_source, list_data
from pipeline.data.byte_lengths import byte_lengths_of
from pipeline.data.run_tokenizer import UnknownTokenizerError, run_tokenizer
from pipeline.data.sources.base import Source
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.tokens.build import sidecar_of
from pipeline.data.tokens.listing import TokenListing, list_token_data
from pipeline.data.tokens.sidecar import makers_of
from pipeline.data_config import DataConfig
from pipeline.errors import UserError
from pipeline.lm.held_out_files import open_files
from pipeline.parallel.topology import Topology
from pipeline.system import Phase
from pipeline.systems.neuromorphic.config import PHASES, DataPhase, NeuromorphicConfig
from pipeline.systems.neuromorphic.facts import EOS, FactsLoader
from pipeline.systems.neuromorphic.facts_config import FactsConfig

TINY_STORIES = "roneneldan/TinyStories"
FINEWEB, DCLM = "HuggingFaceFW/fineweb-edu:sample-10BT", "mlfoundations/dclm-baseline-1.0"
SLIM_PAJAMA, COSMOPEDIA = "DKYoon/SlimPajama-6B", "HuggingFaceTB/cosmopedia:web_samples_v2"
FINE_MATH, OPEN_WEB_MATH = "HuggingFaceTB/finemath:finemath-4plus", "open-web-math/open-web-math"
WIKIPEDIA = "wikimedia/wikipedia:20231101.en"
WEB = (f"{FINEWEB}=0.6", f"{DCLM}=0.4")
SETS: Mapping[DataPhase, Mapping[str, Any]] = {
    "A": {"dataset": TINY_STORIES},
    "B": {"mix": WEB},
    "B-streaming": {"mix": WEB},
    "B-diverse": {"mix": (f"{FINEWEB}=0.7", f"{SLIM_PAJAMA}=0.3")},
    "C": {"mix": (f"{FINEWEB}=0.5", f"{DCLM}=0.35", f"{FINE_MATH}=0.15")},
    "C-synthetic": {"mix": (f"{FINEWEB}=0.5", f"{COSMOPEDIA}=0.35", f"{FINE_MATH}=0.15")},
    "D": {"mix": (f"{FINE_MATH}=0.5", f"{OPEN_WEB_MATH}=0.5")},
    "E": {"mix": (f"{FINEWEB}=0.7", f"{WIKIPEDIA}=0.3")},
    "longctx": {"dataset": WIKIPEDIA},
}
"""Sets of documents by the names of `--data-phase`, as fields of the data section."""
SET_OF_PHASE: Mapping[str, DataPhase] = {"A": "A", "B": "B", "C": "B"}
"""The set that a phase reads where nothing else is said."""


def phase_data(config: RunConfig, phase: str, *, held_out: bool = False) -> DataConfig:
    """The data section of a phase A, B or C: the run's where it names a source, which is that of all phases; else with
    the set of `--data-phase` (held-out documents: `--val-data-phase`), or of the phase itself."""
    assert isinstance(config.model, NeuromorphicConfig)
    data, sizes = config.data, config.model
    if data.path or data.dataset or data.mix or data.tokens or data.recall:
        return data
    name = (sizes.val_data_phase if held_out else None) or sizes.data_phase or SET_OF_PHASE[phase]
    return dataclasses.replace(data, **SETS[name])


def phase_reads(config: RunConfig, phase: str, *, held_out: bool = False) -> DataConfig | FactsConfig:
    """What a phase A, B or C reads: documents of a data section, or facts. Outside of all: as phase C."""
    assert isinstance(config.model, NeuromorphicConfig)
    facts = config.model.facts
    return phase_data(config, phase, held_out=held_out) if facts is None else facts.of_phase(phase)


class PhaseText:
    """A part of the system class: what it reads, each source of documents opened once."""

    config: RunConfig
    sizes: NeuromorphicConfig
    files: Any

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self._sources: dict[DataConfig, Source] = {}
        self._held_out: dict[DataConfig | FactsConfig, StatefulLoader[TokenBatch]] = {}
        self._named: dict[str, StatefulLoader[TokenBatch]] | None = None
        self._byte_lengths: tuple[Tensor | None] | None = None
        self.begins: str | None = None
        """Where a run of later phases alone begins to read, for its log."""

    def run_phases(self) -> tuple[str, ...]:
        """Names of the phases of the run, in their order."""
        raise NotImplementedError

    def list_data(self, *, ask_servers: bool = False) -> dict[DataConfig, Listings]:
        """As `System.list_data`: of each data section that a phase of the run has. Facts are made up: none."""
        if self.sizes.facts is not None:
            return {}
        sections = [
            phase_data(self.config, phase, held_out=side) for phase in self.run_phases() for side in (False, True)
        ]
        return {
            section: list_data(dataclasses.replace(self.config, data=section), ask_servers=ask_servers)
            for section in dict.fromkeys(sections)
        }

    def loader(self, phase: Phase, topology: Topology) -> StatefulLoader[TokenBatch]:
        """As `System.loader`."""
        # Opened before the first step: not the first evaluation, an hour later, is to find that a file is not there.
        self.file_loaders(topology)
        opened = self._open(phase, topology, held_out=False)
        if phase.name == self.run_phases()[0] != PHASES[0] and self.config.init_from is not None:
            self.begins = _behind(opened, self.config.init_from)
        return opened

    def held_out(self, phase: Phase, topology: Topology) -> StatefulLoader[TokenBatch]:
        """As `System.held_out`: opened once, so that what it has read stays read."""
        what = phase_reads(self.config, phase.name, held_out=True)
        if what not in self._held_out:
            self._held_out[what] = self._open(phase, topology, held_out=True)
        else:
            self._held_out[what].reset()
        return self._held_out[what]

    def _open(self, phase: Phase, topology: Topology, *, held_out: bool) -> StatefulLoader[TokenBatch]:
        section = phase_reads(self.config, phase.name, held_out=held_out)
        if isinstance(section, FactsConfig):
            return self._facts(section, topology, held_out=held_out)
        config, files = dataclasses.replace(self.config, data=section), self._listed(section)
        if section.recall is None and not section.tokens and section not in self._sources:
            self._sources[section] = build_source(config, files)
        return build_loader(
            config,
            topology,
            vocab_size=self.sizes.vocab,
            held_out=held_out,
            files=files,
            source=self._sources.get(section),
        )

    def _facts(self, task: FactsConfig, topology: Topology, *, held_out: bool) -> FactsLoader:
        config = self.config
        rows = config.evaluation.batch_size if held_out else 0
        return FactsLoader(
            task,
            sequence_length=config.sequence_length,
            batch_size=rows or config.batch_size,
            grad_accum=1 if held_out else config.grad_accum,
            data_rank=topology.data_rank,
            data_degree=topology.data,
            seed=config.seed,
            held_out=held_out,
        )

    def _listed(self, section: DataConfig) -> Listings | None:
        """What was listed of a section; None where that was in another process, of another run."""
        return self.files.get(section) if isinstance(self.files, dict) else None

    def file_loaders(self, topology: Topology) -> Mapping[str, StatefulLoader[TokenBatch]]:
        """Of the held-out files that have a name, each at its start."""
        if self._named is None:
            self._named = open_files(self.config, topology, self.sizes.vocab)
        for loader in self._named.values():
            loader.reset()
        return self._named

    def with_vocabulary(self) -> RunConfig:
        """The config with a model of as many ids as the data has: those of the tokenizer of documents, or of a
        synthetic task. Of token files it is what `--model.vocab` says. Raises UserError where the run has facts and
        documents."""
        data, vocab = self.config.data, self.sizes.vocab
        if self.sizes.facts is not None:
            check_facts_alone(data)
            vocab = self.sizes.facts.vocab
        elif data.recall is not None:
            vocab = data.recall.vocab_size
        elif not data.tokens:
            vocab = self.tokenizer().vocab_size
        return replace(self.config, model=dataclasses.replace(self.sizes, vocab=vocab))

    def tokenizer(self, makers: Mapping[str, str] | None = None) -> Tokenizer:
        """That of the run's data. `makers`: of its token files, as `makers_of`; None: their sidecars say it. Raises
        UserError where the data is no text, or its tokenizer is not known."""
        data = self.config.data
        if data.recall is not None or self.sizes.facts is not None:
            task = "facts task" if data.recall is None else "recall task"
            raise UserError(f"it was trained on the {task}, whose ids stand for no text: give another model")
        if makers is None and data.tokens:
            listed = self._listed(data)
            listed = listed if isinstance(listed, TokenListing) else list_token_data(data)
            makers = makers_of(sidecar_of(file) for source in listed.training for file in source.files)
        return run_tokenizer(data, self.sizes.vocab, makers or {})

    def end_of_document(self) -> int | None:
        """The id that ends a document; None where the data does not say."""
        data = self.config.data
        if self.sizes.facts is not None:
            return EOS
        if data.recall is not None:
            return None
        try:
            return data.eos_id if data.tokens and data.eos_id is not None else self.tokenizer().eos_id
        except UnknownTokenizerError:
            return None

    def text_limit(self) -> int | None:
        """None: a text of any length is read piece by piece through the carry."""
        return None

    def byte_lengths(self) -> Tensor | None:
        """Bytes of text that each token id stands for; None where that is not known."""
        if self.sizes.facts is not None:
            return None
        # Its tokenizer is loaded for it, and evaluations ask again.
        if self._byte_lengths is None:
            data = self.config.data
            self._byte_lengths = (byte_lengths_of(data, self._listed(data), self.sizes.vocab),)
        (lengths,) = self._byte_lengths
        if lengths is None or lengths.numel() >= self.sizes.vocab:
            return lengths
        return F.pad(lengths, (0, self.sizes.vocab - lengths.numel()))


def check_facts_alone(data: DataConfig) -> None:
    """Raises UserError where the section names a source: facts are read in place of documents."""
    for name in ("path", "dataset", "mix", "tokens", "held_out_tokens", "recall"):
        if getattr(data, name):
            flag = f"--data.{name.replace('_', '-')}"
            raise UserError(f"{flag}: facts are read in place of documents: leave it out, or take another recipe")


def _behind(loader: StatefulLoader[TokenBatch], weights: Path) -> str | None:
    """Moves a loader to where that of the checkpoint `weights` stood, if it read the same data in the same streams; in
    words, where it begins. None: the checkpoint has no position, or one in other data."""
    state = read_loader_state(pointed(weights))
    saved, here = state.get("fingerprint"), json.loads(json.dumps(loader.state_dict()["fingerprint"]))
    if saved == here:
        loader.load_state_dict(state)
        return f"behind what {weights} has read"
    if not isinstance(saved, dict) or saved.get("source") != here.get("source"):
        return None
    changed = ", ".join(key for key in here if saved.get(key) != here[key])
    return (
        f"from the start, which {weights} has read too: its position is one of other settings ({changed}); give the"
        " same to read on behind it"
    )
