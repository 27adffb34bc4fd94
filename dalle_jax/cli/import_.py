"""`dalle-jax import`: a public checkpoint to a run directory, without torch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from dalle_jax.checkpoint.export import write_imported_run
from dalle_jax.checkpoint.load import Run, load_run
from dalle_jax.cli.common_args import JsonFlag
from dalle_jax.cli.output import new_output_directory
from dalle_jax.config import ClipConfig, TransformerConfig
from dalle_jax.importers import FAMILIES, open_model
from dalle_jax.importers.tensors import ImportedModel
from dalle_jax.pipelines import ProgressPrinter
from dalle_jax.train.tasks.prepare import check_tokenizer_match

_FAMILIES = "; ".join(f"{name}: {family.help}" for name, family in FAMILIES.items())


@dataclass(frozen=True, kw_only=True)
class ImportArgs:
    """Convert a downloaded public checkpoint to a run directory, which all commands and --init-from accept as a run.
    Files are read without torch, and no code in them is executed; every tensor is checked by name and shape before
    anything is written."""

    family: Positional[Annotated[str, arg(metavar="FAMILY", help="model family. " + _FAMILIES)]]
    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """file or directory of the checkpoint, as published (docs/import.md)"""
    out: str
    """directory to write, new or empty"""
    image_size: int | None = None
    """side of the images of a tokenizer that accepts any size, pixels; None is the published size"""
    pixel_range: Literal["symmetric", "unit"] | None = None
    """VQGAN: range of its networks' inputs, [-1, 1] or [0, 1]; None is that of the family's own code"""
    image_tokenizer: str | None = None
    """Transformer: run of its image tokenizer, imported before; for families whose files contain none"""
    text_tokenizer: str | None = None
    """file of the vocabulary, if it is not part of the checkpoint: bpe.model of rudalle; class names of llamagen, one
    per line; bpe_simple_vocab_16e6.txt.gz of OpenAI's clip"""
    version: Literal["v2", "v3"] | None = None
    """rudalle: version, if the name of the file does not contain it"""
    t5: str | None = None
    """llamagen's t2i_*.pt: directory of google/flan-t5-xl, whose encoder becomes part of the model"""
    heads: int | None = None
    """attention heads, which no tensor determines; None is the published number for the width"""
    json: JsonFlag = False


def run(args: ImportArgs) -> dict[str, Any]:
    """Read, check and write the checkpoint."""
    out = new_output_directory(args.out)
    start = time.monotonic()
    names = sorted({name for family in FAMILIES.values() for name in family.options})
    imported = open_model(args.family, args.path, **{name: getattr(args, name) for name in names})
    model = imported.config
    count = write_imported_run(
        imported, out, _image_tokenizer(args, imported), on_progress=ProgressPrinter("parameters")
    )
    seconds = time.monotonic() - start
    print(
        f"{count:,} parameters of {args.family} in {out} in {seconds:.0f} s; it is a run of stage {model.kind}"
    )
    if isinstance(model, ClipConfig) and not (out / "text_tokenizer.model").is_file():
        print(
            "it has no vocabulary: `rerank`, `evaluate` and --clip need one. Import it again with --text-tokenizer FILE"
        )
    return {"run": str(out), "family": args.family, "stage": model.kind, "parameters": count}


def _image_tokenizer(args: ImportArgs, imported: ImportedModel) -> Run | None:
    """The run of --image-tokenizer. Raises ValueError if it is missing, does not match, or is not needed."""
    model = imported.config
    is_needed = isinstance(model, TransformerConfig) and imported.image_tokenizer is None
    if args.image_tokenizer is None:
        if is_needed:
            raise ValueError(
                f"Expected --image-tokenizer with {model.image_vocab} codes and a grid of {model.grid} x {model.grid} "
                f"for {args.family}, whose files do not contain it, got none. Import the tokenizer first, then use "
                "--image-tokenizer RUN (docs/import.md)."
            )
        return None
    if not is_needed:
        raise ValueError(
            f"Expected no --image-tokenizer for {args.family}, whose files contain all parts, got "
            f"{args.image_tokenizer}. Remove it."
        )
    run = load_run(args.image_tokenizer)
    check_tokenizer_match(run.config.model, args.image_tokenizer, model.image_vocab, model.grid)
    return run
