"""The decoder with memory as transformers has it: the trained logits, padding, generation, saving and loading."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, set_seed

from pipeline.config import RunConfig
from pipeline.data.batch import IGNORED
from pipeline.lm.config import AttentionConfig, BackboneConfig
from pipeline.lm.decoder_config import MODEL_TYPES
from pipeline.lm.pretrained import backbone_config
from pipeline.parallel.topology import Topology
from pipeline.systems.miras.causal_lm import MemoryCache, MnemosConfig, MnemosForCausalLM, register
from pipeline.systems.miras.causal_lm_config import ANY_LENGTH, config_of, plain_section, section_of
from pipeline.systems.miras.config import MemoryConfig, MirasConfig
from pipeline.systems.miras.layer_kinds import on_backbone
from pipeline.systems.miras.rule_config import MlpConfig, MonetaConfig
from pipeline.systems.miras.system import MirasSystem
from tests.launch.parity_main import LENGTH, VOCABULARY, attached, base, mixed
from tests.systems.miras.harness import batch, built, run, tokens

CASES = {
    "titans": lambda: attached("residual"),
    "full": lambda: attached("residual", "full", rule="delta"),
    "mal": lambda: attached("mal", rule="moneta"),
    "mag": lambda: attached("mag", rule="swiglu"),
    "mac": lambda: attached("mac", rule="mlp"),
    "mixed": mixed,
}
PADDED = ("titans", "mag", "mixed")
"""An exact rule, one that steps by the chunk, and two attachments inside of attention."""


@pytest.fixture(autouse=True, scope="module")
def _auto_classes() -> None:
    register()


def exported(config: RunConfig, dtype: torch.dtype = torch.float64) -> tuple[MirasSystem, MnemosForCausalLM]:
    system, model = built(config, dtype=dtype)
    found = system.exported(model)
    assert isinstance(found, MnemosForCausalLM)
    return system, found


def tied(config: RunConfig) -> RunConfig:
    assert isinstance(config.model, MirasConfig)
    backbone = dataclasses.replace(config.model.backbone, tied=True)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, backbone=backbone))


def rows(*lengths: int) -> list[Tensor]:
    """Texts of these lengths."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(texts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """ids and mask [rows, columns] of texts, with a token of some meaning as padding."""
    columns = max(map(len, texts))
    ids, mask = torch.full((len(texts), columns), 3), torch.zeros(len(texts), columns, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(columns - len(text), None) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


@pytest.mark.parametrize("case", CASES)
def test_logits_and_loss_are_those_of_training(case: str) -> None:
    """By the losses of the system's own forward pass, and with the cache as without it."""
    system, model = exported(CASES[case]())
    ids = tokens()
    expected = run(system, model.model, batch(ids, [LENGTH])).tokens["losses"][0]
    output = model(ids[None], labels=ids[None])
    losses = F.cross_entropy(output.logits[0, :-1], ids[1:], reduction="none")
    torch.testing.assert_close(losses, expected[:-1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output.loss, expected[:-1].mean(), rtol=1e-9, atol=1e-9)
    assert output.past_key_values is None and output.logits.requires_grad
    with torch.no_grad():
        cached = model(ids[None, :30])
        assert isinstance(cached.past_key_values, MemoryCache)
        torch.testing.assert_close(cached.logits, output.logits[:, :30], rtol=1e-9, atol=1e-9)
        last = model(ids[None, 30:47], past_key_values=cached.past_key_values, logits_to_keep=1).logits
        torch.testing.assert_close(last, output.logits[:, 46:47], rtol=1e-9, atol=1e-9)
        last = model(ids[None, 47:], past_key_values=cached.past_key_values).logits
        torch.testing.assert_close(last, output.logits[:, 47:], rtol=1e-9, atol=1e-9)
    assert cached.past_key_values.get_seq_length() == LENGTH


@pytest.mark.parametrize("use_cache", [False, True], ids=["whole", "cached"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", PADDED)
def test_a_padded_row_gives_what_it_gives_alone(case: str, side: str, use_cache: bool) -> None:
    _, model = exported(CASES[case]())
    texts = rows(31, 12, 31, 23)
    ids, mask = padded(texts, side)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=use_cache)
        more = None
        if use_cache:
            # A second turn, of other lengths: with the mask of all columns, or of the new ones alone.
            added, added_mask = padded([text.flip(0)[: 9 + row] for row, text in enumerate(texts)], side)
            whole_mask = torch.cat([mask, added_mask], dim=1) if side == "left" else added_mask
            more = model(added, attention_mask=whole_mask, past_key_values=output.past_key_values).logits
    for row, text in enumerate(texts):
        alone = model(text[None], use_cache=False).logits[0]
        torch.testing.assert_close(output.logits[row][mask[row].bool()], alone, rtol=1e-9, atol=1e-9)
        if more is not None:
            both = torch.cat([text, text.flip(0)[: 9 + row]])
            alone = model(both[None], use_cache=False).logits[0, len(text) :]
            torch.testing.assert_close(more[row][added_mask[row].bool()], alone, rtol=1e-9, atol=1e-9)


def test_a_gap_in_a_row_and_a_row_without_tokens() -> None:
    _, model = exported(CASES["titans"]())
    ids = tokens()[None, :20].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, 4:9] = 0
    expected = model(ids[:1, mask[0].bool()], use_cache=False).logits[0]
    with torch.no_grad():
        for use_cache in (False, True):
            found = model(ids, attention_mask=mask, use_cache=use_cache)
            torch.testing.assert_close(found.logits[0, mask[0].bool()], expected, rtol=1e-9, atol=1e-9)
        # The last row reads nothing more, and its text goes on later as if nothing had been asked.
        mask = torch.stack([torch.ones(3), torch.zeros(3)]).to(torch.int64)
        between = model(ids[:, :3], attention_mask=mask, past_key_values=found.past_key_values).logits
        assert not between[1].any()
        after = model(ids[:, 3:5], past_key_values=found.past_key_values).logits[1]
    whole = model(torch.cat([ids[1], ids[1, 3:5]])[None], use_cache=False).logits[0, 20:]
    torch.testing.assert_close(after, whole, rtol=1e-9, atol=1e-9)


def test_everything_of_slots_learns() -> None:
    _, model = exported(attached("slots"))
    model.train()
    ids = tokens()[None]
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, model.eval()(ids, labels=ids, use_cache=False).loss, rtol=1e-12, atol=1e-12)
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_padding_changes_no_gradient_and_counts_in_no_loss() -> None:
    _, model = exported(CASES["mac"]())
    texts = rows(24, 15)
    total = sum(model(text[None], labels=text[None], use_cache=False).loss * (len(text) - 1) for text in texts) / 37
    total.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for side in ("left", "right"):
        model.zero_grad()
        ids, mask = padded(texts, side)
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        torch.testing.assert_close(loss, total, rtol=1e-9, atol=1e-9)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-7, atol=1e-9, msg=name)
    labels = ids.masked_fill(torch.arange(24) < 10, IGNORED)
    by_items = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss
    counted = 14 + 5
    own = model(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(by_items * 10, own * counted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", PADDED)
def test_generate_is_the_argmax_of_whole_texts(case: str) -> None:
    """Greedily, of rows that are padded on the left; each as alone, past the end of the window."""
    _, model = exported(CASES[case]())
    texts = rows(17, 5, 17)
    ids, mask = padded(texts, "left")
    found = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, pad_token_id=0)
    for row, text in enumerate(texts):
        for _ in range(14):
            with torch.no_grad():
                text = torch.cat([text, model(text[None], use_cache=False).logits[0, -1:].argmax(-1)])
        assert torch.equal(found[row, 17:], text[-14:])


def test_sampling_and_beams_do_not_depend_on_the_cache() -> None:
    _, model = exported(CASES["mixed"]())
    ids, mask = padded(rows(9, 13), "left")
    for options in (
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 1.3, "num_return_sequences": 2},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
    ):
        found = []
        for use_cache in (True, False):
            set_seed(4)
            options |= {"max_new_tokens": 12, "use_cache": use_cache, "pad_token_id": 0}
            found.append(model.generate(ids, attention_mask=mask, **options))
        assert torch.equal(*found)
    assert len(found[0].unique(dim=0)) > 1


