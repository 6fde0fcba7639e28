"""A memory emptied at the window's borders, or given another document's state, is what a slow computation says: each
document by itself, in one forward pass, its memory read window by window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import RunConfig, replace
from pipeline.data.batch import TokenBatch
from pipeline.errors import UserError
from pipeline.ops.slots import Slots
from pipeline.parallel.topology import Topology
from pipeline.recipes.miras import miras_recall, miras_smollm2, miras_tiny
from pipeline.runtime.sync import SyncPoint
from pipeline.system import Carry, Phase
from pipeline.systems.miras import create
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.context_memory import ContextTokens
from pipeline.systems.miras.emptied import EMPTIED, WITHOUT, emptied_options, split_at_windows
from pipeline.systems.miras.evaluation import check_gap, full_length, gap_modes, state_tokens
from pipeline.systems.miras.memory import MemoryCarry
from pipeline.systems.miras.model import MirasModel
from pipeline.systems.miras.rule_config import SlotsConfig
from pipeline.systems.miras.segments import plan_segments
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import VOCABULARY, attached
from tests.lm.families import save_decoder
from tests.systems.miras.harness import batch, built, cut, run

WINDOW = 10
"""Of the config: a multiple of the 5 tokens of a chunk, and not of the 7 of a segment of mac."""
STEP = 20
KINDS = [("residual", "titans"), ("mal", "titans"), ("mag", "delta"), ("mac", "titans"), ("mac", "mlp")]
KINDS += [("residual", rule) for rule in ("delta", "moneta", "yaad", "memora", "mlp", "swiglu")]
ROWS = [[47, 6, 27], [33, 47]]
"""Documents of two streams, read in four steps."""
BorderState = Callable[[int, int, MemoryCarry], MemoryCarry | None]
"""state(layer, window, carry): what a layer's memory finds at a border, where `carry` is what it left."""


def configured(attachment: str, rule: str) -> RunConfig:
    config = attached(attachment, rule=rule)
    assert isinstance(config.model, MirasConfig)
    memory = config.model.memory
    memory = dataclasses.replace(memory, swiglu=dataclasses.replace(memory.swiglu, gradient_chunk=5, hidden=1))
    model = dataclasses.replace(config.model, memory=memory)
    return replace(config, model=model, sequence_length=STEP, evaluation__steps=4, evaluation__full_length=60)


