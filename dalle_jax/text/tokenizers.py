"""Captions to tokens: byte-pair encoding through sentencepiece (Ramesh et al. 2021, arXiv 2102.12092, sec.
2.2).

Captions are NFKC-normalised and lower-cased; a character that the vocabulary does not hold goes through as
its UTF-8 bytes, so every caption can be written and read back. Public vocabularies, with rules of their own,
serve as well (byte_pairs.py, character_pairs.py, bart_text.py, t5_text.py), and names of classes (labels.py). A
caption of n pieces fills positions 0..n-1; each position i after it holds its own learned padding token, id
`text_vocab + i`. So the Transformer's text embedding has `text_vocab + text_len` rows, and the null caption of
guidance is a row of padding.
"""

from __future__ import annotations

import io
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from dalle_jax.files.atomic import write_atomic
from dalle_jax.text import bart, byte_bpe, char_bpe, class_labels
from dalle_jax.text import t5 as t5_text
from dalle_jax.text.bart import BartTokenizer
from dalle_jax.text.byte_bpe import ByteLevelBPE
from dalle_jax.text.char_bpe import CharBPE
from dalle_jax.text.class_labels import ClassLabelTokenizer
from dalle_jax.text.t5 import T5Tokenizer

_SPACE = "\u2581"  # sentencepiece writes a space so
_COVERAGES = (0.9995, 0.98)  # share of characters with a piece of their own; the rest are written as bytes
_LONGEST = 65_536  # bytes of a caption that the vocabulary is trained on; longer ones are skipped


def train_text_tokenizer(
    captions: Iterable[str],
    path: str | os.PathLike,
    *,
    vocab: int,
    lowercase: bool = True,
    nfkc: bool = True,
) -> None:
    """Trains a BPE vocabulary on `captions` and writes it to `path`; the same captions give the same file.

    vocab: most pieces wanted, among them 256 bytes and one `<unk>`. Captions that support fewer get the most
        they support, which is no error: the Transformer's `text_vocab` is an upper bound.
    lowercase: fold case. nfkc: fold compatible forms of a character into one. Both are written into the file.

    Raises ValueError if there is no caption with text in it, or if `vocab` cannot hold the bytes and the
    characters that make up 98% of the captions (the message says how many pieces can).
    """
    lines = [_clean(caption) for caption in captions]
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise ValueError("no captions with text to train a vocabulary on; check the source and its languages")
    error, rule = "", _rule(lowercase, nfkc)
    for coverage in _COVERAGES:
        model, error = _train(lines, vocab, coverage, rule)
        if model is None and (most := re.search(r"value <= (\d+)", error)):
            model, error = _train(lines, int(most[1]), coverage, rule)
        if model is not None:
            write_atomic(path, model)
            return
    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        raise ValueError(
            f"a vocabulary of {vocab} pieces is too small for these captions: 256 bytes, <unk> and their "
            f"characters are {least[1]}; raise text_vocab to at least {least[1]}"
        )
    raise ValueError(f"sentencepiece could not train a vocabulary of {vocab} pieces: {error}")


def null_caption(text_vocab: int, text_len: int) -> np.ndarray:
    """The caption that says nothing, all padding: int32 (text_len,)."""
    return np.arange(text_vocab, text_vocab + text_len, dtype=np.int32)


