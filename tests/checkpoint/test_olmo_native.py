"""Native folders of OLMo to checkpoints and back, bit for bit; and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import PreTrainedConfig

from pipeline.checkpoint.manifest import problems, read_manifest
from pipeline.checkpoint.restore import read_progress
from pipeline.commands.checkpoint import run_checkpoint
from pipeline.data.tokenizer import load_tokenizer
from pipeline.errors import UserError
from pipeline.lm import load
from pipeline.lm.olmo_config import model_section
from pipeline.lm.olmo_layout import fused
from tests.checkpoint.small_runs import a_run, save
from tests.checkpoint.token_runs import tokenised, trained_on
from tests.data.conftest import bpe_folder  # noqa: F401
from tests.lm.olmo_reference import small_config, small_decoder

STEP, ROWS, LENGTH = 7, 6, 16
KINDS = [("first", True), ("first", False), ("second", True), ("second", False)]


def native(folder: Path, kind: str = "first", *, tied: bool = True, vocabulary: int = 260, **changes: Any) -> Path:
    """A folder as OLMo writes it after STEP updates of a small decoder with random moments."""
    config = small_config(kind, tied=tied, vocab_size=vocabulary)
    weights = weights_of(config)
    generator = torch.Generator().manual_seed(3)
    decayed = sorted(name for name in weights if weights[name].dim() == 2 and "wte" not in name)
    others = sorted(name for name in weights if name not in decayed)
    numbers = {name: number for number, name in enumerate([*decayed, *others])}
    shared = {"lr": 1e-4, "initial_lr": 4e-4, "betas": (0.9, 0.95), "eps": 1e-5, "amsgrad": False, "maximize": False,
              "foreach": None, "capturable": False, "differentiable": False, "fused": None, "sharded": False,
              "max_grad_norm": 1.0, "max_grad_norm_ratio": None}  # fmt: skip
    optimizer = {
        "state": {
            number: {
                "step": torch.tensor(float(STEP)),
                "exp_avg": torch.randn(weights[name].shape, generator=generator),
                "exp_avg_sq": torch.rand(weights[name].shape, generator=generator),
            }
            for name, number in numbers.items()
        },
        "param_groups": [
            {**shared, "weight_decay": decay, "param_names": names, "params": [numbers[name] for name in names]}
            for decay, names in ((0.1, decayed), (0.0, others))
        ],
    }
    trainer = {"epoch": 0, "global_step": STEP, "global_train_examples_seen_this_epoch": STEP * ROWS,
               "global_train_tokens_seen": STEP * ROWS * LENGTH, "world_size": 1}  # fmt: skip
    content = {
        "model": {**model_section(config, vocabulary=vocabulary, eos=256, length=LENGTH), "init_fn": "mitchell"},
        "optimizer": {"name": "adamw", "learning_rate": 4e-4, "weight_decay": 0.1},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": 2},
        "tokenizer": {"identifier": "bytes"},
        "max_duration": 20, "global_train_batch_size": ROWS, "device_train_microbatch_size": 2, "precision": "fp32",
        "max_grad_norm": 1.0, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True)
    for name, part in (("model", weights), ("optim", optimizer), ("train", trainer)):
        torch.save(part, folder / f"{name}.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder


def weights_of(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    return fused(small_decoder(config).state_dict(), config)


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, key and type."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def convert(*words: object) -> None:
    run_checkpoint(["convert", *map(str, words)])


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_a_native_folder_comes_back_bit_for_bit(
    kind: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = native(tmp_path / "native", kind, tied=tied)
    convert(folder, tmp_path / "here", "--from", "olmo")
    convert(tmp_path / "here", tmp_path / "again", "--to", "olmo")
    again = tmp_path / "again" / f"step{STEP}-unsharded"
    assert sorted(path.name for path in again.iterdir()) == ["config.yaml", "model.pt", "optim.pt", "train.pt"]
    for name in ("model.pt", "optim.pt"):
        one, other = (torch.load(place / name, weights_only=True) for place in (folder, again))
        assert same(one, other), name
    one, other = (torch.load(place / "train.pt", weights_only=True) for place in (folder, again))
    assert {key: other[key] for key in one if key != "world_size"} == {
        key: value for key, value in one.items() if key != "world_size"
    }
    one, other = (yaml.safe_load((place / "config.yaml").read_text()) for place in (folder, again))
    assert one["model"] == {key: other["model"][key] for key in one["model"]}
    for key in ("max_duration", "global_train_batch_size", "device_train_microbatch_size", "precision", "tokenizer"):
        assert other[key] == one[key] or key == "tokenizer", key
    assert other["tokenizer"]["identifier"] == "bytes" and other["scheduler"]["t_warmup"] == 2
    assert not list(tmp_path.rglob("*-tmp")) and not list(tmp_path.rglob(".*"))
    assert f"--resume {tmp_path / 'here'}" in capsys.readouterr().out


def test_the_checkpoint_is_whole_and_at_its_step(tmp_path: Path) -> None:
    convert(native(tmp_path / "native"), tmp_path / "here", "--from", "olmo")
    assert problems(tmp_path / "here", hashes=True) == []
    manifest, progress = read_manifest(tmp_path / "here"), read_progress(tmp_path / "here")
    assert manifest is not None
    assert (manifest["format"], manifest["step"], manifest["global_batch"]) == ("universal", STEP, ROWS)
    assert (progress.step, progress.phase) == (STEP, "train")
    assert progress.tokens == STEP * ROWS * (LENGTH - 1), "a window of T tokens has T - 1 labels"


def test_where_the_training_of_a_folder_began_is_nothing_to_it(tmp_path: Path) -> None:
    folder = native(tmp_path / "native", load_path="s3://a/step9-unsharded", dry_run=True)
    convert(folder, tmp_path / "here", "--from", "olmo")
    assert not yaml.safe_load((tmp_path / "here" / "config.yaml").read_text())["dry_run"]


def test_without_an_optimizer_the_moments_are_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = native(tmp_path / "native")
    (folder / "optim.pt").unlink()
    (folder / "train.pt").unlink()
    convert(folder, tmp_path / "here", "--from", "olmo")
    out = capsys.readouterr().out
    assert "no optim.pt: its moments are zero" in out and "no step in train.pt: it is at step 0" in out
    convert(tmp_path / "here", tmp_path / "again", "--to", "olmo")
    again = tmp_path / "again" / "step0-unsharded"
    assert torch.load(again / "optim.pt", weights_only=True)["state"] == {}


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_load_gives_the_same_logits_of_every_folder(kind: str, tied: bool, tmp_path: Path) -> None:
    config = small_config(kind, tied=tied, vocab_size=260)
    folder = native(tmp_path / "native", kind, tied=tied)
    convert(folder, tmp_path / "here", "--from", "olmo")
    small_decoder(config).save_pretrained(tmp_path / "hf")
    model, tokenizer = load(folder)
    ids = torch.from_numpy(tokenizer.encode("Language modeling is")).unsqueeze(0)
    assert tokenizer.decode(ids[0]) == "Language modeling is"
    with torch.no_grad():
        wanted = small_decoder(config)(ids).logits
        assert not model.training and model.dtype == torch.float32
        for loaded in (model, load(tmp_path / "here").model, load(tmp_path / "hf", tokenizer="bytes").model):
            torch.testing.assert_close(loaded(ids).logits, wanted, rtol=0, atol=1e-5)
    assert load(tmp_path / "here", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_what_load_cannot_take_is_refused(tmp_path: Path, make_run: Any) -> None:
    small_decoder(small_config("first", tied=True)).save_pretrained(tmp_path / "hf")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    save(make_run(), 1)  # of miras_tiny
    for folder, words in {
        "nowhere": "no such folder", "empty": "holds no complete checkpoint", "hf": "has no vocabulary",
        "damaged": "no model can be loaded", "checkpoints/checkpoint-1": "of the weights that were trained",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as error:
            load(tmp_path / folder)
        assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("remove", "words"),
    [("model.pt", "holds no model.pt"), ("config.yaml", "holds no config.yaml"), (None, "no such folder")],
)
def test_a_folder_that_is_no_checkpoint_is_refused(remove: str | None, words: str, tmp_path: Path) -> None:
    if remove is not None:
        (native(tmp_path / "native") / remove).unlink()
    with pytest.raises(UserError, match=r"native: .*give (a folder|one) as OLMo writes it") as error:
        convert(tmp_path / "native", tmp_path / "here", "--from", "olmo")
    assert words in str(error.value) and not (tmp_path / "here").exists()


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, make_run: Any) -> None:
    save(make_run(), 1)
    with pytest.raises(UserError, match="a checkpoint of miras_tiny, which is more than a decoder"):
        convert(tmp_path, tmp_path / "native", "--to", "olmo")
    model = model_section(small_config("first", tied=True), vocabulary=260, eos=256, length=LENGTH)
    other = native(tmp_path / "other", model={**model, "embedding_size": 260, "d_model": 64})
    with pytest.raises(UserError, match=r"model\.pt: .* in the model of its config\.yaml"):
        convert(other, tmp_path / "here", "--from", "olmo")
    assert not (tmp_path / "here").exists() and not (tmp_path / "native").exists()


def test_targets_that_exist_and_formats_that_do_not_are_refused(tmp_path: Path) -> None:
    folder = native(tmp_path / "native")
    convert(folder, tmp_path / "here", "--from", "olmo")
    with pytest.raises(UserError, match="here: exists already"):
        convert(folder, tmp_path / "here", "--from", "olmo")
    (tmp_path / "again" / f"step{STEP}-unsharded").mkdir(parents=True)
    with pytest.raises(UserError, match="step7-unsharded: exists already"):
        convert(tmp_path / "here", tmp_path / "again", "--to", "olmo")
    for words, message in {
        ("--to", "gguf"): "--to gguf: give olmo or universal",
        ("--from", "universal"): "--from universal: give olmo",
        ("--from", "olmo", "--to", "olmo"): "both given",
        ("--form", "olmo"): "has no --form",
        ("--to",): "--to needs a value",
    }.items():
        with pytest.raises(UserError, match=message):
            convert(tmp_path / "here", tmp_path / "new", *words)


def test_a_count_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = native(tmp_path / "native")
    torch.save({"global_step": "seven"}, folder / "train.pt")
    with pytest.raises(UserError, match=r"train\.pt: global_step is 'seven'"):
        convert(folder, tmp_path / "here", "--from", "olmo")


def test_the_random_states_go_along_where_olmo_would_take_them(tmp_path: Path) -> None:
    import numpy as np

    from pipeline.checkpoint.olmo_native import _trainer_content
    from pipeline.checkpoint.rng import rng_state

    run = a_run(tmp_path).config
    state = rng_state()
    manifest = {"step": 3, "global_batch": 2, "world": 1}
    torch.save(state, tmp_path / "rng-00000.pt")
    assert "rng" not in _trainer_content(tmp_path, manifest, run), "of a CPU there is none of CUDA's"
    torch.save({**state, "cuda": state["torch"]}, tmp_path / "rng-00000.pt")
    found = _trainer_content(tmp_path, manifest, run)["rng"]
    np.random.set_state(found["numpy"])
    assert found["python"] == state["python"] and torch.equal(found["cuda"], state["torch"])


TEXTS = [f"def function_{i}(path):\n    return {'x + ' * (i % 5)}1\n" for i in range(60)]


def on_tokens(folder: Path, tokens: list[str], **data: Any) -> Path:
    """A checkpoint of STEP steps on token files, of a model with 640 ids."""
    run_checkpoint(["convert", str(native(folder / "native", vocabulary=640)), str(folder / "here"), "--from", "olmo"])
    return trained_on(folder / "here", tokens, steps=STEP, vocab_size=640, **data)


def test_the_tokenizer_that_made_the_token_files_goes_along(tmp_path: Path, bpe_folder: Path) -> None:  # noqa: F811
    """Not the default of --data.tokenizer, which a run on token files has no use for."""
    made_by = load_tokenizer(str(bpe_folder))
    one, other = (tokenised(tmp_path / f"{name}.npy", TEXTS, str(bpe_folder)) for name in ("one", "other"))
    here = on_tokens(tmp_path, [f"{one}=0.75", f"{other}=0.25"])
    convert(here, tmp_path / "present", "--to", "olmo")
    # What the checkpoint knows is not lost with its files.
    for file in tmp_path.glob("*.npy*"):
        file.unlink()
    tokenizer = load(here).tokenizer
    assert tokenizer.fingerprint == made_by.fingerprint and tokenizer.decode(made_by.encode(TEXTS[3])) == TEXTS[3]
    convert(here, tmp_path / "again", "--to", "olmo")
    again = tmp_path / "again" / f"step{STEP}-unsharded"
    content = yaml.safe_load((again / "config.yaml").read_text())
    assert content["tokenizer"]["identifier"] == str(bpe_folder) and content["data"]["paths"] == [one, other]
    sizes = {key: content["model"][key] for key in ("vocab_size", "embedding_size", "eos_token_id", "pad_token_id")}
    assert sizes == {
        "vocab_size": made_by.vocab_size, "embedding_size": 640, "eos_token_id": made_by.eos_id,
        "pad_token_id": made_by.eos_id,
    }  # fmt: skip
    assert content["data"]["memmap_dtype"] == "uint16", "which the sidecar has said"
    present = yaml.safe_load((tmp_path / "present" / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert present == content
    assert load(again).tokenizer.fingerprint == made_by.fingerprint


def test_a_folder_of_token_files_goes_along_as_its_files(tmp_path: Path) -> None:
    """OLMo takes files alone, and uint16 where nothing is said."""
    (tmp_path / "tokens").mkdir()
    files = [str(tmp_path / "tokens" / f"{name}.npy") for name in "ab"]
    for file in files:
        np.arange(500, dtype="<u4").tofile(file)
    here = on_tokens(tmp_path, [str(tmp_path / "tokens")], token_dtype="uint32", eos_id=7, tokenizer="allenai/not@here")
    trained_on(here, [f"{tmp_path}/tok*/*.npy"], steps=STEP, vocab_size=70_000, eos_id=7, tokenizer="allenai/not@here")
    convert(here, tmp_path / "again", "--to", "olmo")
    content = yaml.safe_load((tmp_path / "again" / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert content["data"] == {"paths": files, "memmap_dtype": "uint32", "generate_doc_lengths": False}


def test_files_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    """Whether they are one source or two: OLMo would read them all as uint16."""
    narrow, wide = (str(tmp_path / f"{name}.npy") for name in ("narrow", "wide"))
    for name, dtype in ((narrow, "uint16"), (wide, "uint32")):
        tokenised(Path(name), TEXTS, "bytes", dtype=dtype)
        np.fromfile(name, "<u2").astype(dtype).tofile(name)
    here = on_tokens(tmp_path, [narrow, wide])
    for tokens in ([narrow, wide], [f"{narrow}=0.5", f"{wide}=0.5"]):
        trained_on(here, tokens, steps=STEP, vocab_size=640)
        with pytest.raises(UserError, match="hold uint16 and uint32, and OLMo reads files of one dtype alone: write"):
            convert(here, tmp_path / "again", "--to", "olmo")
    assert not (tmp_path / "again").exists()
    trained_on(here, [wide], steps=STEP, vocab_size=640)
    convert(here, tmp_path / "again", "--to", "olmo")
    content = yaml.safe_load((tmp_path / "again" / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert content["data"]["memmap_dtype"] == "uint32"


def test_the_data_of_a_native_folder_come_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = tokenised(tmp_path / "a.npy", TEXTS, "bytes")
    data = {"paths": [ids, "https://host/b.npy?part=3"], "memmap_dtype": "uint16", "generate_doc_lengths": True}
    convert(native(tmp_path / "native", data=data), tmp_path / "here", "--from", "olmo")
    convert(tmp_path / "here", tmp_path / "again", "--to", "olmo")
    again = yaml.safe_load((tmp_path / "again" / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert again["data"] == data and again["model"]["eos_token_id"] == 256
    assert "no effect" not in capsys.readouterr().err


def test_bytes_are_not_taken_for_what_made_files_of_a_larger_vocabulary(
    tmp_path: Path,
    bpe_folder: Path,  # noqa: F811
) -> None:
    file = tokenised(tmp_path / "a.npy", TEXTS, str(bpe_folder), sidecar=False)
    here, out = on_tokens(tmp_path, [file]), tmp_path / "again"
    what = "nothing says which tokenizer made the token files: .* .bytes., of 260 ids, and the model has 640: "
    with pytest.raises(UserError, match=what + r"give load\(\.\.\., tokenizer=NAME\)$"):
        load(here)
    with pytest.raises(UserError, match=what + "give --tokenizer NAME$"):
        convert(here, out, "--to", "olmo")
    assert not out.exists() and load(here, tokenizer=str(bpe_folder)).tokenizer.vocab_size > 260
    with pytest.raises(UserError, match="--tokenizer goes with --to olmo alone"):
        convert(here, out, "--tokenizer", "bytes")
    convert(here, out, "--to", "olmo", "--tokenizer", bpe_folder)
    content = yaml.safe_load((out / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert content["tokenizer"]["identifier"] == str(bpe_folder)


def test_a_given_tokenizer_decides_between_several_and_not_against_one(
    tmp_path: Path,
    bpe_folder: Path,  # noqa: F811
) -> None:
    one = tokenised(tmp_path / "a.npy", TEXTS, str(bpe_folder))
    other = tokenised(tmp_path / "b.npy", TEXTS, str(bpe_folder), sidecar=False)
    here, out = on_tokens(tmp_path, [one, other]), tmp_path / "again"
    with pytest.raises(UserError, match=r"several tokenizers .*: give --tokenizer NAME$"):
        convert(here, out, "--to", "olmo")
    convert(here, out, "--to", "olmo", "--tokenizer", bpe_folder)
    content = yaml.safe_load((out / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert content["tokenizer"]["identifier"] == str(bpe_folder)
    trained_on(here, [one], steps=STEP, vocab_size=640)
    for name, what in (("bytes", "and bytes is another one"), ("./nowhere", "nowhere does not exist")):
        with pytest.raises(UserError, match=what):
            convert(here, tmp_path / "none", "--to", "olmo", "--tokenizer", name)
    assert not (tmp_path / "none").exists()


def test_a_conversion_needs_no_network_where_the_end_of_documents_is_given(tmp_path: Path) -> None:
    here = on_tokens(
        tmp_path, [tokenised(tmp_path / "a.npy", TEXTS, "bytes", sidecar=False)], eos_id=7, tokenizer="allenai/not@here"
    )
    convert(here, tmp_path / "again", "--to", "olmo")
    content = yaml.safe_load((tmp_path / "again" / f"step{STEP}-unsharded" / "config.yaml").read_text())
    assert content["tokenizer"]["identifier"] == "allenai/not@here"
    assert (content["model"]["vocab_size"], content["model"]["eos_token_id"]) == (640, 7)


def test_the_epoch_of_a_run_goes_along(tmp_path: Path) -> None:
    """OLMo reads on at the example of the epoch: beyond the end of its data there is none."""
    here = on_tokens(tmp_path, [tokenised(tmp_path / "a.npy", TEXTS[:9], "bytes")], holdout=0.2)
    convert(here, tmp_path / "again", "--to", "olmo")
    trainer = torch.load(tmp_path / "again" / f"step{STEP}-unsharded" / "train.pt", weights_only=True)
    windows = sum(len(text) + 1 for text in TEXTS[:9]) // LENGTH
    windows -= int(0.2 * windows)
    epoch, examples = divmod(STEP * ROWS, windows)
    assert epoch > 0 and (trainer["epoch"], trainer["global_train_examples_seen_this_epoch"]) == (epoch, examples)


def test_a_native_folder_is_loaded_for_its_model_whatever_its_training_was(tmp_path: Path) -> None:
    model = model_section(small_config("second", tied=True, vocab_size=260), vocabulary=260, eos=256, length=LENGTH)
    folder = native(
        tmp_path / "native", "second",
        model={**model, "residual_dropout": 0.1, "attention_dropout": 0.1, "init_fn": "fan_in", "init_std": "x"},
        optimizer={"name": "lionw", "learning_rate": 0}, scheduler={"name": "max_scheduler"}, precision="fp64",
        activation_checkpointing="one_in_two", max_duration="2ep", global_train_batch_size=0, stop_at=0,
        data={"paths": "${oc.env:X}"}, compile=True, seed=-1, evaluators=[{"label": "${nothing}"}],
    )  # fmt: skip
    loaded = load(folder)
    assert loaded.tokenizer.name == "bytes"
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        wanted = small_decoder(small_config("second", tied=True, vocab_size=260))(ids).logits
        torch.testing.assert_close(loaded.model(ids).logits, wanted, rtol=0, atol=1e-5)
    dropout = native(tmp_path / "dropout", model={**model, "residual_dropout": 0.1})
    with pytest.raises(UserError, match="model: residual_dropout is"):
        convert(dropout, tmp_path / "here", "--from", "olmo")
    with pytest.raises(UserError, match="model: alibi is True"):
        load(native(tmp_path / "other", model={**model, "alibi": True}))
