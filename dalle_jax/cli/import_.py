"""`dalle-jax import`: a public checkpoint as a run directory, read without torch and without running anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dalle_jax.checkpoint.export import write_imported_run
from dalle_jax.checkpoint.load import Run, load_run
from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.cli.output import new_directory
from dalle_jax.config import ClipConfig, TransformerConfig
from dalle_jax.importers import FAMILIES, open_model
from dalle_jax.importers.tensors import ImportedModel
from dalle_jax.pipelines import ProgressPrinter
from dalle_jax.train.tasks.prepare import check_tokenizer_match

_FAMILIES = "; ".join(f"{name}: {family.help}" for name, family in FAMILIES.items())


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
    pixel_range: Literal["symmetric", "unit"] | None = None
    """of a VQGAN: what its networks see, [-1, 1] or [0, 1]; None is what the family's own code feeds them"""
    image_tokenizer: str | None = None
    """run of the image tokenizer that a Transformer was trained on, imported before; where its files hold none"""
    text_tokenizer: str | None = None
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
    start = time.monotonic()
    names = sorted({name for family in FAMILIES.values() for name in family.options})
    imported = open_model(args.family, args.path, **{name: getattr(args, name) for name in names})
    model = imported.config
    count = write_imported_run(
        imported, out, _image_tokenizer(args, imported), on_progress=ProgressPrinter("parameters")
    )
    seconds = time.monotonic() - start
    print(
        f"{count:,} parameters of {args.family} in {out} in {seconds:.0f} s; use it like a run of stage {model.kind}"
    )
    if isinstance(model, ClipConfig) and not (out / "text_tokenizer.model").is_file():
        print(
            "without a vocabulary it reads no captions yet: `rerank`, `evaluate` and --clip want it imported with "
            "--text-tokenizer FILE"
        )
    return {"run": str(out), "family": args.family, "stage": model.kind, "parameters": count}


def _image_tokenizer(args: ImportArgs, imported: ImportedModel) -> Run | None:
    """The run of --image-tokenizer. Raises ValueError if it is missing, does not match, or is not needed."""
    model = imported.config
    is_needed = isinstance(model, TransformerConfig) and imported.image_tokenizer is None
    if args.image_tokenizer is None:
        if is_needed:
            raise ValueError(
                f"{args.family} generates the codes of an image tokenizer with {model.image_vocab} codes and a grid of "
                f"{model.grid} x {model.grid}, which its files do not contain: import it first, then give "
                "--image-tokenizer RUN (docs/import.md)"
            )
        return None
    if not is_needed:
        raise ValueError(
            f"--image-tokenizer is not for {args.family}, whose files contain all parts; leave it out"
        )
    run = load_run(args.image_tokenizer)
    check_tokenizer_match(run.config.model, args.image_tokenizer, model.image_vocab, model.grid)
    return run
