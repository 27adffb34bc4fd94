"""`dalle-jax export`: the model of a run in safetensors, in a directory that is used like a run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from dalle_jax.checkpoint.run_dir import PARAMS_FILE, load_run, write_params
from dalle_jax.cli.common_args import JsonFlag, RunPath
from dalle_jax.cli.output import new_directory
from dalle_jax.config import to_json
from dalle_jax.files.atomic import write_atomic


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Writes the model of a run as model.safetensors beside its config.json, without the optimizer's state. Every
    verb takes the directory like a run, and so does --init-from; the arrays have the names that `info` lists, with
    dots."""

    run: Positional[RunPath]
    """directory of a trained model"""
    out: str
    """directory to write, new or empty"""
    json: JsonFlag = False


def run(args: ExportArgs) -> dict[str, Any]:
    """Writes model.safetensors, config.json, and what else the run needs to be used."""
    out = new_directory(args.out)
    run = load_run(args.run)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if (run.path / "text_tokenizer.model").is_file():
            shutil.copyfile(run.path / "text_tokenizer.model", out / "text_tokenizer.model")
        if (run.path / "tokenizer").is_dir():
            shutil.copytree(run.path / "tokenizer", out / "tokenizer")
    except OSError as error:
        raise OSError(f"cannot write --out {out}: {error.strerror or error}; choose another --out") from error
    count = write_params(out / PARAMS_FILE, run.params, run.step)
    write_atomic(out / "config.json", to_json(run.config))  # last: a directory that has it is whole
    print(f"{count:,} parameters of step {run.step} in {out / PARAMS_FILE}; use {out} like a run")
    return {"run": str(out), "weights": str(out / PARAMS_FILE), "parameters": count, "step": run.step}
