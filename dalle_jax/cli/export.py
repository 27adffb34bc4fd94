"""`dalle-jax export`: the model of a run as a run directory with safetensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from dalle_jax.checkpoint.export import export_run
from dalle_jax.checkpoint.layout import PARAMS_FILE
from dalle_jax.checkpoint.load import load_run
from dalle_jax.cli.common_args import JsonFlag, RunPath
from dalle_jax.cli.output import new_output_directory


@dataclass(frozen=True, kw_only=True)
class ExportArgs:
    """Write the model of a run as model.safetensors beside its config.json, without the optimizer state. All
    commands and --init-from accept the directory as a run; the arrays have the names that `info` lists, with dots."""

    run: Positional[RunPath]
    """directory of a trained model"""
    out: str
    """directory to write, new or empty"""
    json: JsonFlag = False


def run(args: ExportArgs) -> dict[str, Any]:
    """Write model.safetensors, config.json and the tokenizers of the run."""
    out = new_output_directory(args.out)
    run = load_run(args.run)
    count = export_run(run, out)
    print(f"{count:,} parameters of step {run.step} in {out / PARAMS_FILE}; {out} is a run directory")
    return {"run": str(out), "params_file": str(out / PARAMS_FILE), "parameters": count, "step": run.step}
