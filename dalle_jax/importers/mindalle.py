"""minDALL-E 1.3B (github.com/kakaobrain/minDALL-E): a Transformer over character-level BPE with its image tokenizer.

The stream is plain: 64 text tokens, `[PAD]` among them and seen like any, then 256 codes, each position with a learned
embedding of its own; blocks are GPT-2's with the exact GELU. Published weights: CC-BY-NC-SA 4.0; code: Apache 2.0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

from dalle_jax import character_pairs
from dalle_jax.config import DalleConfig
from dalle_jax.importers import vqgan
from dalle_jax.importers.blocks import block_rules, dense, norm
from dalle_jax.importers.files import read_tensors
from dalle_jax.importers.tensors import (
    Imported,
    Model,
    Rule,
    Tensors,
    check_names,
    counted,
    linear,
    one,
    same,
    shape_of,
)

_ABOUT = "minDALL-E"
_FILES = (
    "config.yaml",
    "stage1_last.ckpt",
    "stage2_last.ckpt",
    "tokenizer/bpe-16k-vocab.json",
    "tokenizer/bpe-16k-merges.txt",
)


def load(path: Path) -> Imported:
    """The directory that the published archive 1.3B.tar.gz unpacks to.

    Raises FileNotFoundError, and ValueError for files of another model.
    """
    for name in _FILES:
        if not (path / name).is_file():
            raise FileNotFoundError(f"no file {path / name}; want the directory of the unpacked 1.3B.tar.gz")
    text, pad = _vocabulary(path / _FILES[3], path / _FILES[4])
    file = path / "stage2_last.ckpt"
    found = model(file, read_tensors(file), (path / "config.yaml").read_text(encoding="utf-8"), pad)
    return Imported(
        found,
        files={"text.model": text.serialized().decode()},
        tokenizer=_tokenizer(path / "stage1_last.ckpt", found.config.grid),
    )


def model(path: Path, tensors: Tensors, settings: str, pad: int) -> Model:
    """The Transformer that all of `tensors` make. settings: the text of config.yaml. pad: id of the piece [PAD].

    Raises ValueError naming what is missing or too many."""
    config = _config(path, tensors, settings, pad)
    rules = _rules(config)
    check_names(rules, tensors, path, _ABOUT)
    return Model(config, rules, tensors)


def _tokenizer(path: Path, grid: int) -> Model:
    """The first stage, for pictures whose codes fill the grid."""
    found = vqgan.taming(path).model
    size = grid * found.config.downsample
    return found._replace(config=dataclasses.replace(found.config, image_size=size))


def _vocabulary(vocab: Path, merges: Path) -> tuple[character_pairs.CharacterPairs, int]:
    """The vocabulary, and the id of its piece for padding."""
    try:
        pieces = json.loads(vocab.read_text(encoding="utf-8"))
        lines = [line for line in merges.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = character_pairs.char_bpe(pieces, [line for line in lines if not line.startswith("#version")])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{vocab} with {merges.name} is no character-level vocabulary: {error}") from None
    if "[PAD]" not in pieces:
        raise ValueError(f"{vocab} has no piece [PAD], which stands after every caption")
    return found, pieces["[PAD]"]


def _config(path: Path, tensors: Tensors, settings: str, pad: int) -> DalleConfig:
    def shape(name: str) -> tuple[int, ...]:
        return shape_of(tensors, name, path, 2, _ABOUT)

    def setting(name: str) -> str | None:
        found = re.search(rf"^\s*{name}\s*:\s*(\S+)", settings, re.MULTILINE)
        return found and found[1]

    text_vocab, dim = shape("tok_emb_txt.weight")
    codes = shape("pos_emb_img.weight")[0]
    return DalleConfig(
        text_vocab=text_vocab,
        text_len=shape("pos_emb_txt.weight")[0],
        image_vocab=shape("tok_emb_img.weight")[0],
        grid=math.isqrt(codes),
        dim=dim,
        layers=counted(tensors, "blocks.{}.ln1.weight"),
        heads=int(setting("n_heads") or dim // 64),
        attention=("full",),
        last_attention=None,
        activation="quick-gelu" if (setting("gelu_use_approx") or "").lower() == "true" else "gelu",
        positions="raster",
        pad_piece=pad,
        null_rate=0.0,
    )


def _rules(cfg: DalleConfig) -> dict[str, Rule]:
    blocks = norm("norm_attn", "blocks.{}.ln1") | norm("norm_mlp", "blocks.{}.ln2")
    for name, source in {"q": "query", "k": "key", "v": "value", "out": "proj"}.items():
        blocks |= dense(f"attn/{name}", f"blocks.{{}}.attn.{source}")
    blocks |= dense("mlp/up", "blocks.{}.mlp.0") | dense("mlp/down", "blocks.{}.mlp.2")
    return {
        "text_embed": one("tok_emb_txt.weight", same),
        "text_pos": one("pos_emb_txt.weight", same),
        "image_embed": one("tok_emb_img.weight", same),
        "image_pos": one("pos_emb_img.weight", same),
        "norm_out/scale": one("ln_f.weight", same),
        "norm_out/bias": one("ln_f.bias", same),
        "text_head/kernel": one("head_txt.weight", linear),
        "image_head/kernel": one("head_img.weight", linear),
        **block_rules(cfg.layers, blocks),
    }
