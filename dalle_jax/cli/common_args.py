"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from dalle_jax.checkpoint.run_dir import read_run_config
from dalle_jax.config import (
    DataConfig,
    MixtureSource,
    SamplerName,
    ScenesSource,
    SourceConfig,
    Spacing,
    TrainConfig,
)
from dalle_jax.config.files import list_configs, load_config
from dalle_jax.data.sources import infer_source
from dalle_jax.pipelines import DiffusionSamplingConfig, pipeline_class

RunPath = Annotated[str, arg(metavar="RUN")]
JsonFlag = Annotated[
    bool, FlagCreatePairsOff, arg(help="print one JSON object to standard output, all else to standard error")
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerArgs:
    """Flags of a diffusion model, or of one that decodes the codes of a Transformer."""

    num_steps: int | None = None
    """denoising steps; heun and pc evaluate the network twice in each. None is 50"""
    sampler: SamplerName | None = None
    """method that removes the noise; None is dpm++2m"""

    def denoising_config(self, **options: Any) -> DiffusionSamplingConfig:
        """Return the configuration of these flags and `options`; flags that are not set keep their default."""
        return DiffusionSamplingConfig(**_given(self, SamplerArgs), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoisingArgs(SamplerArgs):
    """All flags of a diffusion sampler."""

    spacing: Spacing | None = None
    """of the times between noise and image; None is uniform"""
    eta: float | None = None
    """of ddim: noise of each step; 0 is none, 1 as much as the ancestral sampler. None is 0"""
    threshold: float | None = None
    """quantile of dynamic thresholding of the denoised images, e.g. 0.995; None clips them"""

    def denoising_config(self, **options: Any) -> DiffusionSamplingConfig:
        """Return the configuration of these flags and `options`; flags that are not set keep their default."""
        return DiffusionSamplingConfig(**_given(self, DenoisingArgs), **options)

    def set_denoising_flags(self) -> list[str]:
        """Return the names of the flags of the sampler that are set."""
        return [f"--{name.replace('_', '-')}" for name in _given(self, DenoisingArgs)]


def _given(args: Any, cls: type[SamplerArgs]) -> dict[str, Any]:
    """The fields of `cls` that are not None."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def kind_of_run(flags: Iterable[type[Any]], argv: Sequence[str]) -> str:
    """Return the kind of pipeline of the run directory that a command line names, "" where it names none.

    Args:
        flags: the dataclasses of flags of the command.
        argv: the words after the command. RUN is the first one that is neither a flag nor its value.

    Raises:
        FileNotFoundError, ValueError: the run directory has no readable config.json.
    """
    run = _run_of(argv, flags)
    return "" if run is None else pipeline_class(read_run_config(run).model).kind


def _run_of(argv: Sequence[str], flags: Iterable[type[Any]]) -> str | None:
    switches = {
        f"--{prefix}{field.name.replace('_', '-')}"
        for cls in flags
        for field in dataclasses.fields(cls)
        for prefix in ("", "no-")
        if isinstance(field.default, bool)
    }
    previous = ""
    for word in argv:
        is_value = previous.startswith("--") and "=" not in previous and previous not in switches
        if not word.startswith("-") and not is_value:
            return word
        previous = word
    return None


def resolve_config(target: str) -> TrainConfig:
    """Return the configuration of a run directory, of a configuration file, or of a shipped configuration's name.

    Raises:
        FileNotFoundError: there is none of them.
        ValueError: the file or config.json is invalid.
    """
    path = Path(target)
    if target.endswith(".py") or path.is_file() or (not path.exists() and target in list_configs()):
        return load_config(target)
    return read_run_config(target)


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
