"""The command line `dalle-jax COMMAND ...`: the table of commands, parsing of flags, exit codes.

Each command is a module with a dataclass of its flags and a handler `run(args) -> dict`, imported when the command is
used. The handler prints text for a reader and returns what `--json` prints.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import math
import os
import sys
import traceback
import typing
from collections.abc import Sequence
from typing import Any

from dalle_jax.cli import startup

COMMANDS = {  # command: (module, one line of help)
    "demo": ("demo", "train, sample and evaluate on procedural scenes, all in minutes on a CPU"),
    "train": ("train", "train a configuration file, or resume its run (the same as train.py)"),
    "sample": ("sample", "sample images for captions"),
    "rerank": ("rerank", "rank images by how well they fit a caption"),
    "encode": ("encode", "images to codes; with --data the training images of a run"),
    "decode": ("decode", "codes to images"),
    "data": ("data", "describe a data set and list its unusable records; build a TFDS data set"),
    "text": ("text", "train a text tokenizer on the captions of a data set"),
    "evaluate": ("evaluate", "compute every metric that applies to a run"),
    "configs": ("configs", "list the configurations that come with the package, or print one"),
    "export": ("export", "write a run as safetensors and config.json, usable like a run"),
    "import": ("import_", "convert a public checkpoint to a run, without torch"),
    "info": ("info", "list parameters, shapes and memory of a run or a configuration"),
}
MODEL_COMMANDS = {  # commands whose flags depend on the model of RUN: name of their table of flags by kind of pipeline
    "sample": "SAMPLE_FLAGS",
    "decode": "DECODE_FLAGS",
    "evaluate": "EVALUATE_FLAGS",
}


def _command_usage() -> str:
    """Return the text of `dalle-jax --help`."""
    lines = [f"  {name:<10}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dalle-jax COMMAND ...",
            "",
            *lines,
            "",
            "`dalle-jax COMMAND --help` lists the flags of a command. A RUN is a directory that training wrote.",
            "With --json a command prints one JSON object to standard output and all else to standard error.",
        ]
    )


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Run one command.

    With the environment variable DALLE_JAX_TRACEBACK set, errors are raised with their traceback. One of several
    processes of a training that fails ends at once, and so do the others.

    Args:
        argv: words after `dalle-jax`; None takes those of the process.
        prog: name of the command in messages; None is `dalle-jax COMMAND`.

    Returns:
        The exit code. 0: success; of a training also a stop by a signal after saving. 1: an invalid input, file or
        disk; the message names it. 2: an invalid command line, a mesh that does not fit the devices or the model, an
        unknown compiler option. 3: a loss, gradient or sampled image that is not finite; with --compile-only a
        program that does not fit. 4: another process of the training was lost or failed, or no step completed within
        `distributed.stall_timeout_seconds`; start all processes again. 130: interrupted.
    """
    is_process = argv is None
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_command_usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        import dalle_jax

        print(dalle_jax.__version__)
        return 0
    command, rest = argv[0], argv[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"perhaps you meant {near[0]!r}" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"dalle-jax: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    if is_process:
        startup.restart_with_huge_pages()
    code = 1
    try:
        code = _run(command, rest, prog or f"dalle-jax {command}")
    except BaseException:
        if _is_distributed():
            traceback.print_exc()
        raise
    finally:
        if code and _is_distributed():
            from dalle_jax.parallel.processes import exit_process

            exit_process(code)
    return code


def _run(command: str, argv: list[str], prog: str) -> int:
    """Parse and run; print the error of a user and return its exit code."""
    from dalle_jax.cli import exit_codes

    if command != "train":  # the processes of a training compile at the same time or not at all
        startup.start_command()  # before anything imports jax
    try:
        return _call(command, argv, prog)
    except SystemExit as stop:  # tyro has printed an error or the help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except BrokenPipeError:  # the reader of standard output has exited, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closing it at exit raises nothing
        return 1
    except Exception as error:
        failure = None if os.environ.get("DALLE_JAX_TRACEBACK") else exit_codes.exit_code(error)
        if failure is None:
            raise
        print(f"{prog}: {failure[1]}", file=sys.stderr)
        return failure[0]


def _call(command: str, argv: list[str], prog: str) -> int:
    """Parse the flags, run the handler, print its result where --json asks for it."""
    from dalle_jax.cli.exit_codes import NegativeResult

    module = importlib.import_module(f"dalle_jax.cli.{COMMANDS[command][0]}")
    args = module.parse_train_args(argv, prog) if command == "train" else _parse_args(command, argv, prog)
    code = 0
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        try:
            result = module.run(args)
        except NegativeResult as negative:
            result, code = negative.result, negative.code
    if args.json:
        print(json.dumps(_to_json(result), ensure_ascii=False, allow_nan=False))
    return code


def all_flags_of(command: str) -> dict[str, type]:
    """Return the dataclasses of a command's flags: "" for all models, and for `MODEL_COMMANDS` by kind of pipeline."""
    module = importlib.import_module(f"dalle_jax.cli.{COMMANDS[command][0]}")
    common = {"": typing.get_type_hints(module.run)["args"]}
    return common | (getattr(module, MODEL_COMMANDS[command]) if command in MODEL_COMMANDS else {})


def _flags_of(command: str, argv: Sequence[str] = ()) -> type:
    """Return the dataclass of a command's flags; for `MODEL_COMMANDS` that of the model of the RUN in `argv`."""
    flags = all_flags_of(command)
    if len(flags) == 1:
        return flags[""]
    from dalle_jax.cli.common_args import kind_of_run

    return flags.get(kind_of_run(flags.values(), argv), flags[""])


def _parse_args(command: str, argv: list[str], prog: str) -> Any:
    import tyro

    flags = _flags_of(command, argv)
    if flags is not all_flags_of(command)[""] and not {"-h", "--help"} & set(argv):
        prog = f"{prog} RUN"  # errors name the help of this model's flags
    return tyro.cli(
        flags, args=argv, prog=prog, config=(tyro.conf.FlagCreatePairsOff,),
        description=inspect.cleandoc(flags.__doc__ or ""),
    )  # fmt: skip


def _is_distributed() -> bool:
    """Whether this process is one of several; False before jax is imported."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _to_json(value: Any) -> Any:
    """`value` in JSON types; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
