"""LlamaGen's class-conditional GPT, B to 3B (github.com/FoundationVision/LlamaGen; Sun et al. 2024, 2406.06525).

A class token, then the codes: Llama's blocks (RMS norms, gated SiLU, no biases), no embeddings of positions but rotary
ones by row and column, which make queries and keys of the class token zero. The token after the last class is the null
class of guidance, which is just our padding token of the one text position. Published under the MIT licence.
"""

from __future__ import annotations

from pathlib import Path

from dalle_jax import labels
from dalle_jax.config import DalleConfig
from dalle_jax.importers.blocks import block_rules, dense, fused
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

_ABOUT = "a class-conditional LlamaGen GPT"
_CLASSES = "cls_embedding.embedding_table.weight"
_BUFFERS = ("freqs_cis", "causal_mask", "k_cache", "v_cache")  # computed, not learned


def load(
    path: Path, text: str | None = None, heads: int | None = None, image_size: int | None = None
) -> Imported:
    """The Transformer of a published file (c2i_B_256.pt to c2i_3B_384.pt).

    text: names of the classes, one a line; without it they are called by their numbers. heads: of attention; 32 where
    the model is 3200 wide (3B), else one for every 64 channels. image_size: side of the pictures, 16 times the grid;
    384 as published for all models but those whose file name says 256.

    Raises FileNotFoundError, and ValueError for files of another model, the caption-conditional one among them.
    """
    tensors = {
        name.removeprefix("module."): tensor
        for name, tensor in read_tensors(path).items()
        if not name.endswith(_BUFFERS)
    }
    if "cls_embedding.uncond_embedding" in tensors:
        raise ValueError(
            f"{path} is LlamaGen's caption-conditional GPT (t2i): it reads features of flan-t5-xl, which this library "
            "does not compute; class-conditional files (c2i) can be imported"
        )
    size = image_size or (256 if "256" in path.name else 384)
    if size % 16:
        raise ValueError(f"--image-size is {size}; want a multiple of 16, e.g. 256 or 384")
    found = model(path, tensors, size // 16, heads)
    names = _names(text, found.config.text_vocab)
    return Imported(found, files={"text.model": names.serialized().decode()})


def model(path: Path, tensors: Tensors, grid: int, heads: int | None = None) -> Model:
    """The model that all of `tensors` make. Raises ValueError naming what is missing or too many."""
    config = _config(path, tensors, heads, grid)
    rules = _rules(config)
    check_names(rules, tensors, path, _ABOUT)
    return Model(config, rules, tensors)


def _names(text: str | None, classes: int) -> labels.Labels:
    if text is None:
        return labels.Labels([str(i) for i in range(classes)])
    if not Path(text).is_file():
        raise FileNotFoundError(f"no file {text}; want the names of the classes, one a line")
    names = Path(text).read_text(encoding="utf-8").splitlines()
    if len(names) != classes:
        raise ValueError(f"{text} has {len(names)} lines; want the names of {classes} classes, one a line")
    return labels.Labels(names)


def _config(path: Path, tensors: Tensors, heads: int | None, grid: int) -> DalleConfig:
    classes, dim = shape_of(tensors, _CLASSES, path, 2, _ABOUT)
    return DalleConfig(
        text_vocab=classes - 1,
        text_len=1,
        image_vocab=shape_of(tensors, "tok_embeddings.weight", path, 2, _ABOUT)[0],
        grid=grid,
        dim=dim,
        layers=counted(tensors, "layers.{}.attention_norm.weight"),
        heads=heads or (32 if dim == 3200 else max(1, dim // 64)),
        mlp_width=shape_of(tensors, "layers.0.feed_forward.w1.weight", path, 2, _ABOUT)[0],
        activation="swiglu",
        norm="rms",
        biases=False,
        positions="rope",
        attention=("full",),
        last_attention=None,
        text_loss_weight=0.0,
        null_rate=0.1,
    )


def _rules(cfg: DalleConfig) -> dict[str, Rule]:
    blocks = {
        "norm_attn/scale": ("layers.{}.attention_norm.weight", same),
        "norm_mlp/scale": ("layers.{}.ffn_norm.weight", same),
        **fused("layers.{}.attention.wqkv", bias=False),
    }
    for name, source in {
        "attn/out": "attention.wo",
        "mlp/gate": "feed_forward.w1",
        "mlp/up": "feed_forward.w3",
    }.items():
        blocks |= dense(name, f"layers.{{}}.{source}", bias=False)
    blocks |= dense("mlp/down", "layers.{}.feed_forward.w2", bias=False)
    return {
        "text_embed": one(_CLASSES, same),
        "image_embed": one("tok_embeddings.weight", same),
        "norm_out/scale": one("norm.weight", same),
        "image_head/kernel": one("output.weight", linear),
        **block_rules(cfg.layers, blocks),
    }
