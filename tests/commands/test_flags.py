"""Flags of other trainers' command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.commands.flags import parse_run, with_listed_paths
from pipeline.errors import UserError


@pytest.mark.parametrize(
    "value, names",
    [("[a.npy]", ["a.npy"]), ("['a b.npy', \"c.npy\"]", ["a b.npy", "c.npy"]), (" [ x , y ] ", ["x", "y"])],
)
@pytest.mark.parametrize("joined", [True, False])
def test_a_list_of_paths_is_that_of_token_files(value: str, names: list[str], joined: bool) -> None:
    words = [f"--data.paths={value}"] if joined else ["--data.paths", value]
    assert with_listed_paths(["olmo_1b", *words, "--steps", "3"]) == [
        "olmo_1b",
        "--steps",
        "3",
        "--data.tokens",
        *names,
    ]
    assert parse_run(["olmo_1b", *words], "train", ranks=1).data.tokens == tuple(names)


@pytest.mark.parametrize("value", ["a.npy", "[a.npy", "[]", "[a,,b]"])
def test_a_path_that_is_no_list_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"give a list, --data.paths='\[FILE, ...\]', or --data.tokens FILE"):
        with_listed_paths([f"--data.paths={value}"])


def test_a_preset_of_a_system_is_its_recipe() -> None:
    words = ["--run-name", "small_test", "-v", "--epochs", "3", "--dim", "64", "--no-balanced"]
    config = parse_run(["mimir", "--preset", "small", *words], "train", ranks=1)
    assert config == parse_run(["mimir_small", *words], "train", ranks=1)
    assert (config.recipe, config.output_dir.as_posix()) == ("mimir_small", "outputs/small_test")
    assert config.report.verbose and config.epochs.train == 3
    assert parse_run(["miras", "--preset=tiny"], "train", ranks=1).recipe == "miras_tiny"


@pytest.mark.parametrize("recipe", ["miras", "miras_smollm2", "miras_64k"])
def test_another_backbone_comes_with_its_tokenizer(recipe: str) -> None:
    """Where the recipe has that of its own backbone, and no other is given."""
    named = parse_run([recipe, "--model.backbone.pretrained", "my/model", "--model.memory.layers", "upper4"], "train")
    assert named.data.tokenizer == "my/model"
    own = parse_run([recipe], "train").data.tokenizer
    given = parse_run([recipe, "--model.backbone.pretrained", "my/model", "--tokenizer", own], "train")
    assert given.data.tokenizer == own
    of_a_commit = parse_run(
        [recipe, "--model.backbone.pretrained", "my/model", "--model.backbone.revision", "v2"], "train"
    )
    assert of_a_commit.data.tokenizer == "my/model@v2"
    assert parse_run(["miras_tiny", "--model.backbone.pretrained", "my/model"], "train").data.tokenizer == "bytes"
    for file in ("my.gguf", "MY.GGUF"):
        with pytest.raises(UserError, match=rf"{file}: the tokenizer of a GGUF file is not .*--data\.tokenizer"):
            parse_run([recipe, "--model.backbone.pretrained", file], "train")


def test_another_backbone_of_a_file_comes_with_its_tokenizer_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: miras\nmodel:\n  backbone:\n    pretrained: my/model\n")
    assert parse_run(["--config", str(file)], "train").data.tokenizer == "my/model"
    file.write_text(file.read_text() + "data:\n  tokenizer: another\n")
    assert parse_run(["--config", str(file)], "train").data.tokenizer == "another"
    changed = parse_run(["--config", str(file), "--model.backbone.pretrained", "third/model"], "train")
    assert changed.data.tokenizer == "another", "a person's choice"


@pytest.mark.parametrize(
    "words, message",
    [
        ("mimir --preset huge", r"--preset 'huge': no recipe is called 'mimir_huge': give .*medium or small"),
        ("mimir_small --preset large", "--preset 'large': mimir_small is a recipe by itself: leave --preset out"),
        ("--preset small", "--preset 'small': name the system before it"),
        ("mimir", "mimir is a system with several recipes: add --preset .*small"),
        ("nothing --preset small", "no recipe is called 'nothing_small': `mnemos recipes` lists all"),
        ("mimir_small --perset small", "unknown flag --perset: did you mean --preset"),
    ],
)
def test_what_a_preset_cannot_mean_is_refused(words: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_run(words.split(), "train", ranks=1)


def test_the_names_of_the_guide_are_flags() -> None:
    words = """mimir --preset medium --batch-size 64 --lr 1e-4 --warmup-steps 10 --num-layers 2 --num-heads 2
        --n-timesteps 30 --kernel absorbing --hybrid-loss-coeff 0.5 --curriculum-warmup-epochs 5 --loss-weight-alpha
        1.5 --balanced""".replace("--kernel", "--model.kernel")
    model = parse_run(words.split(), "train", ranks=1).model
    assert (model.layers, model.heads, model.timesteps, model.kernel) == (2, 2, 30, "absorbing")  # type: ignore[attr-defined]
    assert (model.hybrid_loss_coeff, model.curriculum_epochs, model.mask_weight) == (0.5, 5.0, 1.5)  # type: ignore[attr-defined]