def test_a_text_that_was_read_once_is_gone_on_with_often() -> None:
    _, model = exported(CASES["titans"]())
    book, questions = tokens()[None, :40], [tokens()[None, 3:9], tokens()[None, 20:31]]
    cache = MemoryCache()
    with torch.no_grad():
        model(book, past_key_values=cache)
    decoder = cache.decoder
    for question in questions:
        whole = torch.cat([book, question], dim=1)
        options = {"attention_mask": torch.ones_like(whole), "max_new_tokens": 8, "do_sample": False}
        expected = model.generate(whole, **options)
        found = model.generate(whole, past_key_values=copy.deepcopy(cache), return_dict_in_generate=True, **options)
        assert torch.equal(found.sequences, expected)
        # The last token was not read yet.
        assert found.past_key_values.get_seq_length() == expected.shape[1] - 1
    assert cache.get_seq_length() == 40 and cache.state is not None and cache.state.lengths.tolist() == [40]
    assert cache.decoder is decoder is found.past_key_values.decoder
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 3
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized


@pytest.mark.parametrize("case", ["mac", "tied", "full"])
def test_saved_and_loaded_to_the_bit(case: str, tmp_path: Path) -> None:
    config = tied(base()) if case == "tied" else CASES[case]()
    _, model = exported(config, torch.float32)
    model.save_pretrained(tmp_path)
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(found, MnemosForCausalLM) and found.dtype == torch.float32 and not found.training
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.state_dict().items())
    shared = found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert shared == (case == "tied") and found.config.tie_word_embeddings == shared
    assert found.config.max_position_embeddings == (LENGTH if case == "full" else ANY_LENGTH)
    ids = tokens()[None]
    with torch.no_grad():
        for use_cache in (False, True):
            assert torch.equal(found(ids, use_cache=use_cache).logits, model(ids, use_cache=use_cache).logits)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        expected = copy.deepcopy(model).to(torch.bfloat16)(ids, use_cache=False).logits
        assert expected.dtype == torch.float32 and torch.equal(half(ids, use_cache=False).logits, expected)
        text = half.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
        assert text.shape == (1, LENGTH + 3)


