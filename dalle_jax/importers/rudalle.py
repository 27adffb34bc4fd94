"""ruDALL-E (github.com/ai-forever/ru-dalle): Malevich, Emojich, Surrealist and Kandinsky, of one architecture.

The paper's Transformer with its row, column and conv layers, norms before and after each branch (Ding et al. 2021,
2105.13290), a second norm before the logits, and biases everywhere. The reference program treats two versions of the
weights differently: v3 clamps the conv window at the border; v2 wraps it around both edges, adds another begin token
before the caption, and does not shift the masks, so that they treat the last text token as the first image token.
Published under Apache 2.0.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from dalle_jax.config import DalleConfig
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
    norm_tensor_rules,
    tensor_rule,
    tensor_shape,
    to_imported_model,
    transpose_linear,
)
from dalle_jax.text import char_bpe

_MODEL = "ruDALL-E"
_BEGIN = 2  # the piece that v2 adds before captions again
_VERSIONS = ("v2", "v3")


def load_params(
    path: Path, text_tokenizer: str | None = None, version: str | None = None, heads: int | None = None
) -> ImportedModel:
    """Open a published file.

    Args:
      path: The file.
      text_tokenizer: The file bpe.model.
      version: `v2` or `v3`; by default as the published file names of Malevich contain it.
      heads: The number of attention heads; by default 16 of 128 channels at the width of Malevich, else of 64 channels.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model, or the version is unknown.
    """
    if text_tokenizer is None:
        raise ValueError(
            "Expected --text-tokenizer for ruDALL-E, got none. Use the bpe.model of shonenkov/rudalle-utils."
        )
    if not Path(text_tokenizer).is_file():
        raise FileNotFoundError(
            f"Expected the bpe.model of shonenkov/rudalle-utils, got no file {text_tokenizer}."
        )
    version = version or next((v for v in _VERSIONS if v in path.name), None)
    if version not in _VERSIONS:
        raise ValueError(
            f"Expected a version in the name of the file, got {path.name}. "
            "Use --version v3 (Malevich_v3, Surrealist, Kandinsky) or "
            "--version v2 (Malevich_v2, Emojich)."
        )
    tensors = drop_buffers(read_tensor_files(path), ("row_mask", "col_mask", "conv_mask"))
    model = from_tensors(path, tensors, version, heads)
    try:
        lines = Path(text_tokenizer).read_text(encoding="utf-8")
        pieces = char_bpe.char_bpe_from_youtokentome(lines, num_bos=2 if version == "v2" else 1)
    except ValueError as error:
        raise ValueError(f"{text_tokenizer}: {error}") from None
    return to_imported_model(model, text_tokenizer=pieces.to_bytes().decode())


def from_tensors(path: Path, tensors: Tensors, version: str, heads: int | None = None) -> LazyModel:
    """Return the model of all `tensors`. Raises ValueError, listing the tensors that are missing or unknown."""
    config = _config(path, tensors, version, heads)
    rules = _rules(config)
    check_tensors_used(rules, tensors, path, _MODEL)
    return LazyModel(config, rules, tensors, path)


def _config(path: Path, tensors: Tensors, version: str, heads: int | None) -> DalleConfig:
    def shape(name: str) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, 2, _MODEL)

    text_rows, dim = shape("text_embeddings.weight")
    positions = shape("text_pos_embeddings.weight")[0]  # one more than captions have tokens
    return DalleConfig(
        text_vocab=text_rows - (positions - 1),
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
        norm_tensor_rules("norm_attn", f"{layer}input_layernorm")
        | norm_tensor_rules("norm_attn_out", f"{layer}before_first_addition_layernorm")
        | norm_tensor_rules("norm_mlp", f"{layer}post_attention_layernorm")
        | norm_tensor_rules("norm_mlp_out", f"{layer}before_second_addition_layernorm")
        | fused_qkv_tensor_rules(f"{layer}attention.query_key_value")
        | dense_tensor_rules("attn/out", f"{layer}attention.dense")
        | dense_tensor_rules("mlp/up", f"{layer}mlp.dense_h_to_4h")
        | dense_tensor_rules("mlp/down", f"{layer}mlp.dense_4h_to_h")
    )
    shifted = cfg.shift_masks
    text_rows = (
        cfg.num_text_ids - shifted
    )  # rows of text in the file: its text logits, and the first of the image's
    pads = partial(_shift_pads, vocab=cfg.text_vocab) if shifted else lambda x, fill=None: x
    return {
        "text_embed": tensor_rule("text_embeddings.weight", pads),
        "text_pos": tensor_rule("text_pos_embeddings.weight", lambda x: x[: cfg.text_len]),
        "image_embed": tensor_rule("image_embeddings.weight", identity),
        "image_row": tensor_rule("image_row_embeddings.weight", identity),
        "image_col": tensor_rule("image_col_embeddings.weight", identity),
        "norm_out/scale": tensor_rule("transformer.final_layernorm.weight", identity),
        "norm_out/bias": tensor_rule("transformer.final_layernorm.bias", identity),
        "norm_head/scale": tensor_rule("to_logits.0.weight", identity),
        "norm_head/bias": tensor_rule("to_logits.0.bias", identity),
        "text_head/kernel": tensor_rule(
            "to_logits.1.weight", lambda x: transpose_linear(pads(x[:text_rows], fill=0.0))
        ),
        "text_head/bias": tensor_rule("to_logits.1.bias", lambda x: pads(x[:text_rows], fill=-1e4)),
        "image_head/kernel": tensor_rule("to_logits.1.weight", lambda x: transpose_linear(x[text_rows:])),
        "image_head/bias": tensor_rule("to_logits.1.bias", lambda x: x[text_rows:]),
        **block_tensor_rules(cfg.layers, blocks),
    }


def _shift_pads(x: np.ndarray, vocab: int, fill: float | None = None) -> np.ndarray:
    """Rows of a text table of v2, whose captions are shifted by one position while the padding tokens are not.

    So the padding token of position i is the file's of i - 1. The first position is never padding: its row is `fill` in
    the logits, which rules it out, and else the begin token, so that the null caption equals an empty text.
    """
    first = x[_BEGIN : _BEGIN + 1] if fill is None else np.full_like(x[:1], fill)
    return np.concatenate([x[:vocab], first, x[vocab:]])