class TextTokenizer:
    """A vocabulary, of sentencepiece or a public one; any number of threads may use it at once."""

    def __init__(
        self, model: bytes | ByteLevelBPE | CharBPE | BartTokenizer | T5Tokenizer | ClassLabelTokenizer
    ):
        """model: the contents of a file that `save` or sentencepiece wrote, or a public vocabulary. Raises
        ValueError if they are neither."""
        if isinstance(model, bytes):
            self._pieces = _own(model) or byte_bpe.parse_byte_bpe(model) or _Sentencepiece(model)
        else:
            self._pieces = model

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextTokenizer:
        """Reads a vocabulary that `train`, `save` or sentencepiece wrote, CLIP's bpe_simple_vocab_16e6.txt (or
        .txt.gz), vocab.json with merges.txt beside it, or a byte-level tokenizer.json (or the folder of these).
        Raises ValueError for a bad or missing file."""
        try:
            data = Path(path).read_bytes() if Path(path).is_file() else b""
            return cls(_own(data) or byte_bpe.load_byte_bpe(Path(path)) or data)
        except OSError as error:
            raise ValueError(
                f"cannot read the text vocabulary {error.filename or path}: {error.strerror}; name a sentencepiece "
                ".model file, CLIP's bpe_simple_vocab_16e6.txt.gz, vocab.json with merges.txt beside it or "
                "tokenizer.json, or leave text.tokenizer_path unset to train one from the source's captions"
            ) from None
        except ValueError as error:
            raise ValueError(f"text vocabulary {path} is broken: {error}; copy or train it again") from None

    def save(self, path: str | os.PathLike) -> None:
        """Writes the vocabulary to `path` as one file, whole or not at all."""
        write_atomic(path, self._pieces.to_bytes())

    def __reduce__(self):
        return type(self), (self._pieces.to_bytes(),)

    @property
    def vocab_size(self) -> int:
        """Pieces in the vocabulary; ids are below it."""
        return self._pieces.vocab_size

    @property
    def num_used_ids(self) -> int:
        """Ids of captions are below it; what is above, as CLIP's start and end, no caption has."""
        return getattr(self._pieces, "num_used_ids", self.vocab_size)

    def encode(
        self, caption: str, *, text_vocab: int, text_len: int, bpe_dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Token ids of one caption, padded or cut to `text_len`.

        text_vocab: ids that the Transformer keeps for pieces; padding at position i is `text_vocab + i`.
        dropout: probability of skipping a merge (1910.13267); 0 gives the one usual encoding.
        seed: of the dropout; the same seed gives the same ids in any thread and process.

        Returns int32 (text_len,) in [0, text_vocab + text_len). Raises ValueError if the caption is not a str
        or the vocabulary has more than `text_vocab` pieces.
        """
        if self.vocab_size > text_vocab:
            raise ValueError(
                f"the text vocabulary has {self.vocab_size} pieces, text_vocab is {text_vocab}; raise text_vocab "
                "or train a smaller vocabulary"
            )
        pieces = self._pieces.encode(_clean(caption), bpe_dropout=bpe_dropout, seed=seed)
        ids = null_caption(text_vocab, text_len)
        n = min(len(pieces), text_len)
        ids[:n] = pieces[:n]
        return ids

    def count_tokens(self, caption: str) -> int:
        """Pieces of a caption, before cutting and without dropout."""
        return len(self._pieces.encode(_clean(caption)))

    def decode(self, ids: Iterable[int]) -> str:
        """The caption that `ids` spell; ids outside the vocabulary (padding) are left out."""
        size = self.vocab_size
        return self._pieces.decode([i for i in map(int, ids) if 0 <= i < size])

    def normalize(self, caption: str) -> str:
        """The caption as the vocabulary sees it: what decoding its encoding gives back."""
        return self._pieces.normalize(_clean(caption))


class BosEosTokenizer(TextTokenizer):
    """A vocabulary for CLIP, which reads a caption between a start and an end token.

    The two are the last ids of `text_vocab`, as in CLIP's own vocabulary."""

    def encode(
        self, caption: str, *, text_vocab: int, text_len: int, bpe_dropout: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Token ids of one caption: start (text_vocab - 2), its pieces, and ends (text_vocab - 1) to `text_len`.

        A caption that is too long loses its last pieces, never its end. dropout, seed: see `TextTokenizer.encode`.
        Returns int32 (text_len,) in [0, text_vocab). Raises ValueError if the caption is not a str or the
        vocabulary has pieces where the two tokens are.
        """
        if self.num_used_ids > text_vocab - 2:
            raise ValueError(
                f"the text vocabulary has {self.num_used_ids} pieces, text_vocab is {text_vocab} with a start and an end; "
                f"raise text_vocab to {self.num_used_ids + 2} or train a smaller vocabulary"
            )
        pieces = self._pieces.encode(_clean(caption), bpe_dropout=bpe_dropout, seed=seed)[: text_len - 2]
        ids = np.full(text_len, text_vocab - 1, np.int32)
        ids[0], ids[1 : 1 + len(pieces)] = text_vocab - 2, pieces
        return ids


class _Sentencepiece:
    """A sentencepiece model, with the methods of `BytePairs`."""

    def __init__(self, model: bytes):
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.load_from_serialized_proto(model)  # the constructor takes b"" for no model
        except RuntimeError as error:
            raise ValueError(f"not a sentencepiece model ({len(model)} bytes): {error}") from None
        self.vocab_size = self._processor.vocab_size()
        p, ids = self._processor, range(self.vocab_size)
        self._ids = {
            p.id_to_piece(i): i
            for i in ids
            if not (p.is_control(i) or p.is_unknown(i) or p.is_unused(i) or p.is_byte(i))
        }
        self._scores = {piece: p.get_score(i) for piece, i in self._ids.items()}
        self._bytes = [p.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._by_word = not any(_SPACE in piece[1:] for piece in self._ids)  # no merge goes over a space

    def encode(self, line: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        if bpe_dropout == 0:
            return self._processor.encode(line)
        text = self._processor.normalize(line)
        if self._by_word:
            words = [_SPACE + word for word in text.split(_SPACE)]
            words[0] = words[0][1:]
        else:
            words = [text]
        chance, ids = random.Random(seed).random, []
        for word in words:
            for piece in self._merged(list(word), bpe_dropout, chance):
                i = self._ids.get(piece)
                ids += [self._bytes[byte] for byte in piece.encode()] if i is None else [i]
        return ids

    def _merged(self, pieces: list[str], dropout: float, chance: Callable[[], float]) -> list[str]:
        """Pieces of a word by merges, the best one first, each skipped with a probability wherever it could be made
        (1910.13267, algorithm 1). Sentencepiece samples, too, but its generator differs between processes for the
        same seed, so no run would go on as it began."""
        scores = self._scores
        while True:
            best, where = None, 0
            for i in range(len(pieces) - 1):
                score = scores.get(pieces[i] + pieces[i + 1])
                if score is not None and chance() >= dropout and (best is None or score > best):
                    best, where = score, i
            if best is None:
                return pieces
            pieces[where : where + 2] = [pieces[where] + pieces[where + 1]]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def normalize(self, line: str) -> str:
        return self._processor.normalize(line).replace(_SPACE, " ").removeprefix(" ")

    def to_bytes(self) -> bytes:
        return self._processor.serialized_model_proto()


def _own(data: bytes) -> CharBPE | BartTokenizer | ClassLabelTokenizer | T5Tokenizer | None:
    """A vocabulary of a format of ours; None if `data` is of another."""
    found = char_bpe.parse_char_bpe(data) or bart.parse_bart(data) or class_labels.parse_class_labels(data)
    if found is None and (t5 := t5_text.parse_t5(data)) is not None:
        found = T5Tokenizer(_Sentencepiece(t5[0]), t5[1])
    return found


def caption_statistics(
    tokenizer: TextTokenizer, captions: Iterable[str], *, text_len: int
) -> dict[str, float]:
    """What a vocabulary makes of captions: `captions`, `tokens` and `characters` of all, and `cut`, how many
    are longer than `text_len` tokens."""
    counts = [(tokenizer.count_tokens(caption), len(caption)) for caption in captions]
    return {
        "captions": len(counts),
        "tokens": sum(n for n, _ in counts),
        "characters": sum(n for _, n in counts),
        "cut": sum(n > text_len for n, _ in counts),
    }


def _clean(caption: str) -> str:
    """The caption as text that UTF-8 can hold, in one line, without the mark that stands for a space."""
    if not isinstance(caption, str):
        raise ValueError(f"a caption is a str, got {type(caption).__name__} {caption!r:.80}")
    if not caption.isascii():
        caption = caption.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace(_SPACE, " ")
    return caption.replace("\n", " ").replace("\r", " ")


def _train(lines: list[str], vocab: int, coverage: float, rule: str | None) -> tuple[bytes | None, str]:
    """The model, or None and what sentencepiece said."""
    out = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        if rule is None:
            own = Path(folder, "lower.tsv")
            own.write_text(_lower_rules(), encoding="ascii")
            normalization = {"normalization_rule_tsv": str(own)}
        else:
            normalization = {"normalization_rule_name": rule}
        return _spm(lines, out, vocab, coverage, normalization)


def _rule(lowercase: bool, nfkc: bool) -> str | None:
    """Sentencepiece's name for a normalisation; None for lower case alone, which it has no name for."""
    if nfkc:
        return "nmt_nfkc_cf" if lowercase else "nmt_nfkc"
    return None if lowercase else "identity"


def _lower_rules() -> str:
    """Lower case as rules for sentencepiece: a line for each character that has another, in hexadecimal."""
    pairs = [(c, chr(c).lower()) for c in range(0x41, 0x1F000) if chr(c).lower() != chr(c)]
    return "".join(f"{c:X}\t{' '.join(f'{ord(x):X}' for x in low)}\n" for c, low in pairs)


def _spm(
    lines: list[str], out: io.BytesIO, vocab: int, coverage: float, normalization: dict[str, str]
) -> tuple[bytes | None, str]:
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=out,
            vocab_size=vocab,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=coverage,
            **normalization,
            max_sentence_length=_LONGEST,
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
