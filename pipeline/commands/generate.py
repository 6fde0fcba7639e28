"""`generate CHECKPOINT`: text that follows a prompt, printed as it is drawn; or what else a model draws."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from pipeline.commands.flags import parse_flags, wants_help
from pipeline.errors import UserError, brief
from pipeline.files.given_path import expanded
from pipeline.runtime.exit import INTERRUPTED, log_line

if TYPE_CHECKING:
    from pipeline.inference import Token

USAGE = """\
usage: mnemos generate CHECKPOINT --prompt TEXT [--prompt TEXT ...] [flags]
       mnemos generate CHECKPOINT --prompt-file FILE [--save-state FILE] [flags]
       mnemos generate CHECKPOINT --state FILE [--prompt TEXT ...] [flags]

The text that a model writes after a prompt, on the terminal as it is drawn; the prompt is not repeated. CHECKPOINT is
a checkpoint's folder, a run directory for its newest one, a native folder of OLMo, or a folder as save_pretrained
writes it. Several prompts are decoded together and printed one after the other, each under a line [NUMBER] with its
beginning. How many tokens were read and written, and how fast, is said on stderr.

A model that draws whole samples instead, such as sequences, has flags of its own: mnemos generate CHECKPOINT --help.

  --prompt TEXT        a prompt; may be given several times. Nothing is put before or after it
  --prompt-file FILE   a prompt in a file of UTF-8 text, whose last line break is left out; may be given several times
  --max-new-tokens N   tokens to write at the most (default 128); it stops earlier where the model ends the document, or
                       at the longest text that it takes. 0: the prompt is read alone, for --save-state
  --temperature T      below 1 likely tokens become likelier, above 1 less so; 0: the likeliest always (default 1)
  --top-k K            draw from the K likeliest tokens alone; 0: from all (default 0)
  --top-p P            draw from the fewest likeliest tokens that have this share of the probability (default 1: all)
  --seed S             the same seed draws the same text for a prompt at its place among the prompts (default 0)
  --save-state FILE    keep what was read, the prompts with what --state held, for --state: a safetensors file
  --state FILE         go on from what was read before, by the same model: each prompt goes on from its text, and
                       without a prompt the text itself goes on
  --tokenizer NAME     in place of the model's own: bytes, a .model file, a folder or a Hub name
  --dtype DTYPE        of the weights: float32, bfloat16 or float64 (default float32)"""
REPEATED = ("--prompt", "--prompt-file")
"""Flags that may be given several times, and whose order counts."""
HEADING = 60
"""Characters of a prompt that its line shows."""


@dataclass(frozen=True)
class GenerateOptions:
    """How text is generated; see USAGE."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    save_state: Path | None = None
    state: Path | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"


@dataclass(frozen=True)
class Prompts:
    """Flags that `pop_prompts` takes, for what a misspelt one may have meant."""

    prompt: str = ""
    prompt_file: str = ""


def run_generate(words: Sequence[str]) -> None:
    """The command. Raises UserError."""
    if words and not words[0].startswith("-") and _draws(words[0], words[1:]):
        return
    prompts, rest = pop_prompts(words)
    if wants_help(rest):
        print(USAGE)
        return
    if not rest or rest[0].startswith("-"):
        raise UserError("generate needs a model: mnemos generate CHECKPOINT --prompt TEXT")
    _check_alone()
    options: GenerateOptions = parse_flags(GenerateOptions(), rest[1:], "mnemos generate", Prompts())
    texts = [_text(flag, value) for flag, value in prompts]
    if not texts and options.state is None:
        raise UserError("generate needs a text to go on from: give --prompt TEXT, --prompt-file FILE or --state FILE")
    if not options.max_new_tokens and options.save_state is None:
        raise UserError("--max-new-tokens 0 writes nothing: give a number of tokens, or --save-state FILE")
    with _interruptible():
        _generate(rest[0], texts, options)


def _draws(folder: str, words: Sequence[str]) -> bool:
    """Draws samples where the model in a folder is of that kind; whether it is. Raises UserError."""
    from pipeline.inference.drawing import draw_with, find_drawer

    drawer = find_drawer(folder)
    if drawer is None:
        return False
    prompted = next((word for word in words if word.partition("=")[0].replace("_", "-") in REPEATED), None)
    if prompted is not None:
        raise UserError(f"{prompted.partition('=')[0]}: {drawer.config.recipe} goes on from no text: leave it out")
    options = parse_flags(drawer.system.draw_options(), words, f"mnemos generate {folder}")
    _check_alone()
    with _interruptible():
        drawn = draw_with(drawer, options)
        _print(drawn.text, sys.stdout)
        log_line(drawn.said)
    return True


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(flush=True)
        log_line("interrupted")
        raise SystemExit(INTERRUPTED) from None


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("generate is one process: start it without a launcher")


