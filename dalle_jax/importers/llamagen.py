"""LlamaGen's GPTs (github.com/FoundationVision/LlamaGen; Sun et al. 2024, 2406.06525), B to 3B on classes (c2i), XL on
captions (t2i).

The sequence is a class token, or 120 tokens of a caption, then the codes. Blocks are Llama's (RMS norms, gated SiLU, no
biases) with RoPE by row and column, which makes the queries and keys of the tokens before the codes zero. The token
after the last class is the null class of guidance: the padding token of the one text position. Captions are encoded by
flan-t5-xl, which is not in the file and becomes a part of the model. Published under the MIT license.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dalle_jax.config import DalleConfig
from dalle_jax.importers import t5 as encoders
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
    drop_buffers,
    fused_qkv_tensor_rules,
    identity,
    tensor_rule,
    tensor_shape,
    to_imported_model,
    transpose_linear,
)
from dalle_jax.text import class_labels

_MODEL = "a LlamaGen GPT"
_CLASSES = "cls_embedding.embedding_table.weight"
_NULL = "cls_embedding.uncond_embedding"  # which only the files of models on captions have
_T5 = "t5:"  # before the names of its tensors
_BUFFERS = ("freqs_cis", "causal_mask", "k_cache", "v_cache")  # computed, not learned


def load_params(
    path: Path,
    text_tokenizer: str | None = None,
    heads: int | None = None,
    image_size: int | None = None,
    t5: str | None = None,
) -> ImportedModel:
    """Open a published file (c2i_B_256.pt to c2i_3B_384.pt, t2i_XL_stage1_256.pt, t2i_XL_stage2_512.pt).

    Args:
      path: The file.
      text_tokenizer: The names of the classes, one a line; by default their numbers are their names.
      heads: The number of attention heads; by default 32 where the model is 3200 wide (3B), else one per 64 channels.
      image_size: The side of the images, 16 times the grid; by default 256 or 512 if the file name contains it, else
        384, as published.
      t5: The directory of flan-t5-xl, for a model on captions.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model, or an option does not match it.
    """
    tensors = drop_buffers(read_tensor_files(path), _BUFFERS)
    size = image_size or next((n for n in (256, 512) if str(n) in path.name), 384)
    if size % 16:
        raise ValueError(f"Expected --image-size to be a multiple of 16, got {size}. Use e.g. 256 or 384.")
    if _NULL not in tensors:
        if t5 is not None:
            raise ValueError(
                f"Expected no --t5 for a class-conditional model, got {t5} for {path}. Remove --t5."
            )
        model = from_tensors(path, tensors, size // 16, heads)
        text = _names(text_tokenizer, model.config.text_vocab).to_bytes().decode()
    else:
        if t5 is None:
            raise ValueError(
                f"Expected --t5 DIR for the text-conditional model {path}, got none. "
                "Use the directory of google/flan-t5-xl with "
                "config.json, spiece.model and weights."
            )
        if text_tokenizer is not None:
            raise ValueError(
                f"Expected no --text-tokenizer for a text-conditional model, got {text_tokenizer}. "
                "Remove it: the vocabulary is that of --t5."
            )
        model = from_t2i_tensors(
            path, tensors, Path(t5), encoders.read_t5_encoder(Path(t5)), size // 16, heads
        )
        text = encoders.read_t5_tokenizer(Path(t5), model.config.text_vocab)
    return to_imported_model(model, text_tokenizer=text)


def from_tensors(path: Path, tensors: Tensors, grid: int, heads: int | None = None) -> LazyModel:
    """Return the class-conditional model of all `tensors`. Raises ValueError, listing missing or unknown ones."""
    classes, dim = tensor_shape(tensors, _CLASSES, path, 2, _MODEL)
    config = _config(path, tensors, dim, heads, grid, text_vocab=classes - 1, text_len=1)
    rules = _rules(config) | {"text_embed": tensor_rule(_CLASSES, identity)}
    check_tensors_used(rules, tensors, path, _MODEL)
    return LazyModel(config, rules, tensors, path)


def from_t2i_tensors(
    path: Path, tensors: Tensors, t5_path: Path, t5_tensors: Tensors, grid: int, heads: int | None = None
) -> LazyModel:
    """Return the text-conditional model of all `tensors`, with the encoder of all `t5_tensors`.

    Raises:
      ValueError: It lists the tensors that are missing or unknown, or the width of the encoder differs.
    """
    length, width = tensor_shape(tensors, _NULL, path, 2, _MODEL)
    encoder, vocab, t5_rules = encoders.from_tensors(t5_path, t5_tensors, _T5)
    if encoder.dim != width:
        raise ValueError(
            f"Expected a T5 of width {width} for {path}, got width {encoder.dim} in {t5_path}. Use flan-t5-xl."
        )
    dim = tensor_shape(tensors, "cls_embedding.cap_proj.fc2.weight", path, 2, _MODEL)[0]
    config = _config(path, tensors, dim, heads, grid, text_vocab=vocab, text_len=length, text_encoder=encoder)
    rules = _rules(config) | {
        "text_null": tensor_rule(_NULL, identity),
        "text_proj/up/kernel": tensor_rule("cls_embedding.cap_proj.fc1.weight", transpose_linear),
        "text_proj/down/kernel": tensor_rule("cls_embedding.cap_proj.fc2.weight", transpose_linear),
    }
    check_tensors_used(rules, tensors, path, _MODEL)
    rules |= {f"t5/{name}": rule for name, rule in t5_rules.items()}
    tensors = tensors | {_T5 + name: tensor for name, tensor in t5_tensors.items()}
    return LazyModel(config, rules, tensors, path)


def _names(text_tokenizer: str | None, classes: int) -> class_labels.ClassLabelTokenizer:
    if text_tokenizer is None:
        return class_labels.ClassLabelTokenizer([str(i) for i in range(classes)])
    if not Path(text_tokenizer).is_file():
        raise FileNotFoundError(
            f"Expected a file of class names, one per line, got no file {text_tokenizer}."
        )
    names = Path(text_tokenizer).read_text(encoding="utf-8").splitlines()
    if len(names) != classes:
        raise ValueError(
            f"Expected the names of {classes} classes in {text_tokenizer}, one per line, got {len(names)} lines."
        )
    return class_labels.ClassLabelTokenizer(names)


def _config(path: Path, tensors: Tensors, dim: int, heads: int | None, grid: int, **text: Any) -> DalleConfig:
    return DalleConfig(
        **text,
        image_vocab=tensor_shape(tensors, "tok_embeddings.weight", path, 2, _MODEL)[0],
        grid=grid,
        dim=dim,
        layers=count_layers(tensors, "layers.{}.attention_norm.weight"),
        heads=heads or (32 if dim == 3200 else max(1, dim // 64)),
        mlp_width=tensor_shape(tensors, "layers.0.feed_forward.w1.weight", path, 2, _MODEL)[0],
        activation="swiglu",
        norm="rms",
        biases=False,
        pos_embed="rope2d",
        attention=("full",),
        last_attention=None,
        text_loss_weight=0.0,
        cond_drop_prob=0.1,
    )


def _rules(cfg: DalleConfig) -> dict[str, ParamRule]:
    blocks = {
        "norm_attn/scale": ("layers.{}.attention_norm.weight", identity),
        "norm_mlp/scale": ("layers.{}.ffn_norm.weight", identity),
        **fused_qkv_tensor_rules("layers.{}.attention.wqkv", bias=False),
    }
    for name, source in {
        "attn/out": "attention.wo",
        "mlp/gate": "feed_forward.w1",
        "mlp/up": "feed_forward.w3",
    }.items():
        blocks |= dense_tensor_rules(name, f"layers.{{}}.{source}", bias=False)
    blocks |= dense_tensor_rules("mlp/down", "layers.{}.feed_forward.w2", bias=False)
    return {
        "image_embed": tensor_rule("tok_embeddings.weight", identity),
        "norm_out/scale": tensor_rule("norm.weight", identity),
        "image_head/kernel": tensor_rule("output.weight", transpose_linear),
        **block_tensor_rules(cfg.layers, blocks),
    }