def test_parameters_are_shared_with_the_trained_model() -> None:
    _, model = exported(base())
    system, trained = built(base())
    again = system.exported(trained)
    assert {id(p) for p in again.parameters()} == {id(p) for p in trained.parameters()}
    assert model.config.vocab_size == VOCABULARY and model.config.num_hidden_layers == 3
    assert model.decoder().vocab_size == VOCABULARY


def test_hidden_states_are_those_of_every_block() -> None:
    """By a model cut off behind each layer; the last is what the output embedding takes."""
    _, model = exported(CASES["mixed"]())
    texts = rows(20, 13)
    ids, mask = padded(texts, "left")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
        alone = model(texts[1][None], output_hidden_states=True)
        backbone = model.model.backbone
        assert len(output.hidden_states) == 4 and output.past_key_values is None
        torch.testing.assert_close(output.hidden_states[0], backbone.model.embed_tokens(ids))
        logits = F.linear(output.hidden_states[-1], backbone.lm_head.weight)
        torch.testing.assert_close(logits, output.logits)
        for padded_state, state in zip(output.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(padded_state[1, 7:], state[0], rtol=1e-9, atol=1e-9)
        # The last layer has the memory of what leaves the window: without it, the model ends behind the one with mac.
        backbone.model.layers = backbone.model.layers[:2]
        del model.model.kinds[2]
        shorter = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(shorter, backbone.model.norm(output.hidden_states[2]), rtol=1e-9, atol=1e-9)


def test_a_model_without_weights_has_initial_ones() -> None:
    _, model = exported(CASES["mac"](), torch.float32)
    set_seed(1)
    found = AutoModelForCausalLM.from_config(model.config)
    for name, parameter in found.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 30, name
    ids = tokens()[None]
    with_memory = found(ids, use_cache=False).logits
    assert found.model.memory["1"].core.head_norm.eq(1).all()
    bare = found.model(ids, None, torch.zeros_like(ids), torch.arange(LENGTH)[None], None, Topology(), use_memory=False)
    torch.testing.assert_close(with_memory, found.get_output_embeddings()(bare.hidden))


@settings(max_examples=40, deadline=None)
@given(
    attention=st.builds(
        AttentionConfig, kind=st.sampled_from(["window", "full"]), window=st.integers(1, 9999), sinks=st.integers(0, 9)
    ),
    memory=st.builds(
        MemoryConfig,
        layers=st.lists(st.integers(0, 15), unique=True).map(tuple),
        rule=st.sampled_from(["titans", "moneta", "mlp"]),
        attachment=st.sampled_from(["residual", "mac", "mag", "mal"]),
        step_size=st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)),
        half_life=st.tuples(st.floats(1e-6, 1e9), st.floats(1e-6, 1e9)),
        momentum=st.floats(0.01, 0.4),
        moneta=st.builds(MonetaConfig, p=st.floats(2, 8), smooth=st.sampled_from(["none", "sqrt"])),
        mlp=st.builds(MlpConfig, hidden=st.integers(1, 9), momentum=st.booleans()),
    ),
)
def test_a_section_is_the_same_after_json(attention: AttentionConfig, memory: MemoryConfig) -> None:
    for section, kind in ((attention, AttentionConfig), (memory, MemoryConfig)):
        assert section_of(kind, json.loads(json.dumps(plain_section(section))), "section") == section


