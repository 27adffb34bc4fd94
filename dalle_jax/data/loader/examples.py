"""One row of a batch: an image or its codes, a caption as token ids, a class.

A row is a function of the configuration and of its position in the stream of rows, whether a thread or a process builds
it. H W image, N codes, T text positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dalle_jax import config
from dalle_jax.data.codes import CodesDataset
from dalle_jax.data.sources import Captions, Dataset
from dalle_jax.text.tokenizers import TextTokenizer

ArraySpecs = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and dtype


@dataclass(frozen=True, kw_only=True)
class ExampleBuilder:
    """Builds the arrays of a row. Any number of threads may call it; it can be pickled if its source can."""

    data: config.DataConfig
    source: Dataset  # rows of a CodesDataset have codes and no image
    image_size: int = 0  # side of the images, pixels; unused with codes
    text: TextTokenizer | None = None  # None leaves captions out
    text_vocab: int = 0
    text_len: int = 0
    bpe_dropout: float = 0.0
    with_labels: bool = False  # adds the class, -1 for none

    def __call__(self, position: int, i: int) -> dict[str, np.ndarray]:
        """Build row i of the source as the row at `position` of the stream.

        Returns:
          `image` uint8 (H, W, 3) or `codes` int32 (N,); with text `text` int32 (T,); with labels `label` int32 ().
        """
        rng = _example_rng(self.data.seed, position)
        # Sampled first, so that the random numbers of a crop do not change them.
        (language, choice), bpe_seed = rng.random(2), int(rng.integers(2**32))
        example: dict[str, np.ndarray] = {}
        if isinstance(self.source, CodesDataset):
            example["codes"], captions, _ = self.source.row(i)
        else:
            example["image"] = self.source.image(i, self.image_size, self.data.crop, rng)
            captions = self.source.captions(i) if self.text is not None else {}
        if self.text is not None:
            example["text"] = self.text.encode(
                _choose_caption(captions, self.data.languages, language, choice),
                text_vocab=self.text_vocab,
                text_len=self.text_len,
                bpe_dropout=self.bpe_dropout,
                seed=bpe_seed,
            )
        if self.with_labels:
            example["label"] = label_array(self.source, i)
        return example

    def specs(self) -> ArraySpecs:
        """Return the shape and dtype of each array of a row."""
        specs: ArraySpecs = {}
        if isinstance(self.source, CodesDataset):
            specs["codes"] = (self.source.info.num_codes,), np.dtype(np.int32)
        else:
            specs["image"] = (self.image_size, self.image_size, 3), np.dtype(np.uint8)
        if self.text is not None:
            specs["text"] = (self.text_len,), np.dtype(np.int32)
        if self.with_labels:
            specs["label"] = (), np.dtype(np.int32)
        return specs


def _example_rng(seed: int, position: int) -> np.random.Generator:
    """Return the random generator of the row at a position of the stream.

    A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): its key is derived
    from
    `seed`, the highest word of its counter is the position.
    """
    counter = np.array([0, 0, 0, position], np.uint64)
    return np.random.Generator(np.random.Philox(key=_philox_key(seed), counter=counter))


_KEYS: dict[int, np.ndarray] = {}


def _philox_key(seed: int) -> np.ndarray:
    if (key := _KEYS.get(seed)) is None:
        key = _KEYS[seed] = np.random.Philox(seed).state["state"]["key"]
    return key


def label_array(source: Dataset, i: int) -> np.ndarray:
    """Return the class of row i, int32 (); -1 for a row without one."""
    label = source.label(i)
    return np.asarray(-1 if label is None else label, np.int32)


def _choose_caption(captions: Captions, languages: Sequence[str], language: float, choice: float) -> str:
    """Choose a caption by two numbers in [0, 1): one among the languages, one among the captions in it."""
    names = [name for name in languages if name in captions] or list(captions)
    if not names:
        raise ValueError("Expected captions for the text of a row, got none. Open the source with languages.")
    texts = captions[names[int(language * len(names))]]
    return texts[int(choice * len(texts))]
