"""Sentencepiece models: training, and encoding with a BPE dropout that is the same in every process."""

from __future__ import annotations

import io
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

SPACE = "\u2581"  # stands for a space in sentencepiece's pieces
_COVERAGES = (0.9995, 0.98)  # fraction of characters with a piece of their own; the rest are written as bytes
_MAX_CAPTION_BYTES = 65_536  # the vocabulary is not trained on longer captions


class SentencePieceModel:
    """A trained sentencepiece model. Any number of threads may use one."""

    def __init__(self, model: bytes):
        """Load the contents of a `.model` file. Raises ValueError for other contents."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(model)  # the constructor takes b"" for no model
        except RuntimeError as error:
            raise ValueError(
                f"Expected a sentencepiece model, got {len(model)} other bytes: {error}"
            ) from None
        self.vocab_size = self.num_used_ids = self._processor.vocab_size()
        p = self._processor
        self._ids = {
            p.id_to_piece(i): i
            for i in range(self.vocab_size)
            if not (p.is_control(i) or p.is_unknown(i) or p.is_unused(i) or p.is_byte(i))
        }
        self._scores = {piece: p.get_score(i) for piece, i in self._ids.items()}
        self._byte_ids = [p.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._merges_within_words = not any(SPACE in piece[1:] for piece in self._ids)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """See `Vocabulary.encode`; a character without a piece is written as its UTF-8 bytes."""
        if bpe_dropout == 0:
            return self._processor.encode(caption)
        text = self._processor.normalize(caption)
        if self._merges_within_words:
            words = [SPACE + word for word in text.split(SPACE)]
            words[0] = words[0][1:]
        else:
            words = [text]
        uniform, ids = random.Random(seed).random, []
        for word in words:
            for piece in self._merge(list(word), bpe_dropout, uniform):
                i = self._ids.get(piece)
                ids += [self._byte_ids[byte] for byte in piece.encode()] if i is None else [i]
        return ids

    def _merge(self, pieces: list[str], bpe_dropout: float, uniform: Callable[[], float]) -> list[str]:
        """Merge the characters of a word with dropout (1910.13267, algorithm 1), the best merge first.

        Sentencepiece has a dropout too, but its generator differs between processes for the same seed, so a run would
        not resume exactly.
        """
        scores = self._scores
        while True:
            best, position = None, 0
            for i in range(len(pieces) - 1):
                score = scores.get(pieces[i] + pieces[i + 1])
                if score is not None and uniform() >= bpe_dropout and (best is None or score > best):
                    best, position = score, i
            if best is None:
                return pieces
            pieces[position : position + 2] = [pieces[position] + pieces[position + 1]]

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`."""
        return self._processor.decode(ids)

    def normalize(self, caption: str) -> str:
        """See `Vocabulary.normalize`."""
        return self._processor.normalize(caption).replace(SPACE, " ").removeprefix(" ")

    def to_bytes(self) -> bytes:
        """Return the contents of a `.model` file."""
        return self._processor.serialized_model_proto()


def train_sentencepiece(lines: list[str], *, vocab: int, lowercase: bool, nfkc: bool) -> bytes:
    """Train a BPE model with byte fallback; the same lines give the same model.

    Args:
      lines: Texts without line breaks.
      vocab: Largest number of pieces, 256 bytes and one `<unk>` among them; lines that support fewer give fewer.
      lowercase: Lower-case texts.
      nfkc: Apply Unicode NFKC normalization.

    Returns:
      The contents of a `.model` file.

    Raises:
      ValueError: `vocab` cannot hold the bytes and the characters that make up 98% of the lines.
    """
    error, rule = "", _normalization_rule(lowercase, nfkc)
    for coverage in _COVERAGES:
        model, error = _train(lines, vocab, coverage, rule)
        if model is None and (largest := re.search(r"value <= (\d+)", error)):
            model, error = _train(lines, int(largest[1]), coverage, rule)
        if model is not None:
            return model
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", error):
        raise ValueError(
            f"Expected a vocabulary of at least {smallest[1]} pieces, 256 bytes, <unk> and the characters of these "
            f"captions, got {vocab}. Raise text_vocab to at least {smallest[1]}."
        )
    raise ValueError(f"Expected captions that give a vocabulary of {vocab} pieces, got: {error}")


def _train(lines: list[str], vocab: int, coverage: float, rule: str | None) -> tuple[bytes | None, str]:
    """Return a sentencepiece model, or None and the error of sentencepiece."""
    with tempfile.TemporaryDirectory() as folder:
        if rule is None:
            rules = Path(folder, "lower.tsv")
            rules.write_text(_lowercase_rules(), encoding="ascii")
            return _train_sentencepiece(lines, vocab, coverage, {"normalization_rule_tsv": str(rules)})
        return _train_sentencepiece(lines, vocab, coverage, {"normalization_rule_name": rule})


def _normalization_rule(lowercase: bool, nfkc: bool) -> str | None:
    """Return sentencepiece's name of a normalization; None for lower case alone, which has no name."""
    if nfkc:
        return "nmt_nfkc_cf" if lowercase else "nmt_nfkc"
    return None if lowercase else "identity"


def _lowercase_rules() -> str:
    """Return sentencepiece rules for lower case: a line for each character that has one, in hexadecimal."""
    pairs = [(c, chr(c).lower()) for c in range(0x41, 0x1F000) if chr(c).lower() != chr(c)]
    return "".join(f"{c:X}\t{' '.join(f'{ord(x):X}' for x in low)}\n" for c, low in pairs)


def _train_sentencepiece(
    lines: list[str], vocab: int, coverage: float, normalization: dict[str, Any]
) -> tuple[bytes | None, str]:
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=vocab,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=coverage,
            **normalization,
            max_sentence_length=_MAX_CAPTION_BYTES,
            num_threads=1,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        return None, str(error)
    return out.getvalue(), ""
