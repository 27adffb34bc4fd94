"""`dalle-jax import`: a public checkpoint as a run directory, read without torch and without running anything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dalle_jax.cli.output import new_directory
from dalle_jax.cli.verbs import Import
from dalle_jax.importers import families
from dalle_jax.train.imported import write_run


def import_(args: Import) -> dict[str, Any]:
    """Reads, checks and writes."""
    out = new_directory(args.out)
    begun = time.monotonic()
    found = families.load(args.family, Path(args.path), image_size=args.image_size)
    count = write_run(found, out, args.path)
    model = found.model.config
    seconds = time.monotonic() - begun
    print(
        f"{count:,} parameters of {args.family} in {out} in {seconds:.0f} s; use it like a run of stage {model.kind}"
    )
    return {"run": str(out), "family": args.family, "stage": model.kind, "parameters": count}
