"""The tokenizer of a run: the one that made what it reads."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from pipeline.data_config import DataConfig
from pipeline.errors import UserError
from pipeline.files.home import expanded


class UnknownTokenizerError(UserError):
    """What made the token files of a run is not known, or is not here."""


def run_tokenizer(
    data: DataConfig,
    vocab_size: int,
    makers: Mapping[str, str],
    *,
    download: bool = True,
    fix: str = "name it with --data.tokenizer",
) -> Tokenizer:
    """The tokenizer of a run whose model has `vocab_size` ids.

    Of documents it is `--data.tokenizer`. Of token files it is the one that `makers` (see `makers_of`) says, wherever
    its name or `--data.tokenizer` leads to it. Where no file says, it is `--data.tokenizer`, but not the tokenizer of
    bytes for a model of more ids: that is a default, and the files are of another.

    With `download`, a name may be looked up on the Hub. Raises UnknownTokenizerError, whose line ends with `fix`.
    """
    if not data.tokens:
        return load_tokenizer(data.tokenizer, data.trust_remote_code)
    named = {fingerprint: name for fingerprint, name in makers.items() if fingerprint}
    if not named:
        return _configured(data, vocab_size, download=download, fix=fix)
    if len(makers) > 1:
        several = ", ".join(name or "one without a sidecar" for name in makers.values())
        raise UnknownTokenizerError(f"the token files were made with several tokenizers ({several}): {fix}")
    ((fingerprint, name),) = named.items()
    problem = f"{name}, is not here"
    # A look on the Hub is slow, and may fail: after what is here.
    for candidate in sorted(dict.fromkeys((data.tokenizer, name)), key=is_here, reverse=True):
        if not (download or is_here(candidate)):
            continue
        try:
            tokenizer = load_tokenizer(candidate, data.trust_remote_code)
        except UserError as error:
            problem = f"{name}, cannot be loaded ({error})" if candidate == name else problem
            continue
        if tokenizer.fingerprint == fingerprint:
            return tokenizer
        problem = f"{name}, is another one now" if candidate == name else problem
    raise UnknownTokenizerError(f"the tokenizer of the token files, {problem}: {fix}")


def _configured(data: DataConfig, vocab_size: int, *, download: bool, fix: str) -> Tokenizer:
    if data.tokenizer == ByteTokenizer.name and vocab_size > ByteTokenizer.vocab_size:
        raise UnknownTokenizerError(
            f"nothing says which tokenizer made the token files: --data.tokenizer is `bytes`, of"
            f" {ByteTokenizer.vocab_size} ids, and the model has {vocab_size:,}: {fix}"
        )
    if not (download or is_here(data.tokenizer)):
        raise UnknownTokenizerError(f"--data.tokenizer {data.tokenizer} is not here: {fix}")
    return load_tokenizer(data.tokenizer, data.trust_remote_code)


def is_here(name: str) -> bool:
    """Whether a tokenizer can be loaded without a network: all but names on the Hub that are not in its cache."""
    if name == ByteTokenizer.name or expanded(name).exists():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = name.partition("@")
    try:
        return isinstance(try_to_load_from_cache(repository, "tokenizer.json", revision=revision or None), str)
    except HFValidationError:  # a path, of nothing
        return False
