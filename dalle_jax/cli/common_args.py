"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.config import DataConfig, MixtureSource, ScenesSource, SourceConfig, TrainConfig
from dalle_jax.config.files import list_configs, load_config
from dalle_jax.data.sources import infer_source
from dalle_jax.pipelines.diffusion import DiffusionSamplingConfig

RunPath = Annotated[str, arg(metavar="RUN")]
JsonFlag = Annotated[
    bool, FlagCreatePairsOff, arg(help="print one JSON object to standard output, all else to standard error")
]


def refuse_flags(args: Any, names: tuple[str, ...], why: str) -> None:
    """Refuse flags that do not apply.

    Args:
        args: flags of a command, a dataclass.
        names: fields that do not apply.
        why: what the flags are for, for the message.

    Raises:
        ValueError: one of the fields is not at its default.
    """
    for field in dataclasses.fields(args):
        if field.name in names and getattr(args, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} is for {why}; leave it out")


def denoising(args: Any, guidance: float = 1.0) -> DiffusionSamplingConfig:
    """Return the sampler settings in the flags of a command; defaults for flags that it lacks or that are None."""
    names = ("sampler", "num_steps", "spacing", "eta", "guidance_interval", "threshold")
    given = {name: getattr(args, name, None) for name in names}
    return DiffusionSamplingConfig(
        guidance_scale=guidance, **{k: v for k, v in given.items() if v is not None}
    )


def resolve_config(target: str) -> TrainConfig:
    """Return the configuration of a run directory, of a configuration file, or of a shipped configuration's name.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: the file or config.json is invalid.
    """
    path = Path(target)
    if target.endswith(".py") or path.is_file() or (not path.exists() and target in list_configs()):
        return load_config(target)
    return read_config(target)


def resolve_data(target: str) -> DataConfig:
    """Return the data of a configuration or a run, or a default configuration of the data set at a path."""
    path = Path(target)
    if target.endswith(".py") or (path / "config.json").is_file():
        return resolve_config(target).data
    if not path.exists() and target in list_configs():
        return load_config(target).data
    return DataConfig(source=infer_source(target))


def allow_bad_records(source: SourceConfig, fraction: float) -> SourceConfig:
    """Return `source` with `max_bad_fraction` set to `fraction`, so that unusable records are counted, not an error."""
    match source:
        case MixtureSource():
            parts = tuple(allow_bad_records(part, fraction) for part in source.parts)
            return dataclasses.replace(source, parts=parts)
        case ScenesSource():
            return source
    return dataclasses.replace(source, max_bad_fraction=fraction)
