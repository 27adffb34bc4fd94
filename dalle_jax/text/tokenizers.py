"""Captions to token ids: byte-pair encoding trained by sentencepiece (Ramesh et al. 2021, 2102.12092, sec. 2.2).

Captions are NFKC-normalized and lower-cased; a character that the vocabulary does not hold is written as its UTF-8
bytes, so every caption can be encoded and decoded. Public vocabularies have rules of their own (byte_bpe.py,
char_bpe.py, bart.py, t5.py), as have the names of classes (class_labels.py). A caption of n pieces fills positions 0 to
n - 1. Each position i after it holds its own learned padding token, id `text_vocab + i`, so the Transformer's text
embedding has
`text_vocab + text_len` rows, and the null caption of classifier-free guidance is a row of padding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from dalle_jax.files.atomic import write_atomic
from dalle_jax.text.bart import parse_bart
from dalle_jax.text.byte_bpe import load_byte_bpe, parse_byte_bpe
from dalle_jax.text.char_bpe import parse_char_bpe
from dalle_jax.text.class_labels import parse_class_labels
from dalle_jax.text.sentencepiece_model import SPACE, SentencePieceModel, train_sentencepiece
from dalle_jax.text.t5 import parse_t5
from dalle_jax.text.vocabulary import Vocabulary


def train_text_tokenizer(
    captions: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab: int,
    lowercase: bool = True,
    nfkc: bool = True,
) -> None:
    """Train a BPE vocabulary and write it to `path`; the same captions give the same file.

    Args:
      captions: Captions; empty ones are skipped.
      path: The file to write.
      vocab: Largest number of pieces, 256 bytes and one `<unk>` among them. Captions that support fewer pieces give
        fewer, which is no error: the Transformer's `text_vocab` is an upper bound.
      lowercase: Lower-case captions. Written into the file.
      nfkc: Apply Unicode NFKC normalization. Written into the file.

    Raises:
      ValueError: No caption has text, or `vocab` cannot hold the bytes and the characters that make up 98% of the
        captions.
    """
    lines = [line for line in map(_clean, captions) if line.strip()]
    if not lines:
        raise ValueError(
            "Expected captions with text to train a vocabulary on, got none. Check the source and its languages."
        )
    write_atomic(path, train_sentencepiece(lines, vocab=vocab, lowercase=lowercase, nfkc=nfkc))


def null_caption(text_vocab: int, text_len: int) -> np.ndarray:
    """Return the null caption of classifier-free guidance, all padding: int32 (text_len,)."""
    return np.arange(text_vocab, text_vocab + text_len, dtype=np.int32)


class TextTokenizer:
    """A vocabulary with padding. Any number of threads may use one."""

    def __init__(self, vocabulary: bytes | Vocabulary):
        """Use a vocabulary.

        Args:
          vocabulary: A vocabulary, or the contents of a file that `save` or sentencepiece wrote.

        Raises:
          ValueError: The contents are of another kind.
        """
        self._vocabulary = _parse(vocabulary) if isinstance(vocabulary, bytes) else vocabulary

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a vocabulary.

        Args:
          path: A file that `train_text_tokenizer`, `save` or sentencepiece wrote, CLIP's bpe_simple_vocab_16e6.txt (or
            .txt.gz), vocab.json with merges.txt beside it, a byte-level tokenizer.json, or the directory of these.

        Raises:
          ValueError: The file is missing, damaged or of another kind.
        """
        path = Path(path)
        try:
            data = path.read_bytes() if path.is_file() else b""
            return cls(_parse_own(data) or load_byte_bpe(path) or data)
        except OSError as error:
            raise ValueError(
                f"Expected a readable text vocabulary, got {error.filename or path}: {error.strerror}. Use a "
                "sentencepiece .model file, CLIP's bpe_simple_vocab_16e6.txt.gz, vocab.json with merges.txt beside it "
                "or tokenizer.json, or leave text.tokenizer_path unset to train one from the source's captions."
            ) from None
        except ValueError as error:
            reason = str(error).removesuffix(".")
            raise ValueError(
                f"Expected a whole text vocabulary, got {path}: {reason}. Copy or train it again."
            ) from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the vocabulary to one file, atomically."""
        write_atomic(path, self._vocabulary.to_bytes())

    def __reduce__(self):
        return type(self), (self._vocabulary.to_bytes(),)

    @property
    def vocab_size(self) -> int:
        """Pieces of the vocabulary; all ids are below it."""
        return self._vocabulary.vocab_size

    @property
    def num_used_ids(self) -> int:
        """Ids of captions are below it; ids above, such as CLIP's start and end, occur in no caption."""
        return self._vocabulary.num_used_ids

    def encode(
        self, caption: str, *, text_vocab: int, text_len: int, bpe_dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Return the token ids of a caption, padded or truncated to `text_len`.

        Args:
          caption: Text.
          text_vocab: Ids that the Transformer reserves for pieces; padding at position i is `text_vocab + i`.
          text_len: Text positions.
          bpe_dropout: Probability of skipping a merge (1910.13267); 0 gives the one standard encoding.
          seed: Seed of the dropout; the same seed gives the same ids in any thread and process.

        Returns:
          int32 (text_len,) in [0, text_vocab + text_len).

        Raises:
          ValueError: The caption is not a str, or the vocabulary has more than `text_vocab` pieces.
        """
        options = {"text_vocab": text_vocab, "text_len": text_len}
        return self.encode_counted(caption, **options, bpe_dropout=bpe_dropout, seed=seed)[0]

    def encode_counted(
        self, caption: str, *, text_vocab: int, text_len: int, bpe_dropout: float = 0.0, seed: int = 0
    ) -> tuple[np.ndarray, int]:
        """Return the token ids of a caption as `encode` does, and the number of pieces that truncation drops."""
        if self.vocab_size > text_vocab:
            raise ValueError(
                f"Expected a text vocabulary of at most text_vocab {text_vocab} pieces, got {self.vocab_size} pieces. "
                "Raise text_vocab or train a smaller vocabulary."
            )
        pieces = self._vocabulary.encode(_clean(caption), bpe_dropout=bpe_dropout, seed=seed)
        ids = null_caption(text_vocab, text_len)
        ids[: len(pieces)] = pieces[:text_len]
        return ids, max(0, len(pieces) - text_len)

    def count_tokens(self, caption: str) -> int:
        """Return the number of pieces of a caption, before truncation and without dropout."""
        return len(self._vocabulary.encode(_clean(caption)))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the caption of token ids; ids outside the vocabulary (padding) are left out."""
        size = self.vocab_size
        return self._vocabulary.decode([i for i in map(int, ids) if 0 <= i < size])

    def normalize(self, caption: str) -> str:
        """Return the caption as the vocabulary encodes it: what decoding its encoding gives back."""
        return self._vocabulary.normalize(_clean(caption))


class BosEosTokenizer(TextTokenizer):
    """A tokenizer for CLIP, which reads a caption between a start and an end token.

    The two are the last ids of `text_vocab`, as in CLIP's own vocabulary.
    """

    def encode_counted(
        self, caption: str, *, text_vocab: int, text_len: int, bpe_dropout: float = 0.0, seed: int = 0
    ) -> tuple[np.ndarray, int]:
        """Return the start id (text_vocab - 2), the pieces of a caption, and end ids (text_vocab - 1) to `text_len`.

        A caption that is too long loses its last pieces, never its end. For the arguments see `TextTokenizer.encode`.

        Returns:
          Ids int32 (text_len,) in [0, text_vocab), and the number of pieces that truncation drops.

        Raises:
          ValueError: The caption is not a str, or the vocabulary uses the ids of start and end.
        """
        if self.num_used_ids > text_vocab - 2:
            raise ValueError(
                f"Expected a text vocabulary of at most {text_vocab - 2} pieces beside a start and an end in "
                "text_vocab "
                f"{text_vocab}, got {self.num_used_ids}. Raise text_vocab to {self.num_used_ids + 2} or train "
                "a smaller "
                "vocabulary."
            )
        pieces, room = (
            self._vocabulary.encode(_clean(caption), bpe_dropout=bpe_dropout, seed=seed),
            text_len - 2,
        )
        ids = np.full(text_len, text_vocab - 1, np.int32)
        ids[0], ids[1 : 1 + min(len(pieces), room)] = text_vocab - 2, pieces[:room]
        return ids, max(0, len(pieces) - room)


def tokenization_statistics(
    tokenizer: TextTokenizer, captions: Iterable[str], *, text_len: int
) -> dict[str, int]:
    """Return `captions`, `tokens` and `characters` in all, and `cut`, the captions longer than `text_len` tokens."""
    counts = [(tokenizer.count_tokens(caption), len(caption)) for caption in captions]
    return {
        "captions": len(counts),
        "tokens": sum(n for n, _ in counts),
        "characters": sum(n for _, n in counts),
        "cut": sum(n > text_len for n, _ in counts),
    }


def _parse(data: bytes) -> Vocabulary:
    return _parse_own(data) or parse_byte_bpe(data) or SentencePieceModel(data)


def _parse_own(data: bytes) -> Vocabulary | None:
    """Parse a file that `Vocabulary.to_bytes` wrote, other than a byte-level or sentencepiece one; None for others."""
    return parse_char_bpe(data) or parse_bart(data) or parse_class_labels(data) or parse_t5(data)


def _clean(caption: str) -> str:
    """Return the caption as one line that UTF-8 can encode, without sentencepiece's mark of a space."""
    if not isinstance(caption, str):
        raise ValueError(f"Expected a caption of type str, got {type(caption).__name__} {caption!r:.80}.")
    if not caption.isascii():
        caption = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace(SPACE, " ")
    return caption.replace("\n", " ").replace("\r", " ")
