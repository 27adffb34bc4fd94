"""A model of others as a run directory: config.json, model.safetensors, and what else it needs, all or nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dalle_jax.checkpoint.run_dir import PARAMS_FILE, Run, save_frozen, shapes_by_name
from dalle_jax.config import TrainConfig, to_json
from dalle_jax.files.atomic import atomic_path, write_atomic
from dalle_jax.importers.formats import safetensors
from dalle_jax.importers.tensors import ImportedRun, LazyModel, iter_param_chunks


def write_imported_run(
    imported: ImportedRun,
    out: Path,
    source: str,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Run | None = None,
) -> int:
    """Writes the run directory `out`, which must be new or empty; returns the number of parameters.

    Tensors pass through one part at a time (docs/import.md). source: what error messages call the files. progress:
    called with the parameters written and all of the model. tokenizer: a run that is kept beside the model, for one
    that comes without. Raises ValueError naming the tensor that does not fit or is not finite; then, and for a disk
    that is full, nothing is left at `out`.
    """
    with atomic_path(out) as beside:
        count = _write_model(imported.model, beside, source, progress)
        if imported.tokenizer is not None:
            _write_model(imported.tokenizer, beside / "tokenizer", source, progress)
        if tokenizer is not None:
            save_frozen(beside / "tokenizer", tokenizer)
        for name, content in imported.files.items():
            if isinstance(content, Path):
                (shutil.copytree if content.is_dir() else shutil.copyfile)(content, beside / name)
            else:
                (beside / name).write_text(content, encoding="utf-8")
    return count


def _write_model(
    model: LazyModel, out: Path, source: str, progress: Callable[[int, int], None] | None
) -> int:
    out.mkdir(parents=True)
    shapes = shapes_by_name(model.config)
    unmade, unknown = sorted(shapes.keys() - model.rules), sorted(model.rules.keys() - shapes)
    if unmade or unknown:  # no file can cause it: the family's table is wrong
        raise AssertionError(f"no rule for {unmade[:3]}, no parameter {unknown[:3]}")

    done, count = 0, sum(math.prod(leaf.shape) for leaf in shapes.values())

    def parts(name: str) -> Iterator[np.ndarray]:
        nonlocal done
        name = name.replace(".", "/")
        yield from iter_param_chunks(name, model.rules[name], model, shapes[name].shape, source)
        done += math.prod(shapes[name].shape)
        if progress:
            progress(done, count)

    entries = {name.replace("/", "."): (np.dtype(np.float32), leaf.shape) for name, leaf in shapes.items()}
    safetensors.write_safetensors_parts(
        out / PARAMS_FILE, entries, parts, {"format": "dalle_jax", "step": "0"}
    )
    write_atomic(out / "config.json", to_json(TrainConfig(model=model.config)))
    return count
