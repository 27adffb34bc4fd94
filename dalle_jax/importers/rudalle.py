"""ruDALL-E (github.com/ai-forever/ru-dalle): Malevich, Emojich, Surrealist and Kandinsky, of one architecture.

The paper's Transformer with the paper's row, column and conv layers, norms before and after each branch (Ding et al.
2021, 2105.13290), a second norm before the logits, and biases everywhere. Two versions of the weights differ in what
the reference program does with them: v3 clamps the conv window at the border; v2 wraps it round both edges, puts
another begin token before the caption, and leaves the masks where they were, so that they take the last text token for
the first place of the raster. Published under Apache 2.0.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from dalle_jax.config import DalleConfig
from dalle_jax.importers.formats.files import read_tensors
from dalle_jax.importers.tensors import (
    ImportedModel,
    LazyModel,
    ParamRule,
    Tensors,
    block_rules,
    check_names,
    count_layers,
    dense_rules,
    drop_buffers,
    from_tensor,
    fused_qkv_rules,
    identity,
    imported_model,
    norm_rules,
    tensor_shape,
    transpose_linear,
)
from dalle_jax.text import char_bpe

_ABOUT = "ruDALL-E"
_BEGIN = 2  # the piece that v2 puts before captions once more
_VERSIONS = ("v2", "v3")


def load_params(
    path: Path, text_tokenizer: str | None = None, version: str | None = None, heads: int | None = None
) -> ImportedModel:
    """The Transformer of a published file, with a vocabulary.

    text_tokenizer: the file bpe.model. version: v2 or v3, told by the published file names of Malevich. heads: of attention;
    16 of 128 channels where the model is as wide as Malevich, else of 64.

    Raises FileNotFoundError, and ValueError for files of another model and for a version that cannot be told.
    """
    if text_tokenizer is None:
        raise ValueError(
            "ruDALL-E needs its vocabulary: give --text-tokenizer bpe.model (of shonenkov/rudalle-utils)"
        )
    if not Path(text_tokenizer).is_file():
        raise FileNotFoundError(f"no file {text_tokenizer}; want the bpe.model of shonenkov/rudalle-utils")
    version = version or next((v for v in _VERSIONS if v in path.name), None)
    if version not in _VERSIONS:
        raise ValueError(
            f"{path.name} does not tell its version: give --version v3 (Malevich_v3, Surrealist, Kandinsky) or "
            "--version v2 (Malevich_v2, Emojich)"
        )
    tensors = drop_buffers(read_tensors(path), ("row_mask", "col_mask", "conv_mask"))
    found = from_tensors(path, tensors, version, heads)
    try:
        lines = Path(text_tokenizer).read_text(encoding="utf-8")
        pieces = char_bpe.char_bpe_from_youtokentome(lines, num_bos=2 if version == "v2" else 1)
    except ValueError as error:
        raise ValueError(f"{text_tokenizer}: {error}") from None
    return imported_model(found, text_tokenizer=pieces.to_bytes().decode())


def from_tensors(path: Path, tensors: Tensors, version: str, heads: int | None = None) -> LazyModel:
    """The model that all of `tensors` make. Raises ValueError naming what is missing or too many."""
    config = _config(path, tensors, version, heads)
    rules = _rules(config)
    check_names(rules, tensors, path, _ABOUT)
    return LazyModel(config, rules, tensors, path)


def _config(path: Path, tensors: Tensors, version: str, heads: int | None) -> DalleConfig:
    def shape(name: str) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, 2, _ABOUT)

    words, dim = shape("text_embeddings.weight")
    positions = shape("text_pos_embeddings.weight")[0]  # one more than captions have tokens
    return DalleConfig(
        text_vocab=words - (positions - 1),
        text_len=positions if version == "v2" else positions - 1,
        image_vocab=shape("image_embeddings.weight")[0],
        grid=shape("image_row_embeddings.weight")[0],
        dim=dim,
        layers=count_layers(tensors, "transformer.layers.{}.input_layernorm.weight"),
        heads=heads or (16 if dim == 2048 else max(1, dim // 64)),
        attention=("row", "column", "row", "row"),
        last_attention="conv_torus" if version == "v2" else "conv_clamped",
        shift_masks=version == "v2",
        sandwich_norm=True,
        second_final_norm=True,
        head_bias=True,
        cond_drop_prob=0.0,
    )


def _rules(cfg: DalleConfig) -> dict[str, ParamRule]:
    layer = "transformer.layers.{}."
    blocks = (
        norm_rules("norm_attn", f"{layer}input_layernorm")
        | norm_rules("norm_attn_out", f"{layer}before_first_addition_layernorm")
        | norm_rules("norm_mlp", f"{layer}post_attention_layernorm")
        | norm_rules("norm_mlp_out", f"{layer}before_second_addition_layernorm")
        | fused_qkv_rules(f"{layer}attention.query_key_value")
        | dense_rules("attn/out", f"{layer}attention.dense")
        | dense_rules("mlp/up", f"{layer}mlp.dense_h_to_4h")
        | dense_rules("mlp/down", f"{layer}mlp.dense_4h_to_h")
    )
    shifted = cfg.shift_masks
    words = (
        cfg.num_text_ids - shifted
    )  # rows of text in the file: its text logits, and the first of the image's
    pads = partial(_pads_moved, vocab=cfg.text_vocab) if shifted else lambda x, fill=None: x
    return {
        "text_embed": from_tensor("text_embeddings.weight", pads),
        "text_pos": from_tensor("text_pos_embeddings.weight", lambda x: x[: cfg.text_len]),
        "image_embed": from_tensor("image_embeddings.weight", identity),
        "image_row": from_tensor("image_row_embeddings.weight", identity),
        "image_col": from_tensor("image_col_embeddings.weight", identity),
        "norm_out/scale": from_tensor("transformer.final_layernorm.weight", identity),
        "norm_out/bias": from_tensor("transformer.final_layernorm.bias", identity),
        "norm_head/scale": from_tensor("to_logits.0.weight", identity),
        "norm_head/bias": from_tensor("to_logits.0.bias", identity),
        "text_head/kernel": from_tensor(
            "to_logits.1.weight", lambda x: transpose_linear(pads(x[:words], fill=0.0))
        ),
        "text_head/bias": from_tensor("to_logits.1.bias", lambda x: pads(x[:words], fill=-1e4)),
        "image_head/kernel": from_tensor("to_logits.1.weight", lambda x: transpose_linear(x[words:])),
        "image_head/bias": from_tensor("to_logits.1.bias", lambda x: x[words:]),
        **block_rules(cfg.layers, blocks),
    }


def _pads_moved(x: np.ndarray, vocab: int, fill: float | None = None) -> np.ndarray:
    """Rows of a text table of v2, whose captions move on by one and keep the pads that they had.

    So the pad of position i is the file's of i - 1. The first position is never a pad: its row is `fill` for logits,
    which rules it out, and without one the begin token, so that the null caption is what an empty text would be.
    """
    first = x[_BEGIN : _BEGIN + 1] if fill is None else np.full_like(x[:1], fill)
    return np.concatenate([x[:vocab], first, x[vocab:]])
