"""Class labels in the place of captions, for models conditioned on a class: its name or number is one token."""

from __future__ import annotations

import json

_FORMAT = "labels"


class ClassLabelTokenizer:
    """Names of classes by their ids; of the names that a class has, separated by commas, each is one."""

    def __init__(self, names: list[str]):
        """Raises ValueError for no names or what is no text."""
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError("names of classes are texts, at least one")
        self.vocab_size, self._names = len(names), list(names)
        self._ids: dict[str, int] = {}
        for i, name in enumerate(names):
            for one in (name, *name.split(",")):
                self._ids.setdefault(_folded(one), i)

    def encode(self, caption: str, *, bpe_dropout: float = 0.0, seed: int = 0) -> list[int]:
        """The id of the class that is named, or that the number names; none for an empty caption. Raises ValueError
        for a name that no class has. dropout, seed: nothing is left out of a label."""
        name = _folded(caption)
        if not name:
            return []
        if name in self._ids:
            return [self._ids[name]]
        if name.isdecimal() and int(name) < self.vocab_size:
            return [int(name)]
        raise ValueError(
            f"no class {caption!r}; give the number of a class from 0 to {self.vocab_size - 1}, or its name, "
            f"e.g. {self._names[0]!r}"
        )

    def decode(self, ids: list[int]) -> str:
        return " ".join(self._names[i] for i in ids)

    def normalize(self, caption: str) -> str:
        return self.decode(self.encode(caption))

    def to_bytes(self) -> bytes:
        """The names as one file, which `parse` reads."""
        return json.dumps({"format": _FORMAT, "names": self._names}, ensure_ascii=False).encode()


def parse_class_labels(data: bytes) -> ClassLabelTokenizer | None:
    """What `Labels.serialized` wrote, or None if `data` is of another kind. Raises ValueError for broken files."""
    if data[:1] != b"{" or f'"{_FORMAT}"'.encode() not in data[:32]:
        return None
    try:
        return ClassLabelTokenizer(json.loads(data)["names"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"a file of class labels is broken: {error!r}") from None


def _folded(name: str) -> str:
    return " ".join(name.lower().split())