@contextmanager
def window_by_window(model: MirasModel, state: BorderState) -> Iterator[None]:
    """Every memory reads a row, which is one document, a window at a time, from `state` at each border."""
    originals = {}
    for name, module in model.memory.items():
        part: Any = module.core if model.config.memory.attachment == "mac" else module
        originals[name] = (part, part.forward)

        def branch(
            hidden: Tensor,
            ids: Tensor,
            carry: None,
            topology: Topology,
            *,
            layer: int = int(name),
            f: Any = part.forward,
        ) -> Any:
            outs, after, found = [], None, None
            for index, piece in enumerate(hidden.split(WINDOW, dim=1)):
                after = None if index == 0 else state(layer, index, found)  # type: ignore[arg-type]
                out, found, health = f(piece, torch.zeros_like(ids[:, : piece.shape[1]]), after, topology)
                outs.append(out)
            return torch.cat(outs, dim=1), found, health

        def core(
            tokens: ContextTokens, q: Tensor, v: Tensor, out: Tensor, ids: Tensor, plan: Any, carry: None,
            topology: Topology, scale: float, *, layer: int = int(name), f: Any = part.forward,
        ) -> Any:  # fmt: skip
            outs, found, memory = [], None, model.config.memory
            for start in range(0, q.shape[1], WINDOW):
                here = slice(start, start + WINDOW)
                zeros = torch.zeros_like(ids[:, here])
                after = None if start == 0 else state(layer, start // WINDOW, found)  # type: ignore[arg-type]
                # Without what came before, a window is as the start of a document.
                places = torch.arange(zeros.shape[1])[None] + (start if after is not None else 0)
                known = None if after is None else after.tail_segments
                plan = plan_segments(
                    zeros, places, known, length=memory.context, taps=memory.conv, grain=memory.chunk_start or 1
                )
                part = ContextTokens(*(x[:, here] for x in tokens))
                refined, found, health = f(
                    part, q[:, here], v[:, here], out[:, here], zeros, plan, after, topology, scale
                )
                outs.append(refined)
            return torch.cat(outs, dim=1), found, health

        part.forward = core if model.config.memory.attachment == "mac" else branch
    try:
        yield
    finally:
        for part, forward in originals.values():
            part.forward = forward


def emptied(layer: int, window: int, carry: MemoryCarry) -> None:
    return None


def plain(system: MirasSystem, model: MirasModel, ids: Tensor, state: BorderState | None, **options: Any) -> Tensor:
    """Losses [tokens] of one document by itself."""
    if state is None:
        return run(system, model, batch(ids, [len(ids)]), **options).tokens["losses"][0]
    with window_by_window(model, state):
        return run(system, model, batch(ids, [len(ids)])).tokens["losses"][0]


def documents() -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(4)
    return [[torch.randint(VOCABULARY, (size,), generator=draw) for size in row] for row in ROWS]


@pytest.mark.parametrize(("attachment", "rule"), KINDS)
@torch.no_grad()
def test_emptied_is_each_window_from_an_empty_memory(attachment: str, rule: str) -> None:
    """Of packed documents over steps; chunks lie alike in both where a document begins at a chunk's start."""
    system, model = built(configured(attachment, rule))
    lengths = [47, 6, 27] if rule in ("titans", "delta") or attachment == "mac" else [45, 5, 30]
    ids = torch.randint(VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(5))
    whole = batch(ids, lengths)
    carry: Any = {}
    found = []
    for start in range(0, len(ids), STEP):
        output = run(system, model, cut(whole, start, start + STEP), carry, memory=True, emptied=True)
        carry = output.carry
        found.append(output.tokens["losses"][0])
    expected = torch.cat([plain(system, model, part, emptied) for part in ids.split(lengths)])
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-9, atol=1e-9)
    remembering = run(system, model, whole).tokens["losses"][0]
    assert (remembering[WINDOW:40] - expected[WINDOW:40]).abs().max() > 1e-3, "the memory would have held something"
    torch.testing.assert_close(remembering[:WINDOW], expected[:WINDOW], rtol=1e-9, atol=1e-9)


class Streams:
    """The rows of `documents`, packed, in steps."""

    def __init__(self) -> None:
        rows = [batch(torch.cat(row), [len(ids) for ids in row]) for row in documents()]
        columns = (torch.cat([getattr(row, name) for row in rows]) for name in TokenBatch.__dataclass_fields__)
        *tokens, _ = columns
        self.whole = TokenBatch(*tokens, torch.arange(len(rows)))
        self.step = 0

    def next_step(self) -> list[TokenBatch]:
        self.step += 1
        return [cut(self.whole, (self.step - 1) * STEP, self.step * STEP)]