def test_the_config_is_the_same_after_json(tmp_path: Path) -> None:
    system, model = exported(CASES["mixed"]())
    model.config.save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(found, MnemosConfig)
    assert found.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    sections = found.sections()
    assert sections.memory == system.sizes.memory and sections.attention == system.sizes.attention
    own, again = system.backbone.to_dict(), found.backbone_config().to_dict()
    assert {key for key in own if own[key] != again.get(key)} <= {"dtype", "_name_or_path"}
    text = (tmp_path / "config.json").read_text()
    assert "/" not in json.dumps([value for value in json.loads(text).values() if isinstance(value, str)])
    for wrong, match in (
        ({"memory": {"unheard": 1}}, "no 'unheard'"),
        ({"backbone": {"model_type": "unheard"}}, "no model type 'unheard'"),
    ):
        with pytest.raises(ValueError, match=match):
            MnemosConfig(**{**json.loads(text), **wrong})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_kind_of_backbone_is_the_same_after_json(model_type: str, tmp_path: Path) -> None:
    section = BackboneConfig(model_type=model_type, layers=3, width=64, heads=4, kv_heads=4, ffn=96, vocabulary=50)
    own = backbone_config(section)
    sizes = on_backbone(MirasConfig(backbone=section, memory=MemoryConfig(layers=("every2",))), own)
    config_of(sizes, own, limit=77).save_pretrained(tmp_path)
    found = AutoConfig.from_pretrained(tmp_path)
    again, files = found.backbone_config(), {"_name_or_path", "architectures", "dtype"}
    assert type(again) is type(own)
    assert {key for key, value in own.to_dict().items() if again.to_dict().get(key) != value} <= files
    assert found.sections().memory.layers == (1,) and found.max_position_embeddings == 77
    assert (found.hidden_size, found.vocab_size, found.num_hidden_layers) == (64, 50, 3)


def test_what_does_not_fit_is_said() -> None:
    _, model = exported(base())
    ids = tokens()[None, :6]
    cache = MemoryCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for arguments, match in (
        ({"inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 1, 6, 6)}, r"attention_mask is \[1, 1, 6, 6\]"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 5)}, r"expected \[1, 6\]"),
        ({"input_ids": ids, "past_key_values": DynamicCache()}, "DynamicCache: give a MemoryCache"),
        ({"input_ids": ids, "labels": ids, "past_key_values": cache}, "labels are of whole texts"),
        ({"input_ids": ids, "output_hidden_states": True, "use_cache": True}, "output_hidden_states are of whole"),
        ({"input_ids": ids, "past_key_values": cache, "use_cache": False}, "leave one out"),
        ({"input_ids": ids.repeat(2, 1), "past_key_values": cache}, "2 rows, and past_key_values 1"),
        ({"input_ids": ids, "output_attentions": True}, "output_attentions"),
    ):
        with pytest.raises(ValueError, match=match):
            model(**arguments)
    with pytest.raises(ValueError, match="of another model"):
        exported(base())[1](ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="vocabulary"):
        model.resize_token_embeddings(70)
    with pytest.raises(NotImplementedError, match="forget"):
        cache.crop(-1)
    assert isinstance(model(ids, return_dict=False), tuple)
