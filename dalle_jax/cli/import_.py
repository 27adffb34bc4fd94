"""`dalle-jax import`: a public checkpoint as a run directory, read without torch and without running anything."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dalle_jax.checkpoint.imported import write_imported_run
from dalle_jax.checkpoint.run_dir import Run, load_run
from dalle_jax.cli.output import new_directory
from dalle_jax.cli.verbs import Import
from dalle_jax.config import ClipConfig, TransformerConfig
from dalle_jax.importers import families
from dalle_jax.importers.tensors import ImportedRun
from dalle_jax.pipelines import ProgressPrinter
from dalle_jax.train.tasks.prepare import check_tokenizer_match


def import_(args: Import) -> dict[str, Any]:
    """Reads, checks and writes."""
    out = new_directory(args.out)
    begun = time.monotonic()
    names = ("image_size", "pixels", "text", "version", "heads", "t5")
    options = {name: getattr(args, name) for name in names}
    found = families.load_family(args.family, Path(args.path), **options)
    model = found.model.config
    count = write_imported_run(
        found, out, args.path, ProgressPrinter("parameters"), tokenizer=_tokenizer(args, found)
    )
    seconds = time.monotonic() - begun
    print(
        f"{count:,} parameters of {args.family} in {out} in {seconds:.0f} s; use it like a run of stage {model.kind}"
    )
    if isinstance(model, ClipConfig) and not (out / "text_tokenizer.model").is_file():
        print(
            "without a vocabulary it reads no captions yet: `rerank`, `evaluate` and --clip want it imported with "
            "--text FILE"
        )
    return {"run": str(out), "family": args.family, "stage": model.kind, "parameters": count}


def _tokenizer(args: Import, found: ImportedRun) -> Run | None:
    """The tokenizer of --tokenizer, where the model wants one. Raises ValueError for none and for one too many."""
    model = found.model.config
    wanted = isinstance(model, TransformerConfig) and found.tokenizer is None
    if args.tokenizer is None:
        if wanted:
            raise ValueError(
                f"{args.family} reads the codes of an image tokenizer with {model.image_vocab} codes and pictures of "
                f"{model.grid} x {model.grid} of them, which its files do not hold: import that first, then give "
                "--tokenizer RUN (docs/import.md)"
            )
        return None
    if not wanted:
        raise ValueError(
            f"--tokenizer is not for {args.family}, whose files hold all that it needs; leave it out"
        )
    run = load_run(args.tokenizer)
    check_tokenizer_match(run.config.model, args.tokenizer, model.image_vocab, model.grid)
    return run