def pop_prompts(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Prompts as (flag, value) in the order in which they stand, and the other words. What follows the flag is its
    value, whatever it begins with. Raises UserError."""
    found: list[tuple[str, str]] = []
    rest: list[str] = []
    pending = list(words)
    while pending:
        word = pending.pop(0)
        name, equals, value = word.partition("=")
        flag = name.replace("_", "-")
        if flag not in REPEATED:
            rest.append(word)
        elif equals:
            found.append((flag, value))
        elif not pending:
            raise UserError(f"{flag} needs a value")
        else:
            found.append((flag, pending.pop(0)))
    return found, rest


def _text(flag: str, value: str) -> str:
    """The prompt of a flag. Raises UserError."""
    from pipeline.inference.texts import check_prompt

    if flag == "--prompt":
        check_prompt(value, flag)
        return value
    path, name = expanded(value), f"{flag} {value}"
    if not path.exists():
        raise UserError(f"{name}: no such file: name a file of text")
    if path.is_dir():
        raise UserError(f"{name} is a folder: name a file of text")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror or brief(error)}): name a file of text") from error
    if b"\0" in content:
        raise UserError(f"{name} is binary, it holds the byte 0: name a file of text")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it, with iconv -t UTF-8") from None
    # The last line break is the editor's.
    text = text.removesuffix("\n").removesuffix("\r")
    check_prompt(text, name)
    return text


def _generate(folder: str, prompts: Sequence[str], options: GenerateOptions) -> None:
    import torch

    from pipeline.data.run_tokenizer import UnknownTokenizerError
    from pipeline.host.hardware import on_gpu
    from pipeline.inference import load, load_state, read, save_state
    from pipeline.inference.generation import check_next, tokens_after
    from pipeline.inference.load import NAME_TOKENIZER
    from pipeline.inference.state_file import check_readable, check_writable
    from pipeline.inference.texts import decoder_of
    from pipeline.lm.sampling import Sampling

    # What can be wrong is found before anything is read, which may take long.
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    if options.max_new_tokens < 0:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}: give 0 or more")
    if options.state is not None:
        check_readable(options.state)
    if options.save_state is not None:
        check_writable(options.save_state)
    try:
        model, tokenizer = load(folder, tokenizer=options.tokenizer, dtype=getattr(torch, options.dtype))
    except UnknownTokenizerError as error:
        raise UserError(str(error).replace(NAME_TOKENIZER, "give --tokenizer NAME")) from None
    model.to("cuda" if on_gpu() else "cpu")
    decoder = decoder_of(model)
    texts = None if options.state is None else load_state(model, options.state)
    begun = time.perf_counter()
    before = 0 if texts is None else sum(texts.lengths)
    writes = options.max_new_tokens > 0
    if prompts:
        texts = read(decoder, tokenizer, prompts, texts, writes=writes)
    assert texts is not None
    if writes:
        check_next(decoder, texts)
    reading = time.perf_counter() - begun
    if options.save_state is not None:
        save_state(model, texts, options.save_state)
    headings = [_heading(text) for text in prompts] if len(prompts) == texts.rows else [""] * texts.rows
    said = _rate("read", sum(texts.lengths) - before, reading) if prompts else "nothing was read"
    tokens = tokens_after(decoder, tokenizer, texts, sampling, options.max_new_tokens)
    if options.max_new_tokens:
        begun = time.perf_counter()
        report = show(tokens, headings, sys.stdout)
        said += f", {_rate('wrote', report.tokens, time.perf_counter() - begun)}{report.why}"
    log_line(said)


@dataclass(frozen=True)
class Report:
    """What was printed."""

    tokens: int
    ended: tuple[str, ...]
    """Of each row, why."""

    @property
    def why(self) -> str:
        """The reasons in words, where there is something to say."""
        limits, ends = self.ended.count("limit"), self.ended.count("eos")
        parts = [f"{ends} of {len(self.ended)} ended the document"] if ends else []
        parts += [f"{limits} of {len(self.ended)} ended at the longest text that the model takes"] if limits else []
        return "".join(f"; {part}" for part in parts)


def show(tokens: Iterable[Token], headings: Sequence[str], out: TextIO) -> Report:
    """Prints the text of each row in order: that of the first that has not ended as it comes, what others have by then
    after it. With several rows a line with each one's number and heading is before its text."""
    waiting: list[list[str]] = [[] for _ in headings]
    ended: dict[int, str] = {}
    current, count, labelled = 0, 0, len(headings) > 1
    if labelled:
        _print(_label(0, headings), out)
    for token in tokens:
        count += 1
        waiting[token.row].append(token.text)
        if token.ended is not None:
            ended[token.row] = token.ended
        if token.row != current:
            continue
        _print("".join(waiting[current]), out)
        waiting[current].clear()
        while current in ended:
            current += 1
            _print("\n", out)
            if current < len(headings):
                _print(f"\n{_label(current, headings)}{''.join(waiting[current])}", out)
                waiting[current].clear()
    return Report(count, tuple(ended[row] for row in sorted(ended)))


def _label(row: int, headings: Sequence[str]) -> str:
    return f"[{row + 1}] {headings[row]}".rstrip() + "\n"


def _heading(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= HEADING else line[: HEADING - 3] + "..."


def _print(text: str, out: TextIO) -> None:
    if not text:
        return
    # A terminal would obey control characters that a model wrote.
    out.write(_harmless(text) if out.isatty() else text)
    out.flush()


def _harmless(text: str) -> str:
    return "".join(x if x.isprintable() or x in "\n\t" else ascii(x)[1:-1] for x in text)


def _rate(verb: str, tokens: int, seconds: float) -> str:
    return f"{verb} {tokens} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.0f} a second)"
