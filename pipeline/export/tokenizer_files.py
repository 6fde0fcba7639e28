"""Tokenizer files that transformers loads: same ids as in training, and no code of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from pipeline.errors import UserError

END = "<|endoftext|>"
"""What id 256 of the bytes tokenizer is called, which has no name in training."""
UNIGRAM, BPE = 1, 2
"""Kinds of sentencepiece models, as their files number them."""
CONTROL, USER_DEFINED = 3, 4
"""Kinds of pieces, as their files number them."""
INSTEAD = "give --data.tokenizer, the folder of one that transformers has, or --no-tokenizer"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Writes the files of a tokenizer into a folder. `model_max_length`: tokens of a text at the most.

    Text that spells a special token is ordinary text in training. So it is here of the bytes tokenizer and of a
    sentencepiece model, but for one of the type unigram; a tokenizer of transformers stays as it is. Raises UserError
    for one that cannot be written so.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found = tokenizer.transformers_tokenizer
    else:
        import transformers

        if isinstance(tokenizer, ByteTokenizer):
            backend, special = _bytes_backend(), {"eos_token": END}
        elif isinstance(tokenizer, SentencePieceTokenizer):
            backend, special = _sentencepiece_backend(tokenizer)
        else:
            raise UserError(f"--data.tokenizer {tokenizer.name}: transformers has no such tokenizer: {INSTEAD}")
        if "eos_token" in special:
            # Texts of a batch are padded before they are gone on with; a mask says where, whatever the token.
            special = {"pad_token": special["eos_token"], "padding_side": "left"} | special
        found = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, model_max_length=model_max_length, clean_up_tokenization_spaces=False,
            split_special_tokens=True, **special,
        )  # fmt: skip
    found.save_pretrained(folder)


def _bytes_backend() -> Any:
    """Byte-level BPE without merges, whose id of a byte is the byte; 256 ends a document."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(END, special=True, normalized=False)])
    return backend


def _sentencepiece_backend(tokenizer: SentencePieceTokenizer) -> tuple[Any, dict[str, str]]:
    """The model, its normalisation and its decoding as parts of the library tokenizers, and the special tokens."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto.FromString(tokenizer.serialized)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type not in (UNIGRAM, BPE) or trainer.treat_whitespace_as_suffix:
        raise UserError(
            f"--data.tokenizer {tokenizer.name}: it is neither BPE nor unigram with spaces before words: {INSTEAD}"
        )
    if any(piece.type == USER_DEFINED for piece in proto.pieces):
        raise UserError(
            f"--data.tokenizer {tokenizer.name}: it has user-defined pieces, at which transformers splits a text before"
            f" it normalises it: {INSTEAD}"
        )
    if trainer.model_type == UNIGRAM:
        model: Any = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            vocabulary, _merges(pieces, vocabulary), unk_token=trainer.unk_piece, fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )  # fmt: skip
    backend = tokenizers.Tokenizer(model)
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    parts: list[Any] = [decoders.Replace(trainer.unk_piece, trainer.unk_surface), decoders.Replace("▁", " ")]
    parts += [decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        parts.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(parts)
    control = [piece.piece for piece in proto.pieces if piece.type == CONTROL]
    backend.add_special_tokens([tokenizers.AddedToken(piece, special=True, normalized=False) for piece in control])
    names = {"bos_token": trainer.bos_piece, "eos_token": trainer.eos_piece, "pad_token": trainer.pad_piece}
    return backend, {name: piece for name, piece in names.items() if piece in control}


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece: sentencepiece joins the pair whose piece has the highest score."""
    found = []
    for piece, score in pieces:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        found += [(-score, pair) for pair in sorted(known, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))]
    return [pair for _, pair in sorted(found, key=lambda merge: merge[0])]
