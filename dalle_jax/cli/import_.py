"""`dalle-jax import`: a public checkpoint as a run directory, read without torch and without running anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dalle_jax.checkpoint.imported import write_imported_run
from dalle_jax.checkpoint.run_dir import Run, load_run
from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.cli.output import new_directory
from dalle_jax.config import ClipConfig, TransformerConfig
from dalle_jax.importers import families
from dalle_jax.importers.tensors import ImportedRun
from dalle_jax.pipelines import ProgressPrinter
from dalle_jax.train.tasks.prepare import check_tokenizer_match

_FAMILIES = "; ".join(f"{name}: {about}" for name, (_, about) in families.FAMILIES.items())


@dataclass(frozen=True, kw_only=True)
class ImportArgs:
    """Makes a run directory of a public checkpoint that is on this disk: `sample`, `encode`, `decode`, `info`,
    `export` and --init-from take it like a run that was trained here. Files are read without torch, and nothing in
    them is run; tensors are checked by name and shape, and nothing is written unless all of them fit."""

    family: Positional[Annotated[str, arg(metavar="FAMILY", help="what the checkpoint is of. " + _FAMILIES)]]
    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """file or directory of the checkpoint, as it was published (docs/import.md)"""
    out: str
    """directory to write, new or empty"""
    image_size: int | None = None
    """side of the pictures of a tokenizer that can take any; None is the published one"""
    pixels: Literal["symmetric", "unit"] | None = None
    """of a VQGAN: what its networks see, [-1, 1] or [0, 1]; None is what the family's own code feeds them"""
    tokenizer: str | None = None
    """run of the image tokenizer that a Transformer was trained on, imported before; where its files hold none"""
    text: str | None = None
    """file of its vocabulary, where that is apart from the checkpoint: bpe.model of rudalle; names of the classes of
    llamagen, one a line; bpe_simple_vocab_16e6.txt.gz of OpenAI's clip"""
    version: Literal["v2", "v3"] | None = None
    """of rudalle, where the file's name does not tell"""
    t5: str | None = None
    """of llamagen's t2i_*.pt: directory of google/flan-t5-xl, whose encoder becomes a part of the model"""
    heads: int | None = None
    """heads of attention, which no tensor tells; None is the published number for the width"""
    json: JsonFlag = False


def run(args: ImportArgs) -> dict[str, Any]:
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


def _tokenizer(args: ImportArgs, found: ImportedRun) -> Run | None:
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
