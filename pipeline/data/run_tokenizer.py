"""The tokenizer of a run: the one that made what it reads."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from pipeline.data_config import DataConfig
from pipeline.errors import UserError
from pipeline.files.given_path import expanded


class UnknownTokenizerError(UserError):
    """What made the token files of a run is not known, or is not here."""


def run_tokenizer(
    data: DataConfig,
    vocab_size: int,
    makers: Mapping[str, str],
    *,
    given: str | None = None,
    download: bool = True,
    fix: str = "name it with --data.tokenizer",
) -> Tokenizer:
    """The tokenizer of a run whose model has `vocab_size` ids.

    Of documents it is `--data.tokenizer`. Of token files it is the one that `makers` (see `makers_of`) says, wherever
    its name or `--data.tokenizer` leads to it. Where no file says, it is `--data.tokenizer`, but not the tokenizer of
    bytes for a model of more ids: that is a default, and the files are of another. Where files say several, or only
    some say, it is `--data.tokenizer` likewise.

    `given`: the name that a command was given, in place of `--data.tokenizer`. It is never a default: it decides, and
    is refused where all files were made with one other tokenizer.

    With `download`, a name may be looked up on the Hub. Raises UnknownTokenizerError, whose line ends with `fix`, and
    UserError for a tokenizer that cannot be loaded, or is another than that of the files.
    """
    if not data.tokens:
        return load_tokenizer(data.tokenizer, data.trust_remote_code)
    named = {fingerprint: name for fingerprint, name in makers.items() if fingerprint}
    if given is not None:
        return _given(given, data, makers)
    if not named:
        return _configured(data, vocab_size, download=download, fix=fix)
    if len(makers) > 1:
        if not _is_default(data, vocab_size):
            return _configured(data, vocab_size, download=download, fix=fix)
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


def _given(name: str, data: DataConfig, makers: Mapping[str, str]) -> Tokenizer:
    tokenizer = load_tokenizer(name, data.trust_remote_code)
    if len(makers) == 1 and "" not in makers and tokenizer.fingerprint not in makers:
        (made_by,) = makers.values()
        raise UserError(
            f"the token files were made with the tokenizer {made_by}, and {name} is another one: name that one, or"
            " leave the flag out"
        )
    return tokenizer


def _is_default(data: DataConfig, vocab_size: int) -> bool:
    """Whether the tokenizer of bytes is what nobody has named, as the model has more ids."""
    return data.tokenizer == ByteTokenizer.name and vocab_size > ByteTokenizer.vocab_size


def _configured(data: DataConfig, vocab_size: int, *, download: bool, fix: str) -> Tokenizer:
    if _is_default(data, vocab_size):
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
