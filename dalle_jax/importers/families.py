"""The families of public checkpoints that can be imported."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dalle_jax.importers.tensors import ImportedRun

FAMILIES = {  # family: (module, and its function where that is not `load_params`, of the path and options; one line of help)
    "openai-dvae": ("openai_dvae", "OpenAI's dVAE: a directory with encoder.pkl and decoder.pkl"),
    "taming-vqgan": (
        "vqgan:taming",
        "taming-transformers' VQGAN: a Lightning checkpoint, codebook or Gumbel",
    ),
    "flax-vqgan": ("vqgan:flax", "DALL-E Mini's VQGAN: flax_model.msgpack or its directory"),
    "llamagen-vq": ("vqgan:llamagen", "LlamaGen's tokenizers: vq_ds16_*.pt, vq_ds8_c2i.pt"),
    "clip": ("clip", "CLIP with a ViT: OpenAI's ViT-*.pt, or the directory or file of a Hugging Face model"),
    "mindalle": ("mindalle", "minDALL-E 1.3B: the directory of the unpacked 1.3B.tar.gz"),
    "rudalle": ("rudalle", "ruDALL-E Malevich, Emojich, Surrealist, Kandinsky: pytorch_model*.bin"),
    "llamagen": ("llamagen", "LlamaGen's GPT on classes, B to 3B, or captions, XL: c2i_*.pt, t2i_*.pt"),
    "dalle-mini": ("dalle_mini", "DALL-E Mini and Mega: a directory with flax_model.msgpack"),
}


def load_family(family: str, path: Path, **options: Any) -> ImportedRun:
    """The model that `path` holds, its tensors not yet read.

    options: those that are None are left to the family. Raises ValueError for a family that is not known, an option
    that it does not have, and files that are not of it; FileNotFoundError.
    """
    if family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=1)
        hint = f"perhaps you meant {near[0]!r}" if near else f"want one of {', '.join(FAMILIES)}"
        raise ValueError(f"no family {family!r}; {hint}")
    module, _, function = FAMILIES[family][0].partition(":")
    found: Callable[..., ImportedRun] = getattr(
        importlib.import_module(f"{__package__}.{module}"), function or "load_params"
    )
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in found.__code__.co_varnames[: found.__code__.co_argcount]:
            raise ValueError(f"--{name.replace('_', '-')} is not for the family {family}; leave it out")
    return found(path, **given)
