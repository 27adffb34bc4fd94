"""Sentencepiece models as vocabularies, with a BPE dropout that is the same in every process."""

from __future__ import annotations

import random
from collections.abc import Callable

import sentencepiece

SPACE = "\u2581"  # stands for a space in sentencepiece's pieces


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

        Sentencepiece has a dropout too, but its generator differs between processes for the same seed, so a run would not
        resume exactly.
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
