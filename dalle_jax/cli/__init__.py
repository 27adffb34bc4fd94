"""The command `dalle-jax VERB ...`: what each verb is, how its words are read, how errors are told.

A verb is a dataclass of its flags in verbs.py and a function `run(args) -> dict` in the module named here,
loaded when it is used. The function prints what people read and returns what `--json` prints.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import json
import keyword
import math
import os
import sys
from typing import Any

VERBS = {  # verb: (class in verbs.py, module with `run`, one line of help)
    "demo": (
        "Demo",
        "dalle_jax.cli.demo",
        "train, sample and measure on procedural scenes, all in minutes on a CPU",
    ),
    "train": ("", "", "train a configuration file, or go on with its run (the same as train.py)"),
    "sample": ("Sample", "dalle_jax.cli.sample", "draw pictures for captions"),
    "rerank": ("Rerank", "dalle_jax.cli.rerank", "pictures in order of how well they fit a caption"),
    "encode": (
        "Encode",
        "dalle_jax.cli.codes",
        "pictures to codes; with --data the training pictures of a run",
    ),
    "decode": ("Decode", "dalle_jax.cli.codes", "codes to pictures"),
    "data": (
        "Data",
        "dalle_jax.cli.data",
        "what a data set holds and what of it cannot be used; build a TFDS set",
    ),
    "text": ("Text", "dalle_jax.cli.text", "train a vocabulary on the captions of a data set"),
    "evaluate": ("Evaluate", "dalle_jax.cli.evaluate", "every measure that applies to a run"),
    "export": ("Export", "dalle_jax.cli.export", "a run as safetensors and config.json, usable like a run"),
    "import": ("Import", "dalle_jax.cli.import_", "a public checkpoint as a run, without torch"),
    "info": ("Info", "dalle_jax.cli.info", "parameters, shapes and memory of a run or a configuration"),
}


def usage() -> str:
    lines = [f"  {name:<10}{about}" for name, (_, _, about) in VERBS.items()]
    return "\n".join(
        [
            "usage: dalle-jax VERB ...",
            "",
            *lines,
            "",
            "`dalle-jax VERB --help` lists what a verb takes. A RUN is the directory that training made.",
            "With --json a verb prints one JSON object to standard output, all else to standard error.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code.

    0: done. 1: an input, file or disk that does not allow it, told in one message. 2: a command line that is
    not understood. 3: a loss or a drawn picture that is not finite. 130: interrupted. With the environment variable
    DALLE_JAX_TRACEBACK set, errors come with their traceback.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        import dalle_jax

        print(dalle_jax.__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"perhaps you meant {near[0]!r}" if near else f"want one of {', '.join(VERBS)}"
        print(f"dalle-jax: no verb {verb!r}; {hint}", file=sys.stderr)
        return 2
    if verb == "train":
        from dalle_jax.cli import train

        return train.main(rest, prog="dalle-jax train")
    try:
        return _run(verb, rest)
    except SystemExit as stop:  # tyro has told what it did not understand, or --help
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print(f"dalle-jax {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, so that closing it at exit is silent
        return 1
    except (ValueError, OSError, ArithmeticError) as error:
        not_finite = type(error).__name__ in ("NonFiniteError", "NonFiniteSampleError")
        if os.environ.get("DALLE_JAX_TRACEBACK") or (isinstance(error, ArithmeticError) and not not_finite):
            raise
        print(f"dalle-jax {verb}: error: {_told(error)}", file=sys.stderr)
        return 3 if not_finite else 1


def _run(verb: str, argv: list[str]) -> int:
    from dalle_jax.cli import startup

    startup.start_command()  # before anything imports jax
    import tyro

    from dalle_jax.cli import verbs

    name, module, about = VERBS[verb]
    kind = getattr(verbs, name)
    args = tyro.cli(
        kind, args=argv, prog=f"dalle-jax {verb}", config=(tyro.conf.FlagCreatePairsOff,),
        description=inspect.cleandoc(kind.__doc__ or about),
    )  # fmt: skip
    run = importlib.import_module(module)
    run = getattr(run, f"{verb}_" if keyword.iskeyword(verb) else verb)
    if not args.json:
        run(args)
        return 0
    with contextlib.redirect_stdout(sys.stderr):
        result = run(args)
    print(json.dumps(_plain(result), ensure_ascii=False, allow_nan=False))
    return 0


def _told(error: BaseException) -> str:
    """The message; of an error of the operating system the file and the reason, without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; a figure that is not finite is null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
