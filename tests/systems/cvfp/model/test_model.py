"""The model by itself: its parts, its calls, and the weights that it begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UserError
from pipeline.parallel.topology import Topology
from pipeline.systems.cvfp.config import CvfpConfig, SolveConfig
from pipeline.systems.cvfp.model.block import relu_of
from pipeline.systems.cvfp.model.model import CvfpModel, parameter_parts
from pipeline.systems.cvfp.model.reader import Reader
from pipeline.systems.cvfp.model.weights import initialise
from pipeline.systems.cvfp.solve.sweeps import solver
from pipeline.systems.cvfp.solve.transition import ends_of, shifted
from tests.systems.cvfp.small import VOCAB, WIDTH, reference, rows, small, starts


def test_the_guides_sizes_have_the_guides_number_of_parameters() -> None:
    with torch.device("meta"):
        model = CvfpModel(CvfpConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 91_429_969
    parts = parameter_parts(CvfpConfig())
    assert sum(parts.values()) == 91_429_969 and parts["blocks"] == 14_183_424 and parts["embedding"] == 38_597_376
    for name, part in (("blocks", "blocks"), ("head", "head"), ("norm_embed", "embedding norm")):
        assert sum(p.numel() for p in getattr(model, name).parameters()) == parts[part]


def test_a_batched_gradient_is_the_sum_of_those_of_single_tokens() -> None:
    model, (ids, _), start = small(), rows([7, 7]), starts(2)
    inputs = shifted(model(ids, start=start).contexts, start)
    target = torch.randn(WIDTH, dtype=torch.float64)

    def loss(row: slice, token: slice) -> torch.Tensor:
        found = model(ids[row, token], inputs[row, token])
        return (found.contexts - target).square().sum() + (found.states * target).square().sum()

    weights = [*model.blocks.parameters()]
    batched = torch.autograd.grad(loss(slice(None), slice(None)), weights)
    summed = [torch.zeros_like(weight) for weight in weights]
    for row in range(2):
        for token in range(7):
            one = torch.autograd.grad(loss(slice(row, row + 1), slice(token, token + 1)), weights)
            summed = [total + part for total, part in zip(summed, one, strict=True)]
    for whole, parts in zip(batched, summed, strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(whole, parts, atol=1e-11, rtol=1e-11)


def test_losses_and_predictions_are_those_of_the_logits() -> None:
    model, (ids, mask), start = small(), rows([6, 4]), starts(2)
    inputs = shifted(model(ids, start=start, mask=mask).contexts, start)
    labels = ids.roll(-1, 1).masked_fill(~mask, -100)
    found = model(ids, inputs, labels=labels, predict=True)
    logits = found.states @ model.head.weight.T + model.head.bias
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(found.losses.double(), expected.view(2, 6), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.predictions, logits.argmax(-1))
    again = model(states=found.states, labels=labels)
    torch.testing.assert_close(again.losses, found.losses)


@pytest.mark.parametrize("mix", [0.25, 0.7])
def test_a_share_of_the_norm(mix: float) -> None:
    """By the definition, by each way of solving, and the diagonal of a block by its Jacobian."""
    model, (ids, mask), start = small(layernorm_mix=mix, decay=0.3), rows([9]), starts(1)
    expected = reference(model, ids[0], start[0])
    torch.testing.assert_close(model(ids, start=start, mask=mask).contexts[0], expected, atol=1e-12, rtol=0)
    for way in (SolveConfig("jacobi", 1e-13), SolveConfig("newton", 1e-13)):
        found = model(ids, start=start, mask=mask, solve=solver(way)).contexts[0]
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    (block,) = small(layers=1, decay=0.7, std=0.02, width=64, layernorm_mix=mix).blocks.in_order()
    context, token = (starts(1, 64, seed)[0] for seed in (6, 5))
    jacobian = torch.func.jacrev(lambda entering: block(entering, token)[0])(context)
    new, other, diagonal = block.with_diagonal(context, token)
    torch.testing.assert_close((new, other), block(context, token))
    alone = block.added_to_context(context, relu_of(context, token, *block.of_context()))
    torch.testing.assert_close(alone, new)
    # What is left out is of the order of a weight, or of 1 / D.
    assert (diagonal - jacobian.diagonal()).norm() < 0.05 * jacobian.diagonal().norm()


def test_contexts_of_a_recurrence_have_no_gradient() -> None:
    model, (ids, mask), start = small(), rows([6]), starts(1)
    assert not model(ids, start=start, mask=mask).contexts.requires_grad
    assert model(ids, start[:, None].expand(1, 6, WIDTH)).contexts.requires_grad


def test_a_reader_may_be_exact_whatever_the_run_has_chosen() -> None:
    model, (ids, mask) = small(solve=SolveConfig("jacobi", tolerance=1e-3, most=2)), rows([9, 5])
    rough, exact, start = Reader(model, WIDTH), Reader(model, WIDTH, exact=True), torch.zeros(2, WIDTH)
    assert rough.solved(ids, mask, start).sweeps == 2 and exact.solved(ids, mask, start).sweeps == 1
    contexts = exact.contexts(ids, mask)
    assert not torch.allclose(rough.contexts(ids, mask)[mask], contexts[mask])
    once_more = exact.applied(shifted(contexts, torch.zeros(2, WIDTH)), ids)
    torch.testing.assert_close(once_more[mask], contexts[mask], atol=1e-6, rtol=0)
    near = rough.solved(ids, mask, start, initial=contexts)
    assert near.sweeps == 1
    end = ends_of(contexts, torch.tensor([9, 0]), torch.ones(2, WIDTH))
    assert torch.equal(end[0], contexts[0, 8]) and torch.equal(end[1], torch.ones(WIDTH))


def test_initial_weights_are_those_of_seed_and_names() -> None:
    sizes = CvfpConfig(width=64, layers=2, vocab=VOCAB)
    one, same, other, published = (CvfpModel(sizes) for _ in range(4))
    for model, seed in ((one, 1), (same, 1), (other, 2)):
        initialise(model, sizes, seed, Topology())
    initialise(published, CvfpConfig(width=64, layers=2, vocab=VOCAB, as_published=True), 1, Topology())
    for name, weight in one.named_parameters():
        assert torch.equal(weight, same.get_parameter(name))
        if "norm" not in name:
            assert not torch.equal(weight, other.get_parameter(name))
    for model, std in ((one, 0.02), (published, 0.1)):
        for block in model.blocks.in_order():
            assert abs(block.linear.weight.std().item() - std) < 0.05 * std
    assert not torch.equal(*(block.linear.weight for block in one.blocks.in_order()))


def test_as_published_a_context_does_not_decay() -> None:
    sizes = CvfpConfig(width=8, layers=2, vocab=5, as_published=True)
    assert [block.decay for block in CvfpModel(sizes).blocks.in_order()] == [1.0, 1.0]


def embedded_by(folder: Path) -> CvfpModel:
    sizes = CvfpConfig(width=WIDTH, layers=1, vocab=VOCAB, embedding=str(folder))
    model = CvfpModel(sizes)
    initialise(model, sizes, 0, Topology())
    return model


def test_a_given_embedding_is_read_and_nothing_else_changes(tmp_path: Path) -> None:
    table = torch.randn(VOCAB, WIDTH)
    save_file(
        {"transformer.wte.weight": table, "transformer.wpe.weight": torch.ones(9, WIDTH)},
        tmp_path / "model.safetensors",
    )
    model = embedded_by(tmp_path)
    assert torch.equal(model.embedding.weight, table)
    plain = CvfpConfig(width=WIDTH, layers=1, vocab=VOCAB)
    random = CvfpModel(plain)
    initialise(random, plain, 0, Topology())
    assert torch.equal(model.head.weight, random.head.weight)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"transformer.wte.weight": (VOCAB, WIDTH + 1)}, "the model wants"),
        ({"lm_head.weight": (VOCAB, WIDTH)}, "no input embedding"),
        (None, "model.safetensors"),
    ],
)
def test_an_embedding_that_does_not_fit_is_one_line(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]] | None, says: str
) -> None:
    if tensors is not None:
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=says) as raised:
        embedded_by(tmp_path)
    assert "\n" not in str(raised.value) and "--model.embedding" in str(raised.value)


def test_an_embedding_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder of a model"):
        embedded_by(tmp_path / "missing")


def test_statistics_stay_float32() -> None:
    model = small().to(torch.bfloat16)
    assert {buffer.dtype for buffer in model.statistics.buffers()} == {torch.float32}
