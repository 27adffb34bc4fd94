"""`dalle-jax train`: train a configuration or resume its run; with --compile-only, compile it for other hardware."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.conf import Positional, arg

from dalle_jax.aot.report import format_report
from dalle_jax.aot.sampler import compile_sampler
from dalle_jax.aot.training_step import compile_training_step
from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.cli.exit_codes import DOES_NOT_FIT, USAGE, NegativeResult, UsageError
from dalle_jax.config import Quantization, TrainConfig
from dalle_jax.config.files import load_config
from dalle_jax.parallel.processes import initialize_distributed
from dalle_jax.train import loop
from dalle_jax.train.initialize import with_data_path, with_init_model

_USAGE = """usage: {prog} CONFIG [--field value ...]
       {prog} CONFIG --help lists the fields
       {prog} CONFIG --data.path PATH reads a folder, tar files, an npz file or a TFDS data set
       {prog} CONFIG --compile-only v5p:4x4x4 [--slices N] [--json] [--hlo FILE]
       {prog} CONFIG --compile-only h200 --sample ROWS [--quantization int8] [--json]
       compiles the training step or the sampler for a TPU topology, GPUs (h200:8) or this machine (local)"""


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Train a configuration, or resume its run: the same command continues from the last checkpoint.

    Flags named like fields of the configuration override them. --init-from RUN starts from the weights of a run and
    takes its model; flags still override its fields.

    --compile-only TARGET trains nothing: it compiles the training step, or with --sample the sampler, for a TPU
    topology (v5p:4x4x4), for GPUs (h200:8) or for the devices of this machine (local), and reports memory,
    collectives and an estimate of the time. Exit code 3: the program does not fit."""

    config_file: Positional[Annotated[str, arg(metavar="CONFIG")]]
    """configuration file, or the name of a shipped one (`dalle-jax configs`); what exists here of that name takes
    precedence, and NAME.py is the shipped one then"""
    config: Annotated[TrainConfig, arg(name="", prefix_name=False)]
    data_path: Annotated[str | None, arg(name="data.path")] = None
    """folder, tar files (commas, globs), npz file, TFDS directory or name to train on; the kind is detected"""
    compile_only: Annotated[str | None, arg(metavar="TARGET")] = None
    """compile for this target and report, without training"""
    slices: int = 1
    """with --compile-only: number of TPU slices"""
    sample: Annotated[int | None, arg(metavar="ROWS")] = None
    """with --compile-only: compile the sampler of this many images in place of the training step"""
    quantization: Quantization | None = None
    """with --sample: 8-bit weights"""
    hlo: Annotated[str | None, arg(metavar="FILE")] = None
    """with --compile-only: write the text of the compiled program to this file"""
    json: JsonFlag = False


@dataclass(frozen=True, kw_only=True)
class _BaseArgs:
    """The words that determine the defaults of all other flags."""

    config_file: Positional[str]
    init_from: str | None = None
    data_path: Annotated[str | None, arg(name="data.path")] = None


def parse_train_args(argv: Sequence[str], prog: str = "dalle-jax train") -> TrainArgs:
    """Parse `CONFIG [--field value ...]`: the defaults of the flags are the fields of the file CONFIG.

    Args:
        argv: words after the command.
        prog: name of the command in messages.

    Raises:
        SystemExit: no CONFIG; an invalid flag, for which tyro printed the nearest valid ones; or --help.
        UsageError: a flag is the initials of a field.
        ValueError, OSError: of `load_config`, `with_init_model` and `with_data_path`; fields that do not go together.
    """
    if not argv or argv[0].startswith("-"):
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(_USAGE.format(prog=prog), file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else USAGE)
    words = [word for word in argv if word not in ("-h", "--help")]
    base, _ = tyro.cli(_BaseArgs, args=words, prog=prog, return_unknown_args=True, add_help=False)
    config = load_config(base.config_file)
    if base.data_path is not None:
        config = with_data_path(config, base.data_path)
    if base.init_from is not None:
        config = dataclasses.replace(config, init_from=base.init_from)
    default = TrainArgs(config_file=base.config_file, config=with_init_model(config))
    _check_initials(words, default)
    return tyro.cli(
        TrainArgs, args=argv, default=default, prog=f"{prog} {argv[0]}",
        config=(tyro.conf.AvoidSubcommands,), description=inspect.cleandoc(TrainArgs.__doc__ or ""),
    )  # fmt: skip


def _check_initials(words: Sequence[str], args: TrainArgs) -> None:
    """Raise UsageError for a flag such as --optim.lr or --lr: the initials of --optim.learning-rate."""
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(args)} | set(_paths(args.config))
    for word in words:
        name = word.removeprefix("--").partition("=")[0].replace("_", "-")
        section, _, initials = name.rpartition(".")
        if not word.startswith("--") or name in flags or len(initials) < 2:
            continue
        matches = [
            f"--{flag}"
            for flag in sorted(flags)
            if "".join(part[0] for part in flag.rpartition(".")[2].split("-")) == initials
            and section in ("", flag.rpartition(".")[0])
        ]
        if matches:
            raise UsageError(
                f"Expected a field of the configuration, got --{name}. Use {' or '.join(matches)}."
            )


def _paths(config: Any, section: str = "") -> Iterator[str]:
    """The flags of the fields of a configuration, without dashes before them."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), section + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _paths(value, f"{name}.")
        else:
            yield name


def run(args: TrainArgs) -> dict[str, Any]:
    """Train, or compile for the target of --compile-only.

    Raises:
        NegativeResult: the compiled program does not fit the device.
        UsageError: flags, mesh, batch, target or compiler option that do not go together.
        NonFiniteError: of `loop.train`.
    """
    if args.compile_only is not None:
        return _compile(args, args.compile_only)
    for name in ("slices", "sample", "quantization", "hlo"):
        if getattr(args, name) != getattr(TrainArgs, name):
            raise UsageError(f"Expected --compile-only TARGET with --{name}, got none. Remove --{name}.")
    config = args.config
    initialize_distributed(config.distributed, config.mesh.cpu_devices)
    result = loop.train(config)
    return {"run": config.run, "step": result.step, "finished": result.finished, **result.metrics}


def _compile(args: TrainArgs, target: str) -> dict[str, Any]:
    """Compile the training step or the sampler and print the report."""
    if args.sample is None and args.quantization is not None:
        raise UsageError("Expected --sample ROWS with --quantization, got none. Set --sample or remove it.")
    try:
        if args.sample is None:
            report = compile_training_step(args.config, target, args.slices, args.hlo)
        else:
            report = compile_sampler(
                args.config, target, args.sample, args.slices, args.hlo, quantization=args.quantization
            )
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(format_report(report))
    if report["fits"] is False:
        raise NegativeResult(DOES_NOT_FIT, dict(report))
    return dict(report)
