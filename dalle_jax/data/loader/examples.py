"""One row of a batch: a picture or its codes, a caption as tokens, a class.

A row is a function of the configuration and of its position in the stream of rows; whatever makes it, a thread or
a process, makes the same. H W picture, N codes, T text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dalle_jax import config
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.sources import Captions, Dataset
from dalle_jax.text.tokenizers import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """What a batch holds of each row. Any number of threads may call it; it can be pickled if its source can."""

    data: config.DataConfig
    source: Dataset | CodesDataset  # with codes a row holds those and no picture
    image_size: int | None = None  # side of the pictures, pixels
    text: TextTokenizer | None = None  # None leaves captions out
    text_vocab: int = 0
    text_len: int = 0
    bpe_dropout: float = 0.0
    with_labels: bool = False  # the class, -1 for none

    def __call__(self, position: int, i: int) -> dict[str, np.ndarray]:
        """Row i of the source as the row at `position` of the stream: `image` uint8 (H, W, 3) or `codes` int32 (N,),
        and as far as asked `text` int32 (T,), `label` int32 ()."""
        rng = row_rng(self.data.seed, position)
        choice, merges = rng.random(2), int(rng.integers(2**32))  # first, so that crops do not move them
        out: dict[str, np.ndarray] = {}
        if isinstance(self.source, CodesDataset):
            out["codes"], said, _ = self.source.row(i)
        else:
            out["image"] = self.source.image(i, self.image_size, self.data.crop, rng)
            said = self.source.captions(i) if self.text is not None else {}
        if self.text is not None:
            out["text"] = self.text.encode(
                _choose(said, self.data.languages, *choice),
                text_vocab=self.text_vocab,
                text_len=self.text_len,
                bpe_dropout=self.bpe_dropout,
                seed=merges,
            )
        if self.with_labels:
            out["label"] = label_array(self.source, i)
        return out

    def specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each array of a row."""
        out: dict[str, tuple[tuple[int, ...], type]] = {}
        if isinstance(self.source, CodesDataset):
            out["codes"] = (self.source.info.num_codes,), np.int32
        else:
            out["image"] = (self.image_size, self.image_size, 3), np.uint8
        if self.text is not None:
            out["text"] = (self.text_len,), np.int32
        if self.with_labels:
            out["label"] = (), np.int32
        return {name: (shape, np.dtype(kind)) for name, (shape, kind) in out.items()}


def row_rng(seed: int, position: int) -> np.random.Generator:
    """The generator of the row at a position of the stream: a counter-based one (Salmon et al. 2011, "Parallel random
    numbers: as easy as 1, 2, 3") whose key is of `seed` and whose highest word counts the rows."""
    counter = np.array([0, 0, 0, position], np.uint64)
    return np.random.Generator(np.random.Philox(key=_key(seed), counter=counter))


_KEYS: dict[int, np.ndarray] = {}


def _key(seed: int) -> np.ndarray:
    if (key := _KEYS.get(seed)) is None:
        key = _KEYS[seed] = np.random.Philox(seed).state["state"]["key"]
    return key


def label_array(source: Dataset, i: int) -> np.ndarray:
    label = source.label(i)
    return np.asarray(-1 if label is None else label, np.int32)


def _choose(said: Captions, languages: Sequence[str], language: float, which: float) -> str:
    """A caption by two shares in [0, 1): of the languages that there are, of the captions in that one."""
    names = [name for name in languages if name in said] or list(said)
    if not names:
        raise ValueError("a row has no captions, but text is wanted; open the source with languages")
    texts = said[names[int(language * len(names))]]
    return texts[int(which * len(texts))]
