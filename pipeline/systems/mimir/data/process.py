"""A process that makes peptides whose distribution, and so whose entropy, is known exactly.

A background peptide has independent residues of the composition of Swiss-Prot. An interacting peptide of a target is
one too, of whose residues, in a share `planted` of all cases, M neighbouring ones are replaced by the target's motif
m, which begins at one of the first S residues (of all that leave room for it, where no number is set), drawn evenly.
With q the law of independent residues and N(x) the number of these places at which m stands in x, its law given label,
target and length is

    p(x) = q(x) [1 - planted + planted N(x) / (S q(m))],

for the place is none of what is seen. So -log p(x) needs N(x) alone, and the entropy needs the law of N under q, which
an automaton that reads S + M - 1 residues and counts m gives exactly, with no sum over peptides.

The motif can be read off the target's own sequence: each of its residues pairs with one there (D with K, E with R, F
with L, S with V) that stands behind the marker letter of its place in the motif.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from pipeline.errors import UserError, brief, shown
from pipeline.systems.mimir.peptides import BACKGROUND, INTERACTING

SWISS_PROT = {
    "A": 8.25, "C": 1.38, "D": 5.46, "E": 6.72, "F": 3.86, "G": 7.07, "H": 2.27, "I": 5.91, "K": 5.80, "L": 9.65,
    "M": 2.41, "N": 4.06, "P": 4.74, "Q": 3.93, "R": 5.53, "S": 6.65, "T": 5.36, "V": 6.86, "W": 1.10, "Y": 2.92,
}  # fmt: skip
"""Percent of the residues of UniProtKB/Swiss-Prot, by its release statistics."""
RESIDUES = "".join(SWISS_PROT)
COMPOSITION = np.array(list(SWISS_PROT.values())) / sum(SWISS_PROT.values())
"""Probabilities of RESIDUES [20] float64."""
ENTROPY = float(-(COMPOSITION * np.log(COMPOSITION)).sum())
"""Of one residue, in nats: 2.889."""
PAIRS = {"D": "K", "K": "D", "E": "R", "R": "E", "F": "L", "L": "F", "S": "V", "V": "S"}
"""Letters of motifs, and what each pairs with in the target."""
MARKERS = "CWHMYQ"
"""Letters of a target that only mark: the residue behind the j-th pairs with residue j of the motif."""
COPIES, SHORTEST_TARGET, LONGEST_TARGET = 2, 40, 80
_PLACES = {letter: place for place, letter in enumerate(RESIDUES)}


@dataclass(frozen=True)
class ProcessSettings:
    """What decides a process: two with equal settings are the same one."""

    targets: int = 32
    """Targets, each with a motif of its own."""
    motif: int = 4
    """Residues of a motif."""
    planted: float = 0.95
    """Share of the interacting peptides that hold their target's motif."""
    places: int = 0
    """Residues, from the first on, at which a motif may begin; 0: all that leave room for it. Few are learnt faster."""
    min_length: int = 8
    """Residues of the shortest peptide; lengths are drawn evenly."""
    max_length: int = 20
    """Residues of the longest peptide."""
    seed: int = 0
    """Of the motifs and the sequences of the targets."""

    def __post_init__(self) -> None:
        if self.targets < 1:
            raise UserError(f"--targets is {shown(self.targets)}: give 1 or more")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give 0 or more")
        if not 2 <= self.motif <= len(MARKERS):
            raise UserError(f"--motif is {shown(self.motif)}: give 2 to {len(MARKERS)} residues")
        if not 0 <= self.planted <= 1:
            raise UserError(f"--planted is {self.planted}: give a share from 0 to 1")
        if self.places < 0:
            raise UserError(f"--places is {shown(self.places)}: give 0 or more")
        if self.min_length > self.max_length:
            raise UserError(f"--min-length {self.min_length} is above --max-length {self.max_length}: exchange them")
        if self.min_length < self.motif:
            raise UserError(
                f"--min-length {self.min_length} has no room for a motif of {self.motif}: give {self.motif} or more"
            )


