"""CLIP (2103.00020): OpenAI's archives (`ViT-B-32.pt`: TorchScript or a state dict) and Hugging Face's models.

Both hold the same arrays under different names and layouts: OpenAI has query, key and value in one matrix and
multiplies by its projections from the right; Hugging Face has a Linear for each.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

from dalle_jax.config import ClipConfig, TowerConfig
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
    fused_qkv_tensor_rules,
    identity,
    norm_tensor_rules,
    tensor_rule,
    tensor_shape,
    to_imported_model,
    transpose_conv,
    transpose_linear,
)
from dalle_jax.text import byte_bpe

_HEAD_DIM = 64  # in every published model
_MODEL = "CLIP"

# No parameters: sizes that OpenAI keeps as tensors; the causal mask and positions 0, 1, ... as buffers.
_SIZES = ("input_resolution", "context_length", "vocab_size")
_BUFFERS = (".attn_mask", ".position_ids", ".causal_mask")
_ACTIVATIONS: dict[str, Literal["quick-gelu", "gelu"]] = {"quick_gelu": "quick-gelu", "gelu": "gelu"}


def load_params(path: Path, text_tokenizer: str | None = None) -> ImportedModel:
    """Open a file, or the directory of a Hugging Face model, whose config.json gives heads and activation.

    Args:
      path: The file or directory.
      text_tokenizer: The vocabulary, `bpe_simple_vocab_16e6.txt.gz` or vocab.json beside merges.txt; by default those
        of the directory. Without one the model cannot encode captions.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model.
    """
    model, content = from_tensors(path, read_tensor_files(path)), None
    if text_tokenizer is None and (path / "vocab.json").is_file():
        text_tokenizer = str(path)
    if text_tokenizer is not None:
        bpe = byte_bpe.load_byte_bpe(Path(text_tokenizer))
        if bpe is None:
            raise ValueError(
                f"Expected --text-tokenizer bpe_simple_vocab_16e6.txt.gz or vocab.json of CLIP, got {text_tokenizer}."
            )
        if bpe.vocab_size > model.config.text_vocab:
            raise ValueError(
                f"Expected --text-tokenizer of {model.config.text_vocab} pieces, the size of the model, "
                f"got {bpe.vocab_size} in {text_tokenizer}."
            )
        content = bpe.to_bytes().decode()
    return to_imported_model(model, content)


def from_tensors(path: Path, tensors: Tensors) -> LazyModel:
    """Return the model of all `tensors`. Raises ValueError, listing the tensors that are missing or unknown."""
    tensors = {
        name: tensor for name, tensor in tensors.items() if name not in _SIZES and not name.endswith(_BUFFERS)
    }
    if "visual.conv1.weight" in tensors:
        config, rules = _openai(path, tensors)
    elif "visual.layer1.0.conv1.weight" in tensors:
        raise ValueError(f"Expected a CLIP with a vision Transformer, got one with a ResNet: {path}")
    else:
        config, rules = _hugging_face(path, tensors)
    check_tensors_used(rules, tensors, path, _MODEL)
    return LazyModel(config, rules, tensors, path)


def _config(
    path: Path,
    patch: tuple[int, ...],
    positions: int,
    towers: tuple[TowerConfig, TowerConfig],
    text: tuple[int, int],
    embed_dim: int,
    activation: Literal["quick-gelu", "gelu"] = "quick-gelu",
) -> ClipConfig:
    side = math.isqrt(positions - 1)
    if side * side != positions - 1 or patch[2] != patch[3]:
        raise ValueError(
            f"{path}: Expected a square of square patches, got {positions} positions and patches of {patch[2:]}."
        )
    return ClipConfig(
        image_size=side * patch[2], patch_size=patch[2], vision=towers[0], text=towers[1], text_vocab=text[0],
        text_len=text[1], embed_dim=embed_dim, activation=activation, dtype="float32",
    )  # fmt: skip


# --- OpenAI ----------------------------------------------------------------------------------------------


def _openai(path: Path, tensors: Tensors) -> tuple[ClipConfig, dict[str, ParamRule]]:
    def shape(name: str, ndim: int) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, ndim, _MODEL)

    def tower(prefix: str, dim: int) -> TowerConfig:
        blocks = prefix + "transformer.resblocks.{}."
        wide = shape(blocks.format(0) + "mlp.c_fc.weight", 2)[0]
        return _tower(path, dim, count_layers(tensors, blocks + "ln_1.weight"), None, wide)

    patch, vocab = shape("visual.conv1.weight", 4), shape("token_embedding.weight", 2)
    towers = tower("visual.", patch[0]), tower("", vocab[1])
    config = _config(
        path, patch, shape("visual.positional_embedding", 2)[0], towers,
        (vocab[0], shape("positional_embedding", 2)[0]), shape("text_projection", 2)[1],
    )  # fmt: skip
    rules = {
        "logit_scale": tensor_rule("logit_scale", identity),
        "vision/patch/kernel": tensor_rule("visual.conv1.weight", transpose_conv),
        "vision/class_embed": tensor_rule("visual.class_embedding", identity),
        "vision/pos": tensor_rule("visual.positional_embedding", identity),
        "vision/proj/kernel": tensor_rule("visual.proj", identity),
        **_norm("vision/norm_in", "visual.ln_pre"),
        **_norm("vision/norm_out", "visual.ln_post"),
        "text/embed": tensor_rule("token_embedding.weight", identity),
        "text/pos": tensor_rule("positional_embedding", identity),
        "text/proj/kernel": tensor_rule("text_projection", identity),
        **_norm("text/norm_out", "ln_final"),
    }
    for to, prefix, cfg in (("vision", "visual.", config.vision), ("text", "", config.text)):
        block = prefix + "transformer.resblocks.{}."
        table = fused_qkv_tensor_rules(block + "attn.in_proj", join="_") | dense_tensor_rules(
            "attn/out", block + "attn.out_proj"
        )
        table |= dense_tensor_rules("mlp/up", block + "mlp.c_fc") | dense_tensor_rules(
            "mlp/down", block + "mlp.c_proj"
        )
        table |= norm_tensor_rules("norm_attn", block + "ln_1") | norm_tensor_rules(
            "norm_mlp", block + "ln_2"
        )
        rules |= block_tensor_rules(cfg.layers, table, f"{to}/blocks")
    return config, rules


# --- Hugging Face ----------------------------------------------------------------------------------------


def _hugging_face(path: Path, tensors: Tensors) -> tuple[ClipConfig, dict[str, ParamRule]]:
    settings = _settings(path)

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, ndim, _MODEL)

    def tower(name: str, dim: int) -> TowerConfig:
        layers = f"{name}_model.encoder.layers."
        wide = shape(layers + "0.mlp.fc1.weight", 2)[0]
        heads = settings.get(f"{name}_config", {}).get("num_attention_heads")
        return _tower(path, dim, count_layers(tensors, layers + "{}.layer_norm1.weight"), heads, wide)

    patch = shape("vision_model.embeddings.patch_embedding.weight", 4)
    vocab = shape("text_model.embeddings.token_embedding.weight", 2)
    acts = {settings.get(f"{name}_config", {}).get("hidden_act", "quick_gelu") for name in ("vision", "text")}
    if len(acts) != 1 or not acts <= _ACTIVATIONS.keys():
        raise ValueError(
            f"{path}: Expected hidden_act to be one of {', '.join(_ACTIVATIONS)}, got {', '.join(map(str, acts))}."
        )
    config = _config(
        path, patch, shape("vision_model.embeddings.position_embedding.weight", 2)[0],
        (tower("vision", patch[0]), tower("text", vocab[1])),
        (vocab[0], shape("text_model.embeddings.position_embedding.weight", 2)[0]),
        shape("text_projection.weight", 2)[0], _ACTIVATIONS[acts.pop()],
    )  # fmt: skip
    rules = {
        "logit_scale": tensor_rule("logit_scale", identity),
        "vision/patch/kernel": tensor_rule("vision_model.embeddings.patch_embedding.weight", transpose_conv),
        "vision/class_embed": tensor_rule("vision_model.embeddings.class_embedding", identity),
        "vision/pos": tensor_rule("vision_model.embeddings.position_embedding.weight", identity),
        "vision/proj/kernel": tensor_rule("visual_projection.weight", transpose_linear),
        **_norm("vision/norm_in", "vision_model.pre_layrnorm"),  # sic
        **_norm("vision/norm_out", "vision_model.post_layernorm"),
        "text/embed": tensor_rule("text_model.embeddings.token_embedding.weight", identity),
        "text/pos": tensor_rule("text_model.embeddings.position_embedding.weight", identity),
        "text/proj/kernel": tensor_rule("text_projection.weight", transpose_linear),
        **_norm("text/norm_out", "text_model.final_layer_norm"),
    }
    for to, cfg in (("vision", config.vision), ("text", config.text)):
        block, table = f"{to}_model.encoder.layers." + "{}.", {}
        for name in ("q", "k", "v"):
            table |= dense_tensor_rules(f"attn/{name}", f"{block}self_attn.{name}_proj")
        table |= dense_tensor_rules("attn/out", block + "self_attn.out_proj")
        table |= dense_tensor_rules("mlp/up", block + "mlp.fc1") | dense_tensor_rules(
            "mlp/down", block + "mlp.fc2"
        )
        table |= norm_tensor_rules("norm_attn", block + "layer_norm1") | norm_tensor_rules(
            "norm_mlp", block + "layer_norm2"
        )
        rules |= block_tensor_rules(cfg.layers, table, f"{to}/blocks")
    return config, rules


def _settings(path: Path) -> dict[str, Any]:
    """The sections of config.json beside the parameters; {} if there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected JSON in {file}, got: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"Expected the configuration of a CLIP in {file}, got a {type(settings).__name__}.")
    return {name: value for name, value in settings.items() if isinstance(value, dict)}


# --- both ------------------------------------------------------------------------------------------------


def _tower(path: Path, dim: int, layers: int, heads: int | None, wide: int) -> TowerConfig:
    if layers == 0 or wide % dim:
        raise ValueError(
            f"Expected {_MODEL}, got {path} with a tower of {dim} channels, {layers} layers and an MLP of {wide}."
        )
    return TowerConfig(dim=dim, layers=layers, heads=heads or max(dim // _HEAD_DIM, 1), mlp_ratio=wide // dim)


def _norm(to: str, source: str) -> dict[str, ParamRule]:
    return {
        f"{to}/scale": tensor_rule(f"{source}.weight", identity),
        f"{to}/bias": tensor_rule(f"{source}.bias", identity),
    }
