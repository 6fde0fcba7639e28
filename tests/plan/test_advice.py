"""What is advised fits, is not on already, and has no part that could be left out."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import RunConfig, replace
from pipeline.host.devices import DEVICES
from pipeline.plan.advice import MOST_ROWS, Way, largest_batch, ways_to_fit
from pipeline.plan.estimate import PlanOptions, make_plan
from pipeline.plan.zero import Counts
from pipeline.recipes.miras import miras_32k, miras_64k, miras_128k, miras_tiny

COUNTS = Counts(parameters=1_553_721_536, trainable=68_804_800, largest=205_520_896)
NAMES = {
    "batch-size": "batch_size",
    "grad-accum": "grad_accum",
    "parallel.sequence": "parallel__sequence",
    "zero": "zero",
    "activation-checkpointing": "activation_checkpointing",
}

configs = st.builds(
    lambda recipe, rows, accum, zero, recompute: replace(
        recipe(), batch_size=rows, grad_accum=accum, zero=zero, activation_checkpointing=recompute
    ),
    st.sampled_from([miras_32k, miras_64k, miras_128k]),
    st.sampled_from([1, 3, 8, 16]),
    st.sampled_from([1, 4]),
    st.sampled_from(["zero0", "zero2", "zero3_offload"]),
    st.booleans(),
)
options = st.builds(
    PlanOptions,
    ranks=st.sampled_from([1, 6, 8]),
    device=st.sampled_from(["L4", "A100 40GB", "L40S", "H100", "H200", "B300"]),
)


def fits(config: RunConfig, given_options: PlanOptions) -> bool:
    return make_plan(config, given_options, COUNTS).fits


@given(configs, options)
@settings(max_examples=40, deadline=None)
def test_the_largest_batch_fits_and_one_row_more_does_not(config: RunConfig, given_options: PlanOptions) -> None:
    rows = largest_batch(config, given_options, COUNTS)
    assert rows == 0 or fits(replace(config, batch_size=rows), given_options)
    assert not fits(replace(config, batch_size=rows + 1), given_options)


@given(configs, options)
@settings(max_examples=40, deadline=None)
def test_every_way_fits_and_says_so_with_flags_that_are_needed(config: RunConfig, given_options: PlanOptions) -> None:
    plan = make_plan(config, given_options, COUNTS)
    if plan.fits:
        return
    for way in ways_to_fit(config, given_options, COUNTS):
        on = dataclasses.replace(given_options, ranks=way.ranks)
        typed = _typed(config, way)
        assert typed == way.config
        assert make_plan(typed, on, COUNTS) == way.plan and way.plan.fits and way.plan.memory < plan.memory
        assert (way.plan.tokens_per_step == plan.tokens_per_step) == (way.note == "the same global batch")
        for flag in ("zero", "activation-checkpointing"):
            if flag in way.flags:
                assert not fits(replace(typed, **{NAMES[flag]: getattr(config, NAMES[flag])}), on)
        if "parallel.sequence" in way.flags:
            accum = config.batch_size * config.grad_accum // typed.batch_size
            assert not fits(replace(typed, parallel__sequence=1, grad_accum=accum), given_options)


def _typed(config: RunConfig, way: Way) -> RunConfig:
    """The config that the advised flags make."""
    values = {
        name: True if not value else int(value) if value.isdigit() else value for name, value in way.flags.items()
    }
    return replace(config, **{NAMES[flag]: value for flag, value in values.items()})


def advised(config: RunConfig, **given_options: object) -> list[str]:
    own = PlanOptions(**given_options)  # type: ignore[arg-type]
    assert not fits(config, own)
    return [way.text for way in ways_to_fit(config, own, COUNTS)]


def test_the_rows_of_a_step_in_smaller_micro_batches_come_first() -> None:
    assert advised(miras_64k(), ranks=4, device="H100") == ["--batch-size 4 --grad-accum 2"]


def test_recomputation_is_advised_where_it_is_off_alone() -> None:
    config = replace(miras_64k(), batch_size=1, activation_checkpointing=False)
    assert "--activation-checkpointing" in advised(config, device="A100 40GB")
    on = replace(miras_128k(), batch_size=1)
    assert not any("checkpointing" in text for text in advised(on, device="L4", ranks=2))


def test_offload_is_advised_where_it_is_off_alone() -> None:
    config = replace(miras_128k(), batch_size=1, grad_accum=4)
    assert advised(config, device="RTX 5090")[0] == "--zero zero3_offload"
    offloaded = advised(replace(config, zero="zero3_offload"), device="L4", ranks=8)
    assert offloaded and not any("zero" in text for text in offloaded)


def test_a_sequence_over_the_ranks_that_there_are_keeps_the_global_batch_by_accumulation() -> None:
    config = replace(miras_128k(), batch_size=1)
    assert advised(config, device="L4", ranks=8) == ["--grad-accum 2 --parallel.sequence 2"]


def test_over_ranks_that_there_are_not_more_of_them_are_named() -> None:
    config = replace(miras_128k(), batch_size=1)
    ways = ways_to_fit(config, PlanOptions(device="L4"), COUNTS)
    assert ways[0].text == "--parallel.sequence 2" and ways[0].ranks == 2


def test_a_degree_that_the_heads_refuse_is_not_advised() -> None:
    """16 heads cannot be shared by 32 ranks."""
    config = replace(miras_128k(), batch_size=1, parallel__sequence=16, zero="zero3_offload")
    assert ways_to_fit(config, PlanOptions(ranks=16, device="L4", reserve=21.5), COUNTS) == []


def test_a_smaller_step_is_named_where_nothing_else_fits_on_as_many_devices() -> None:
    ways = ways_to_fit(miras_64k(), PlanOptions(device="L4"), COUNTS)
    assert (ways[0].text, ways[0].note, ways[0].ranks) == ("--batch-size 1", "a smaller global batch", 1)
    assert all(way.ranks > 1 for way in ways[1:])


def test_the_search_ends_for_a_model_that_fits_at_any_size() -> None:
    tiny = replace(miras_tiny(), sequence_length=2, parallel__sequence=1)
    own = PlanOptions(device=max(DEVICES, key=lambda device: device.memory).name)
    assert largest_batch(tiny, own, make_plan(tiny, own).counts) == MOST_ROWS
