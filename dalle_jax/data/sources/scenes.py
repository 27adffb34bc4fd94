"""Rows of procedural scenes, drawn when they are asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import Crop
from dalle_jax.data.scenes import generator
from dalle_jax.data.sources.dataset import Captions, Split

EVAL_SCENES = 100_000  # rows of the evaluation split
SCENE_CAPTIONS = 2  # captions of each scene in each language


class SceneDataset:
    """Procedural scenes: row i is scene i of the stream "train" or "val". Nothing is stored."""

    def __init__(self, source: config.ScenesSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        self._config, self._languages = source, tuple(languages)
        self._stream = "train" if split == "train" else "val"
        self._count = source.count if split == "train" else EVAL_SCENES

    def __len__(self) -> int:
        return self._count

    def scene(self, i: int) -> generator.Scene:
        """The scene that row i shows."""
        c = self._config
        return generator.scene(
            i,
            split=self._stream,
            seed=c.seed,
            min_objects=c.min_objects,
            max_objects=c.max_objects,
            sizes=c.sizes,
            fills=c.fills,
            backgrounds=c.backgrounds,
        )

    def image(self, i: int, size: int, crop: Crop, rng: np.random.Generator | None = None) -> np.ndarray:
        return generator.render(self.scene(i), size)  # square already: no crop

    def captions(self, i: int) -> Captions:
        if not self._languages:
            return {}
        said = generator.captions(
            self.scene(i), index=i, seed=self._config.seed, languages=self._languages, count=SCENE_CAPTIONS
        )
        return {name: tuple(c.text for c in said if c.language == name) for name in self._languages}

    classes: tuple[str, ...] = ()

    def label(self, i: int) -> int | None:
        return None

    def log_to(self, path: Path) -> None:
        pass  # nothing is read, nothing can be unusable

    @property
    def replacements(self) -> dict[int, int]:
        return {}

    def report(self) -> dict[str, int]:
        return {}

    def take_read_errors(self) -> None:
        return None

    def add_read_errors(self, findings: None) -> None:
        pass

    def fingerprint(self) -> str:
        c = self._config
        fields = {"seed": c.seed, "min_objects": c.min_objects, "max_objects": c.max_objects}
        fields |= {"sizes": list(c.sizes), "fills": list(c.fills), "backgrounds": list(c.backgrounds)}
        return json.dumps({"kind": "scenes", "split": self._stream, **fields})
