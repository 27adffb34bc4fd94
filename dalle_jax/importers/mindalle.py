"""minDALL-E 1.3B (github.com/kakaobrain/minDALL-E): a Transformer over character-level BPE with its image tokenizer.

The sequence is 64 text tokens, among them `[PAD]`, which is attended like any other, then 256 codes; every position has
a learned embedding. Blocks are GPT-2's with the exact GELU. Published weights: CC-BY-NC-SA 4.0; code: Apache 2.0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

from dalle_jax.config import DalleConfig
from dalle_jax.importers import vqgan
from dalle_jax.importers.formats.files import read_tensor_files
from dalle_jax.importers.tensors import (
    ImportedModel,
    LazyModel,
    ParamRule,
    Tensors,
    block_tensor_rules,
    check_tensors_used,
    count_layers,
    dense_tensor_rules,
    identity,
    norm_tensor_rules,
    tensor_rule,
    tensor_shape,
    to_imported_model,
    transpose_linear,
)
from dalle_jax.text import char_bpe

_MODEL = "minDALL-E"
_FILES = (
    "config.yaml",
    "stage1_last.ckpt",
    "stage2_last.ckpt",
    "tokenizer/bpe-16k-vocab.json",
    "tokenizer/bpe-16k-merges.txt",
)


def load_params(path: Path) -> ImportedModel:
    """Open the directory that the published archive 1.3B.tar.gz unpacks to.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model.
    """
    for name in _FILES:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"Expected the directory of the unpacked 1.3B.tar.gz, got no file {path / name}."
            )
    text, pad = _vocabulary(path / _FILES[3], path / _FILES[4])
    file = path / "stage2_last.ckpt"
    model = from_tensors(
        file, read_tensor_files(file), (path / "config.yaml").read_text(encoding="utf-8"), pad
    )
    return to_imported_model(
        model,
        text_tokenizer=text.to_bytes().decode(),
        image_tokenizer=_tokenizer(path / "stage1_last.ckpt", model.config.grid),
    )


def from_tensors(path: Path, tensors: Tensors, settings: str, pad: int) -> LazyModel:
    """Return the Transformer of all `tensors`.

    Args:
      path: The file, for error messages.
      tensors: The tensors of the file.
      settings: The text of config.yaml.
      pad: The id of the piece [PAD].

    Raises:
      ValueError: It lists the tensors that are missing or unknown.
    """
    config = _config(path, tensors, settings, pad)
    rules = _rules(config)
    check_tensors_used(rules, tensors, path, _MODEL)
    return LazyModel(config, rules, tensors, path)


def _tokenizer(path: Path, grid: int) -> LazyModel:
    """The image tokenizer, for images of `grid` x `grid` codes."""
    model = vqgan.open_taming_vqgan(path)
    size = grid * model.config.downsample
    return model._replace(config=dataclasses.replace(model.config, image_size=size))


def _vocabulary(vocab: Path, merges: Path) -> tuple[char_bpe.CharBPE, int]:
    """The vocabulary, and the id of its piece for padding."""
    try:
        pieces = json.loads(vocab.read_text(encoding="utf-8"))
        lines = [line for line in merges.read_text(encoding="utf-8").split("\n") if line.strip()]
        bpe = char_bpe.char_bpe_from_vocab(
            pieces, [line for line in lines if not line.startswith("#version")]
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"Expected a character-level vocabulary in {vocab} and {merges.name}, got: {error}"
        ) from None
    if "[PAD]" not in pieces:
        raise ValueError(f"Expected a piece [PAD] for the padding of captions in {vocab}, got none.")
    return bpe, pieces["[PAD]"]


def _config(path: Path, tensors: Tensors, settings: str, pad: int) -> DalleConfig:
    def shape(name: str) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, 2, _MODEL)

    def setting(name: str) -> str | None:
        match = re.search(rf"^\s*{name}\s*:\s*(\S+)", settings, re.MULTILINE)
        return match and match[1]

    text_vocab, dim = shape("tok_emb_txt.weight")
    codes = shape("pos_emb_img.weight")[0]
    return DalleConfig(
        text_vocab=text_vocab,
        text_len=shape("pos_emb_txt.weight")[0],
        image_vocab=shape("tok_emb_img.weight")[0],
        grid=math.isqrt(codes),
        dim=dim,
        layers=count_layers(tensors, "blocks.{}.ln1.weight"),
        heads=int(setting("n_heads") or dim // 64),
        attention=("full",),
        last_attention=None,
        activation="quick-gelu" if (setting("gelu_use_approx") or "").lower() == "true" else "gelu",
        pos_embed="learned",
        pad_id=pad,
        cond_drop_prob=0.0,
    )


def _rules(cfg: DalleConfig) -> dict[str, ParamRule]:
    blocks = norm_tensor_rules("norm_attn", "blocks.{}.ln1") | norm_tensor_rules("norm_mlp", "blocks.{}.ln2")
    for name, source in {"q": "query", "k": "key", "v": "value", "out": "proj"}.items():
        blocks |= dense_tensor_rules(f"attn/{name}", f"blocks.{{}}.attn.{source}")
    blocks |= dense_tensor_rules("mlp/up", "blocks.{}.mlp.0") | dense_tensor_rules(
        "mlp/down", "blocks.{}.mlp.2"
    )
    return {
        "text_embed": tensor_rule("tok_emb_txt.weight", identity),
        "text_pos": tensor_rule("pos_emb_txt.weight", identity),
        "image_embed": tensor_rule("tok_emb_img.weight", identity),
        "image_pos": tensor_rule("pos_emb_img.weight", identity),
        "norm_out/scale": tensor_rule("ln_f.weight", identity),
        "norm_out/bias": tensor_rule("ln_f.bias", identity),
        "text_head/kernel": tensor_rule("head_txt.weight", transpose_linear),
        "image_head/kernel": tensor_rule("head_img.weight", transpose_linear),
        **block_tensor_rules(cfg.layers, blocks),
    }
