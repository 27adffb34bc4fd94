"""Public checkpoints of other code bases: their files to `(config, params)` in memory, without torch.

    model = load_params("clip", "ViT-B-32.pt")          # or "clip", Path("clip-vit-base-patch32")
    vectors = dalle_jax.clip.encode_image(model.config, model.params, images)

`FAMILIES` lists what can be read; docs/import.md describes it. Heavy modules are imported with the first model.
"""

from __future__ import annotations

import difflib
import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from dalle_jax.importers.tensors import ImportedModel


class Family(NamedTuple):
    """A family of public checkpoints.

    Attributes:
      help: What its files are, one line.
      module: The module of this package that reads them.
      options: The options of its function, besides the path.
      function: `(path, **options) -> ImportedModel`.
    """

    help: str
    module: str
    options: tuple[str, ...] = ()
    function: str = "load_params"


FAMILIES = {
    "openai-dvae": Family(
        "OpenAI's dVAE: a directory with encoder.pkl and decoder.pkl", "openai_dvae", ("image_size",)
    ),
    "taming-vqgan": Family(
        "taming-transformers' VQGAN: a Lightning checkpoint, codebook or Gumbel",
        "vqgan", ("image_size", "pixel_range"), "load_taming_vqgan",
    ),
    "flax-vqgan": Family(
        "DALL-E Mini's VQGAN: flax_model.msgpack or its directory",
        "vqgan", ("image_size", "pixel_range"), "load_flax_vqgan",
    ),
    "llamagen-vq": Family(
        "LlamaGen's tokenizers: vq_ds16_*.pt, vq_ds8_c2i.pt", "vqgan", ("image_size",), "load_llamagen_vq"
    ),
    "clip": Family(
        "CLIP with a ViT: OpenAI's ViT-*.pt, or the directory or file of a Hugging Face "
        "model", "clip", ("text_tokenizer",)
    ),
    "mindalle": Family("minDALL-E 1.3B: the directory of the unpacked 1.3B.tar.gz", "mindalle"),
    "rudalle": Family(
        "ruDALL-E Malevich, Emojich, Surrealist, Kandinsky: pytorch_model*.bin",
        "rudalle", ("text_tokenizer", "version", "heads"),
    ),
    "llamagen": Family(
        "LlamaGen's GPT on classes, B to 3B, or captions, XL: c2i_*.pt, t2i_*.pt",
        "llamagen", ("text_tokenizer", "heads", "image_size", "t5"),
    ),
    "dalle-mini": Family("DALL-E Mini and Mega: a directory with flax_model.msgpack", "dalle_mini"),
}  # fmt: skip


def open_model(family: str, path: str | os.PathLike, **options: Any) -> ImportedModel:
    """Open a public checkpoint; its parameters are read when they are used.

    Args:
      family: A name in `FAMILIES`.
      path: Its file or directory.
      **options: Options of the family, as docs/import.md lists them; None is the default of the family.

    Returns:
      The model with `LazyParam`s.

    Raises:
      ValueError: The family is unknown, does not have an option, or the files are not of it.
      FileNotFoundError: A file is missing.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = repr(near[0]) if near else f"one of {', '.join(FAMILIES)}"
        raise ValueError(f"Expected a family of models, got {family!r}. Use {hint}.")
    row = FAMILIES[family]
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in row.options:
            raise ValueError(
                f"Expected no --{name.replace('_', '-')} for the family {family}, got {options[name]!r}. Remove it."
            )
    module = importlib.import_module(f"{__name__}.{row.module}")
    return getattr(module, row.function)(Path(path), **options)


def load_params(family: str, path: str | os.PathLike, **options: Any) -> ImportedModel:
    """Read a public checkpoint into memory.

    Args:
      family, path, **options: As of `open_model`.

    Returns:
      The model: `config`, `params` (nested dicts of float32 arrays), and its tokenizers.

    Raises:
      ValueError, FileNotFoundError: What `open_model` raises; ValueError for a tensor of another shape or with values
        that are not finite.
    """
    return open_model(family, path, **options).read()