class Process:
    """Motifs and targets, the peptides that they make, and the exact probabilities of these."""

    def __init__(self, settings: ProcessSettings) -> None:
        """Raises UserError where there are not so many motifs that differ enough."""
        self.settings = settings
        generator = np.random.Generator(np.random.PCG64([settings.seed, 1]))
        self.target_names: tuple[str, ...] = tuple(f"T{number:04}" for number in range(settings.targets))
        self.motifs: tuple[str, ...] = tuple(_choose_motifs(settings, generator))
        self.target_sequences: tuple[str, ...] = tuple(_target_sequence(motif, generator) for motif in self.motifs)

    def motif_of(self, target: str) -> str:
        """Raises KeyError for a name that is no target of the process."""
        return self._motifs[target]

    @cached_property
    def _motifs(self) -> dict[str, str]:
        return dict(zip(self.target_names, self.motifs, strict=True))

    @property
    def lengths(self) -> range:
        return range(self.settings.min_length, self.settings.max_length + 1)

    def places(self, length: int) -> int:
        """S: at how many residues of a peptide of such a length a motif may begin."""
        room = length - self.settings.motif + 1
        return min(room, self.settings.places or room)

    def draw(self, labels: np.ndarray, targets: np.ndarray, generator: np.random.Generator) -> list[str]:
        """A peptide for each label and index of a target [N], of a length drawn for it."""
        lengths = generator.integers(self.settings.min_length, self.settings.max_length + 1, len(labels))
        residues = generator.choice(len(RESIDUES), (len(labels), self.settings.max_length), p=COMPOSITION)
        size = self.settings.motif
        motifs = np.array([[_PLACES[letter] for letter in motif] for motif in self.motifs])
        planted = np.flatnonzero((labels == INTERACTING) & (generator.random(len(labels)) < self.settings.planted))
        starts = generator.integers(
            0, np.array([self.places(length) for length in lengths[planted].tolist()], np.int64)
        )
        residues[planted[:, None], starts[:, None] + np.arange(size)] = motifs[targets[planted]]
        text = np.frombuffer(RESIDUES.encode(), np.uint8)[residues]
        return [row[:length].tobytes().decode() for row, length in zip(text, lengths.tolist(), strict=True)]

    def log_probability(self, sequence: str, label: int, target: str = "") -> float:
        """Of a peptide given its label, target and length, in nats; -inf for one with letters that it never makes."""
        if any(letter not in _PLACES for letter in sequence):
            return -math.inf
        independent = sum(math.log(COMPOSITION[_PLACES[letter]]) for letter in sequence)
        if label == BACKGROUND:
            return independent
        motif = self.motif_of(target)
        count = sum(sequence.startswith(motif, start) for start in range(self.places(len(sequence))))
        ratio = self._ratios(motif, len(sequence))[count]
        return independent + math.log(ratio) if ratio > 0 else -math.inf

    def entropy(self, label: int, target: str, length: int) -> float:
        """Of a peptide of `length` residues given label and target, in nats: exact."""
        if label == BACKGROUND:
            return length * ENTROPY
        motif, planted = self.motif_of(target), self.settings.planted
        own = -sum(math.log(COMPOSITION[_PLACES[letter]]) for letter in motif)
        independent = (1 - planted) * length * ENTROPY + planted * ((length - len(motif)) * ENTROPY + own)
        ratios = self._ratios(motif, length)
        counted = occurrences(motif, self.places(length) + len(motif) - 1) * ratios
        seen = counted > 0
        return float(independent - (counted[seen] * np.log(ratios[seen])).sum())

    def entropy_per_residue(self, label: int, targets: Sequence[str] | None = None) -> float:
        """Nats per residue of peptides of all lengths and of `targets`, all by default, equally often."""
        names = [""] if label == BACKGROUND else self.target_names if targets is None else targets
        nats = [self.entropy(label, name, length) for name in names for length in self.lengths]
        return math.fsum(nats) / (len(names) * sum(self.lengths))

    def _ratios(self, motif: str, length: int) -> np.ndarray:
        """p(x) / q(x) by the number of places at which the motif stands in x [places + 1]."""
        places, planted = self.places(length), self.settings.planted
        own = math.prod(COMPOSITION[_PLACES[letter]] for letter in motif)
        return 1 - planted + planted * np.arange(places + 1) / (places * own)

    def write(self, path: Path) -> None:
        """The settings, from which `read_process` makes it again, and for a person what they come to."""
        facts = {
            "entropy_per_residue": {
                "interacting": self.entropy_per_residue(INTERACTING),
                "background": self.entropy_per_residue(BACKGROUND),
            },
            "motifs": self._motifs,
        }
        path.write_text(json.dumps({"settings": asdict(self.settings), **facts}, indent=1) + "\n")


