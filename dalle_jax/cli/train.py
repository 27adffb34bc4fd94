"""The command line of training: `CONFIG.py [--field value ...]`, with what its exit codes mean."""

from __future__ import annotations

import os
import sys
import traceback

import jax
import tyro

from dalle_jax.aot import compile_only
from dalle_jax.checkpoint.run_dir import load_config
from dalle_jax.config import TrainConfig
from dalle_jax.parallel.processes import LOST, exit_process, first_line, initialize_distributed, process_name
from dalle_jax.parallel.sharding import MeshError
from dalle_jax.train import loop
from dalle_jax.train.compiler_options import compiler_option_error
from dalle_jax.train.initialize import apply_flags


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """`CONFIG.py [--field value ...]`: trains, and returns the exit code.

    With `--compile-only TARGET [--slices N | --sample ROWS [--quantization KIND]] [--json] [--hlo FILE]` it compiles instead
    (aot/compile_only.py): 0 where the program fits, 2 for a mesh, batch, target or compiler option that does not
    go with the rest, 3 where it does not fit.

    0: finished, or stopped by a signal with its state saved. 1: a configuration, file or disk that does not
    allow to go on, told in one message. 2: a command line that is not understood, a mesh that does not go
    with the devices or the model, or a compiler option that the compiler does not have. 3: a loss or gradient
    that is not finite. 4: another process of the training was lost or failed, or nothing moved for
    `distributed.stall_timeout_seconds`; start all again. 130: interrupted twice, or before the first step. With the
    environment variable DALLE_JAX_TRACEBACK set, errors come with their traceback.

    One of several processes that does not end well ends at once, and so do the others.
    """
    code = 1
    try:
        code = _main(argv, prog)
        return code
    except BaseException:
        if jax.distributed.is_initialized():
            traceback.print_exc()
        raise
    finally:
        if code and jax.distributed.is_initialized():
            exit_process(code)


def _main(argv: list[str] | None, prog: str) -> int:
    argv = sys.argv[1:] if argv is None else argv
    usage = (
        f"usage: {prog} CONFIG.py [--field value ...]\n       {prog} CONFIG.py --help lists the fields\n"
        "       --data.path PATH reads a folder, tar files, an npz file or a TFDS data set\n"
        f"       {prog} CONFIG.py --compile-only v5p:4x4x4 [--slices N] [--json] [--hlo FILE]\n"
        f"       {prog} CONFIG.py --compile-only h200 --sample ROWS [--quantization int8] [--json]\n"
        "       compiles the step or the drawing of pictures for a TPU topology, GPUs (h200:8) or what is here (local)"
    )
    if not argv or argv[0].startswith("-"):
        helped = bool(argv) and argv[0] in ("-h", "--help")
        print(usage, file=sys.stdout if helped else sys.stderr)
        return 0 if helped else 2
    try:
        argv, flags = compile_only.split_flags(argv)
        config = parse(argv, prog)
        if flags.compile_only is not None:
            return compile_only.main(config, flags, prog)
        initialize_distributed(config.distributed, config.mesh.cpu_devices)
        loop.train(config)
    except SystemExit as exit:  # tyro has told what it did not understand, or --help
        return exit.code if isinstance(exit.code, int) else 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, loop.NonFiniteError) as error:
        if os.environ.get("DALLE_JAX_TRACEBACK"):
            raise
        who = f" ({process_name()})" if jax.distributed.is_initialized() else ""
        print(f"{prog}: error{who}: {error}", file=sys.stderr)
        return 3 if isinstance(error, loop.NonFiniteError) else 2 if isinstance(error, MeshError) else 1
    except jax.errors.JaxRuntimeError as error:
        if (refused := compiler_option_error(error)) is not None:
            print(f"{prog}: error: {refused}", file=sys.stderr)
            return 2
        if not jax.distributed.is_initialized() or os.environ.get("DALLE_JAX_TRACEBACK"):
            raise
        print(
            f"{prog}: error ({process_name()}): this process failed, or lost another one: {first_line(error)}. Start all "
            "processes again: they go on from the last checkpoint",
            file=sys.stderr,
        )
        return LOST
    return 0


def parse(argv: list[str], prog: str = "train.py") -> TrainConfig:
    """The configuration of the file `argv[0]` with the flags that follow it.

    Raises what `load_config` raises, ValueError for values that do not go together, SystemExit for flags that
    do not exist (the nearest ones are printed).
    """
    config, flags = apply_flags(load_config(argv[0]), argv[1:])
    return tyro.cli(
        tyro.conf.AvoidSubcommands[TrainConfig], default=config, args=flags, prog=f"{prog} {argv[0]}"
    )
