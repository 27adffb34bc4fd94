"""The protocol of a vocabulary: captions to token ids and back, without padding."""

from __future__ import annotations

from typing import Protocol


class Vocabulary(Protocol):
    """A vocabulary of pieces. Any number of threads may use one."""

    @property
    def vocab_size(self) -> int:
        """All ids are below it."""
        ...

    @property
    def num_used_ids(self) -> int:
        """Ids that `encode` returns are below it; ids above, such as CLIP's start and end, are never returned."""
        ...

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Return the ids of the pieces of a caption.

        Args:
          caption: Text.
          bpe_dropout: Probability of skipping a merge (1910.13267), in [0, 1]; a vocabulary without merges ignores it.
          seed: Seed of the dropout; the same seed gives the same ids in any thread and process.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the caption of ids in [0, vocab_size); ids of special pieces are left out."""
        ...

    def normalize(self, caption: str) -> str:
        """Return the caption as the vocabulary encodes it: what decoding its encoding gives back."""
        ...

    def to_bytes(self) -> bytes:
        """Return the vocabulary as one file, which the `parse_` function of its module reads."""
        ...
