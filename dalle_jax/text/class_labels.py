"""Class labels in place of captions, for class-conditional models: the name or number of a class is one token."""

from __future__ import annotations

import json

_FORMAT = "labels"


class ClassLabelTokenizer:
    """A vocabulary of classes. Each of the comma-separated names of a class encodes to its id."""

    def __init__(self, names: list[str]):
        """Use the names of classes, in order of their ids. Raises ValueError for an empty list or other types."""
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("Expected the names of one class or more.")
        self.vocab_size = self.num_used_ids = len(names)
        self._names = list(names)
        self._ids: dict[str, int] = {}
        for i, name in enumerate(names):
            for one in (name, *name.split(",")):
                self._ids.setdefault(_fold(one), i)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """Return the id of a class.

        Args:
          caption: A name or the number of a class, or an empty string, which encodes to no ids.
          bpe_dropout: Unused.
          seed: Unused.

        Raises:
          ValueError: No class has the name or number.
        """
        name = _fold(caption)
        if not name:
            return []
        if name in self._ids:
            return [self._ids[name]]
        if name.isdecimal() and int(name) < self.vocab_size:
            return [int(name)]
        raise ValueError(
            f"Expected a class, got {caption!r}. Use its number in [0, {self.vocab_size}), or its name, e.g. "
            f"{self._names[0]!r}."
        )

    def decode(self, ids: list[int]) -> str:
        """See `Vocabulary.decode`."""
        return " ".join(self._names[i] for i in ids)

    def normalize(self, caption: str) -> str:
        """See `Vocabulary.normalize`."""
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """Return the names as a file that `parse_class_labels` reads."""
        return json.dumps({"format": _FORMAT, "names": self._names}, ensure_ascii=False).encode()


def parse_class_labels(data: bytes) -> ClassLabelTokenizer | None:
    """Parse `ClassLabelTokenizer.to_bytes`; None for data of another kind. Raises ValueError for damaged data."""
    if data[:1] != b"{" or f'"{_FORMAT}"'.encode() not in data[:32]:
        return None
    try:
        return ClassLabelTokenizer(json.loads(data)["names"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected a whole file of class labels, got {error!r}.") from None


def _fold(name: str) -> str:
    return " ".join(name.lower().split())
