"""Rows of procedural scenes, rendered on demand."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax import config
from dalle_jax.data.images import Crop
from dalle_jax.data.scenes import generator
from dalle_jax.data.sources.dataset import Captions, Split

EVAL_SCENES = 100_000  # rows of the evaluation split
SCENE_CAPTIONS = 2  # captions of each scene in each language


class SceneDataset:
    """Procedural scenes: row i is scene i of the random stream "train" or "val". Nothing is stored."""

    classes: tuple[str, ...] = ()

    def __init__(self, source: config.ScenesSource, split: Split, *, languages: Sequence[str] = ("en", "zh")):
        self._config, self._languages = source, tuple(languages)
        self._stream = "train" if split == "train" else "val"
        self._num_rows = source.count if split == "train" else EVAL_SCENES

    @property
    def parts(self) -> Sequence[SceneDataset]:
        return (self,)

    def __len__(self) -> int:
        return self._num_rows

    def scene(self, i: int) -> generator.Scene:
        """Return the scene of row i."""
        c = self._config
        return generator.generate_scene(
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
        return generator.render_scene(self.scene(i), size)  # already square: no crop

    def captions(self, i: int) -> Captions:
        if not self._languages:
            return {}
        captions = generator.scene_captions(
            self.scene(i), index=i, seed=self._config.seed, languages=self._languages, count=SCENE_CAPTIONS
        )
        return {name: tuple(c.text for c in captions if c.language == name) for name in self._languages}

    def label(self, i: int) -> int | None:
        return None

    def name(self, i: int) -> str:
        return f"scene {i}"

    @property
    def replacements(self) -> dict[int, int]:
        return {}

    def report(self) -> dict[str, int]:
        return {}

    def log_to(self, path: Path) -> None:
        pass  # every scene can be used

    def fingerprint(self) -> str:
        c = self._config
        fields: dict[str, Any] = {"kind": "scenes", "split": self._stream, "seed": c.seed}
        fields |= {"min_objects": c.min_objects, "max_objects": c.max_objects}
        fields |= {"sizes": c.sizes, "fills": c.fills, "backgrounds": c.backgrounds}
        return json.dumps(fields)

    def exclude(self, names: Collection[str]) -> None:
        raise ValueError("Scenes have no stored records to exclude. Change data.source.seed instead.")

    def take_read_errors(self) -> None:
        return None

    def add_read_errors(self, errors: None) -> None:
        pass