@pytest.mark.parametrize(("attachment", "rule"), [("residual", "titans"), ("mac", "titans"), ("residual", "mlp")])
def test_the_five_losses_are_those_of_documents_by_themselves(
    attachment: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system, model = built(configured(attachment, rule))
    monkeypatch.setattr(system, "held_out", lambda phase, topology: Streams())
    found = system.gap_closed(model, Phase("train", 1, ()), SyncPoint(Topology()))
    with torch.no_grad():
        expected = reference(system, model)
    labels = torch.cat(list(expected["labels"]))
    assert found.scalars["gap/labels"] == int(labels.sum()) and found.scalars["gap/documents"] == 4
    loss = {}
    for name in ("window", "full", "memory", "emptied", "swapped"):
        loss[name] = float(torch.cat(expected[name])[labels].mean())
        assert found.scalars[f"gap/loss_{name}"] == pytest.approx(loss[name], rel=1e-10), name
    assert found.scalars["gap/worth"] == pytest.approx(loss["emptied"] - loss["memory"], rel=1e-8)
    gap = loss["window"] - loss["full"]
    closed = (min(loss["window"], loss["emptied"]) - loss["memory"]) / gap
    assert found.scalars["gap/closed"] == pytest.approx(closed if gap > 0 else math.nan, rel=1e-7, nan_ok=True)
    assert len({round(value, 6) for value in loss.values()}) == 5, "each is a loss of its own"


def reference(system: MirasSystem, model: MirasModel) -> dict[str, list[Tensor]]:
    """The five losses of every document beyond the window, and which labels count."""
    long = sorted((ids for row in documents() for ids in row if len(ids) > WINDOW + 1), key=lambda ids: -len(ids))
    # What every memory has at the borders of each document, as it goes through it.
    states: list[dict[tuple[int, int], MemoryCarry]] = []
    for ids in long:
        seen: dict[tuple[int, int], MemoryCarry] = {}

        def kept(layer: int, window: int, carry: MemoryCarry, seen: Any = seen) -> MemoryCarry:
            seen[layer, window] = carry
            return carry

        last = len(ids) // WINDOW
        # The border at its very end too, where there is one.
        plain(system, model, torch.cat([ids, ids[:1]]) if len(ids) % WINDOW == 0 else ids, kept)
        assert (1, last) in seen
        states.append(seen)

    found: dict[str, list[Tensor]] = {name: [] for name in ("window", "full", "memory", "emptied", "swapped", "labels")}
    whole = dataclasses.replace(system.sizes.attention, kind="full")
    groups: Sequence[Sequence[int]] = [(0, 1), (2, 3)]
    for group in groups:
        for place, index in enumerate(group):
            other = states[group[place - 1]]
            reach = max(window for _, window in other)

            def swapped(
                layer: int, window: int, carry: MemoryCarry, other: Any = other, reach: int = reach
            ) -> MemoryCarry:
                # A document that has ended gives what it had at its last border.
                given = other[layer, min(window, reach)]
                return carry._replace(memory=given.memory, momentum=given.momentum)

            ids = long[index]
            found["window"].append(plain(system, model, ids, None, memory=False))
            found["full"].append(plain(system, model, ids, None, memory=False, attention=whole))
            found["memory"].append(plain(system, model, ids, None))
            found["emptied"].append(plain(system, model, ids, emptied))
            found["swapped"].append(plain(system, model, ids, swapped))
            counted = torch.arange(len(ids)) >= WINDOW
            counted[-1] = False
            found["labels"].append(counted)
    return found


@pytest.mark.parametrize(("attachment", "state"), [("slots", Slots._fields), ("overflow", ("memory", "momentum"))])
@torch.no_grad()
def test_what_has_left_the_window_is_another_documents(
    attachment: str, state: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document by itself, a window at a time, on the whole state that the other has at each border."""
    config = configured(attachment, "titans")
    assert isinstance(config.model, MirasConfig)
    memory = dataclasses.replace(config.model.memory, slots=SlotsConfig(count=8, chunk=5, reach=14, importance=True))
    system, model = built(replace(config, model=dataclasses.replace(config.model, memory=memory)))
    monkeypatch.setattr(system, "held_out", lambda phase, topology: Streams())
    found = system.gap_closed(model, Phase("train", 1, ()), SyncPoint(Topology())).scalars
    long = sorted((ids for row in documents() for ids in row if len(ids) > WINDOW + 1), key=lambda ids: -len(ids))

    def in_windows(ids: Tensor, given: Sequence[Carry] | None = None) -> tuple[Tensor, list[Carry]]:
        carry: Carry = {}
        losses, left = [], []
        for border, start in enumerate(range(0, len(ids), WINDOW)):
            if border and given is not None:
                other = given[min(border, len(given)) - 1]
                assert other.keys() < carry.keys()
                carry = {**carry, **other}
            whole = batch(ids, [len(ids)])
            output = run(system, model, cut(whole, start, min(start + WINDOW, len(ids))), carry)
            carry = output.carry
            losses.append(output.tokens["losses"][0])
            left.append({f"{i}.memory.{name}": carry[f"{i}.memory.{name}"] for i in model.kinds for name in state})
        # A piece of a window alone ends at a border.
        return torch.cat(losses), left[: len(ids) // WINDOW]

    own, swapped = [], []
    for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        counted = slice(WINDOW, len(long[one]) - 1)
        own.append(in_windows(long[one])[0][counted])
        swapped.append(in_windows(long[one], in_windows(long[other])[1])[0][counted])
    assert found["gap/loss_memory"] == pytest.approx(float(torch.cat(own).mean()), rel=1e-9)
    assert found["gap/loss_swapped"] == pytest.approx(float(torch.cat(swapped).mean()), rel=1e-9)
    assert abs(found["gap/swap_cost"]) > 1e-4 and abs(found["gap/worth"]) > 1e-4


def test_full_attention_is_full_as_far_as_the_backbone_was_trained() -> None:
    """And goes across steps; beyond, it is a window of as many tokens."""
    system, model = built(replace(configured("residual", "titans"), evaluation__full_length=30))
    modes, ids = gap_modes(system), documents()[0][0]
    assert modes.full is not None
    whole, carry, losses = batch(ids, [len(ids)]), {}, []
    with torch.no_grad():
        for start in range(0, len(ids), STEP):
            output = run(system, model, cut(whole, start, start + STEP), carry, **modes.full(len(ids)))  # type: ignore[arg-type]
            carry = output.carry
            losses.append(output.tokens["losses"][0])
        full = dataclasses.replace(system.sizes.attention, kind="full")
        expected = plain(system, model, ids, None, memory=False, attention=full)
    found = torch.cat(losses)
    torch.testing.assert_close(found[:30], expected[:30], rtol=1e-9, atol=1e-9)
    assert (found[30:-1] - expected[30:-1]).abs().min() > 1e-9
    assert modes.full(12)["attention"].window == 12, "no larger than the documents are"


def test_a_window_of_equal_state_has_room_for_all_that_memories_hold() -> None:
    """Slots and the chunk that goes into them; and M and S of 32 x 32 in each of 4 heads on 2 of 4 layers, where a
    token has 2 x 128 numbers a layer: 16 tokens."""
    recipe = miras_smollm2()
    assert isinstance(recipe.model, MirasConfig)
    backbone = dataclasses.replace(recipe.model.backbone, pretrained=None)
    slots = create(replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone)))
    assert state_tokens(slots) == 512 + 64
    equal = gap_modes(slots).equal
    assert equal is not None and equal["attention"].window == 256 + 512 + 64
    assert state_tokens(create(miras_tiny())) == 16


def test_slots_alone_are_emptied_by_leaving_them_out() -> None:
    slots, overflow = MemoryConfig(attachment="slots"), MemoryConfig(attachment="overflow")
    assert emptied_options([slots, slots]) == WITHOUT
    assert emptied_options([slots, overflow]) == emptied_options([overflow]) == EMPTIED


def test_pieces_of_a_document_are_told_apart_in_every_step() -> None:
    ids, positions = torch.tensor([[3, 3, 3, 4, 4]]), torch.tensor([[8, 9, 10, 0, 1]])
    found, places = split_at_windows(ids, positions, 5)
    assert places.tolist() == [[3, 4, 0, 0, 1]]
    assert len(set(found[0].tolist())) == 3 and found[0, 0] == found[0, 1] and found[0, 3] == found[0, 4]
    later, _ = split_at_windows(torch.tensor([[3]]), torch.tensor([[11]]), 5)
    assert later[0, 0] == found[0, 2]


def test_full_attention_empties_the_memory_at_the_start_of_a_step() -> None:
    config = configured("residual", "titans")
    assert isinstance(config.model, MirasConfig)
    attention = dataclasses.replace(config.model.attention, kind="full")
    system, model = built(replace(config, model=dataclasses.replace(config.model, attention=attention)))
    whole = batch(documents()[0][0][:40], [40])
    with torch.no_grad():
        first = run(system, model, cut(whole, 0, 20), emptied=True)
        later = run(system, model, cut(whole, 20, 40), first.carry, emptied=True).tokens["losses"]
        alone = run(system, model, cut(whole, 20, 40)).tokens["losses"]
    assert torch.equal(later, alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": {"layers": ()}}, "this model has no memory: give --model.memory.layers"),
        ({"attention": {"kind": "full"}}, "--model.attention.kind full: nothing lies beyond a window"),
        ({"attention": {"window": 9}}, "--parallel.sequence 2 does not divide the --model.attention.window 9"),
        (
            {"memory": {"layers": (1,), "attachment": "slots", "slots": SlotsConfig(chunk=4)}},
            "--model.memory.slots.chunk 4 does not divide the --model.attention.window 10, .*: give a chunk that does",
        ),
    ],
)
def test_what_has_no_gap_is_refused_in_a_line(change: dict[str, dict[str, Any]], message: str) -> None:
    config = configured("residual", "titans")
    sections = {name: dataclasses.replace(getattr(config.model, name), **values) for name, values in change.items()}
    system = MirasSystem(replace(config, model=dataclasses.replace(config.model, **sections), evaluation__gap_every=5))
    with pytest.raises(UserError, match=message):
        check_gap(system, Topology(world=2, sequence=2))
    if "memory" not in change:
        with pytest.raises(UserError, match=message):
            system.check(Topology(world=2, sequence=2))


def test_a_backbone_was_trained_to_see_what_its_config_says_where_it_was_trained_at_all(tmp_path: Path) -> None:
    for recipe in (miras_tiny(), miras_recall()):
        assert full_length(MirasSystem(recipe)) == 0 and gap_modes(MirasSystem(recipe)).full is None
    # Of a hub's name, nothing is known before it is here.
    assert full_length(MirasSystem(pretrained_tiny("nobody/nothing"))) == 0
    folder = save_decoder("olmo2", tmp_path)
    system = MirasSystem(pretrained_tiny(str(folder)))
    trained = system.backbone.max_position_embeddings
    assert full_length(system) == trained > 64
    for given, expected in ((64, 64), (2 * trained, trained)):
        other = MirasSystem(replace(system.config, evaluation__full_length=given))
        assert full_length(other) == expected
    assert gap_modes(MirasSystem(replace(system.config, evaluation__full_length=64))).full is None, "the window"


def pretrained_tiny(name: str) -> RunConfig:
    config = miras_tiny()
    assert isinstance(config.model, MirasConfig)
    backbone = dataclasses.replace(config.model.backbone, pretrained=name)
    memory = dataclasses.replace(config.model.memory, layers=(1,))
    return replace(config, model=dataclasses.replace(config.model, backbone=backbone, memory=memory))


def test_an_empty_overflow_keeps_its_share_of_what_attention_gives() -> None:
    """The share is trained, and can adapt the model with nothing in memory: the control has to have it too."""
    ids = torch.randint(VOCABULARY, (48,), generator=torch.Generator().manual_seed(2))
    system, model = built(attached("overflow"))
    part = batch(ids, [7, 41])
    emptied, off, on = (
        run(system, model, part, **options).tokens["losses"]
        for options in ({"emptied": True}, {"memory": False}, {"memory": True})
    )
    with torch.no_grad():
        for name, parameter in model.memory.named_parameters():
            if name.endswith("beta_proj.bias"):
                parameter.fill_(-1e6)
    never_written = run(system, model, part).tokens["losses"]
    torch.testing.assert_close(emptied, never_written, rtol=1e-12, atol=1e-12)
    beyond = part.positions >= WINDOW + 2
    assert torch.equal(emptied[~beyond], off[~beyond])
    counted = beyond & (part.labels >= 0)
    assert (emptied != off)[counted].all() and (emptied != on)[counted].all()
