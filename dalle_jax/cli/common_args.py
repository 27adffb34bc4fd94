"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from dalle_jax.checkpoint.run_dir import load_config, read_config
from dalle_jax.config import DataConfig, MixtureSource, SourceConfig, TrainConfig
from dalle_jax.data.sources import infer_source
from dalle_jax.pipelines.diffusion import DiffusionSamplingConfig

RunPath = Annotated[str, arg(metavar="RUN")]
JsonFlag = Annotated[
    bool, FlagCreatePairsOff, arg(help="print one JSON object to standard output, all else to standard error")
]


def refuse_flags(args: Any, names: tuple[str, ...], why: str) -> None:
    """Raises ValueError for the first of these flags that is not at its default."""
    for field in dataclasses.fields(args):
        if field.name in names and getattr(args, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} is for {why}; leave it out")


def denoising(args: Any, guidance: float = 1.0) -> DiffusionSamplingConfig:
    """The settings in the flags of a verb; those it does not have, or that are not given, at their default."""
    names = ("sampler", "num_steps", "spacing", "eta", "guidance_interval", "threshold")
    given = {name: getattr(args, name, None) for name in names}
    return DiffusionSamplingConfig(
        guidance_scale=guidance, **{k: v for k, v in given.items() if v is not None}
    )


def resolve_config(path: str) -> TrainConfig:
    """The configuration of a run directory, or of a Python file."""
    return load_config(path) if path.endswith(".py") or Path(path).is_file() else read_config(path)


def resolve_data(path: str) -> DataConfig:
    """The data of a configuration file or of a run, else what is at `path` in the usual way of reading it."""
    if path.endswith(".py") or (Path(path) / "config.json").is_file():
        return resolve_config(path).data
    return DataConfig(source=infer_source(path))


def allow_bad_records(source: SourceConfig, share: float) -> SourceConfig:
    """`source` that does not stop below this share of unusable records, so that they can be told."""
    if isinstance(source, MixtureSource):
        return dataclasses.replace(
            source, parts=tuple(allow_bad_records(part, share) for part in source.parts)
        )
    return (
        dataclasses.replace(source, max_bad_fraction=share) if hasattr(source, "max_bad_fraction") else source
    )
