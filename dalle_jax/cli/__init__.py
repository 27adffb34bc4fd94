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
import typing
from typing import Any

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
    "export": ("export", "write a run as safetensors and config.json, usable like a run"),
    "import": ("import_", "convert a public checkpoint to a run, without torch"),
    "info": ("info", "list parameters, shapes and memory of a run or a configuration"),
}


def usage() -> str:
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


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    With the environment variable DALLE_JAX_TRACEBACK set, errors are raised with their traceback.

    Args:
        argv: words after `dalle-jax`; None takes those of the process.

    Returns:
        The exit code. 0: success. 1: an invalid input, file or disk; the message names it. 2: an invalid command
        line. 3: a loss or a sampled image that is not finite. 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
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
    if command == "train":
        from dalle_jax.cli import train

        return train.main(rest, prog="dalle-jax train")
    try:
        return _run(command, rest)
    except SystemExit as stop:  # tyro has printed an error or the help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"dalle-jax {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output has exited, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, closing it at exit raises nothing
        return 1
    except (ValueError, OSError, ArithmeticError) as error:
        not_finite = type(error).__name__ in ("NonFiniteError", "NonFiniteSampleError")
        if os.environ.get("DALLE_JAX_TRACEBACK") or (isinstance(error, ArithmeticError) and not not_finite):
            raise
        print(f"dalle-jax {command}: error: {_message(error)}", file=sys.stderr)
        return 3 if not_finite else 1


def flags_of(command: str) -> type:
    """Return the dataclass of a command's flags, the type of its handler's argument."""
    module = importlib.import_module(f"dalle_jax.cli.{COMMANDS[command][0]}")
    return typing.get_type_hints(module.run)["args"]


def _run(command: str, argv: list[str]) -> int:
    from dalle_jax.cli import startup

    startup.start_command()  # before anything imports jax
    import tyro

    module, summary = COMMANDS[command]
    flags = flags_of(command)
    args = tyro.cli(
        flags, args=argv, prog=f"dalle-jax {command}", config=(tyro.conf.FlagCreatePairsOff,),
        description=inspect.cleandoc(flags.__doc__ or summary),
    )  # fmt: skip
    run = importlib.import_module(f"dalle_jax.cli.{module}").run
    if not args.json:
        run(args)
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        result = run(args)
    print(json.dumps(_to_json(result), ensure_ascii=False, allow_nan=False))
    return 0


def _message(error: BaseException) -> str:
    """The message; for an error of the operating system the file and the reason, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _to_json(value: Any) -> Any:
    """`value` in JSON types; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