def read_process(path: Path) -> Process:
    """The process of a file that `Process.write` wrote. Raises UserError."""
    try:
        return Process(ProcessSettings(**json.loads(path.read_text())["settings"]))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name the file that `data synth` wrote") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} describes no process ({brief(error)}): make it again with `data synth`") from error


@lru_cache(maxsize=4096)
def occurrences(motif: str, length: int) -> np.ndarray:
    """Probability that `motif` stands so many times in `length` independent residues [length - len(motif) + 2].

    By the automaton of Knuth, Morris and Pratt: its state is the longest prefix of the motif that ends here.
    """
    size, most = len(motif), length - len(motif) + 1
    law = np.zeros((size, most + 1))
    law[0, 0] = 1.0
    steps = [(state, *_next(motif, state, letter), COMPOSITION[place]) for state in range(size)
             for place, letter in enumerate(RESIDUES)]  # fmt: skip
    for _ in range(length):
        after = np.zeros_like(law)
        for state, following, found, probability in steps:
            if found:
                after[following, 1:] += probability * law[state, :-1]
            else:
                after[following] += probability * law[state]
        law = after
    return law.sum(0)


def _next(motif: str, state: int, letter: str) -> tuple[int, bool]:
    """The state after a letter, and whether it ends the motif."""
    read = motif[:state] + letter
    whole = read == motif
    start = 1 if whole else 0
    following = next(len(read) - cut for cut in range(start, len(read) + 1) if motif.startswith(read[cut:]))
    return following, whole


def _choose_motifs(settings: ProcessSettings, generator: np.random.Generator) -> list[str]:
    """Motifs of which any two differ in two places or more, and of which none begins with all but the first residue of
    any: a peptide with one of them seldom has another."""
    letters, size = "".join(PAIRS), settings.motif
    chosen: list[str] = []
    heads, tails = set[str](), set[str]()
    for number in generator.permutation(len(letters) ** size).tolist():
        if len(chosen) == settings.targets:
            break
        motif = "".join(letters[number // len(letters) ** place % len(letters)] for place in range(size))
        if motif[:-1] == motif[1:] or motif[1:] in heads or motif[:-1] in tails:
            continue
        if any(sum(a != b for a, b in zip(motif, other, strict=True)) < 2 for other in chosen):
            continue
        chosen.append(motif)
        heads.add(motif[:-1])
        tails.add(motif[1:])
    if len(chosen) < settings.targets:
        raise UserError(
            f"--targets {settings.targets}: only {len(chosen)} motifs of {size} residues differ enough: give fewer"
            " targets, or a larger --motif"
        )
    return chosen


def _target_sequence(motif: str, generator: np.random.Generator) -> str:
    filler = [letter for letter in RESIDUES if letter not in MARKERS]
    share = np.array([COMPOSITION[_PLACES[letter]] for letter in filler])
    sites = [MARKERS[place] + PAIRS[letter] for place, letter in enumerate(motif)] * COPIES
    length = int(generator.integers(SHORTEST_TARGET, LONGEST_TARGET + 1))
    parts = [*sites, *generator.choice(filler, length - 2 * len(sites), p=share / share.sum()).tolist()]
    return "".join(parts[place] for place in generator.permutation(len(parts)))
