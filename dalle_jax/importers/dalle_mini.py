"""DALL-E Mini and Mega (github.com/borisdayma/dalle-mini): `flax_model.msgpack`, `config.json`, BART's vocabulary.

Only names differ from this library: kernels are (in, out), and layers are stacked, because its program scans them.
Published under Apache 2.0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dalle_jax.config import BartConfig
from dalle_jax.importers.formats.files import read_tensor_files
from dalle_jax.importers.tensors import (
    ImportedModel,
    LazyModel,
    ParamRule,
    Tensors,
    check_tensors_used,
    identity,
    tensor_rule,
    tensor_shape,
    to_imported_model,
)
from dalle_jax.text import byte_bpe
from dalle_jax.text.bart import BartTokenizer

_MODEL = "DALL-E Mini or Mega"
_FILES = ("flax_model.msgpack", "config.json", "vocab.json", "merges.txt")
# The architecture of models/bart.py: settings of config.json that must have these values.
_FIXED = {
    "ln_positions": "normformer", "ln_type": "layernorm", "use_glu": True, "use_bias": False, "force_ln_scale": False,
    "use_scan": True, "use_absolute_position_embeddings": True, "use_final_ln_encoder": True,
    "use_final_ln_decoder": True, "use_cosine_attention": False, "use_deepnet_scaling": False, "use_head_scale": False,
    "use_swin_position_embeddings": False, "tie_word_embeddings": False, "sinkhorn_iters": 1,
    "activation_function": "gelu",
}  # fmt: skip


def load_params(path: Path) -> ImportedModel:
    """Open the directory of a published model.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model.
    """
    for name in _FILES:
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"Expected a directory with {', '.join(_FILES)}, got no file {path / name}."
            )
    settings = _settings(path / "config.json")
    file = path / "flax_model.msgpack"
    tensors = read_tensor_files(file)
    text = _vocabulary(path, settings)
    config = _config(file, tensors, settings, text.vocab_size)
    rules = _rules()
    check_tensors_used(rules, tensors, file, _MODEL)
    return to_imported_model(LazyModel(config, rules, tensors, path), text_tokenizer=text.to_bytes().decode())


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected JSON in {path}, got: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"Expected the configuration of {_MODEL} in {path}, got a {type(settings).__name__}."
        )
    for name, expected in _FIXED.items():
        if settings.get(name, expected) != expected:
            raise ValueError(f"{path}: Expected {name} to be {expected!r}, got {settings[name]!r}.")
    return settings


def _vocabulary(path: Path, settings: dict[str, Any]) -> BartTokenizer:
    try:
        pairs = byte_bpe.load_byte_bpe(path / "vocab.json")
        assert pairs is not None  # load_params has found vocab.json and merges.txt
        ends = [settings.get(name, i) for name, i in (("bos_token_id", 0), ("eos_token_id", 2))]
        return BartTokenizer(pairs, *ends, normalize_captions=bool(settings.get("normalize_text", False)))
    except ValueError as error:
        raise ValueError(
            f"Expected the vocabulary of BART in {path / 'vocab.json'} and merges.txt, got: {error}"
        ) from None


def _config(path: Path, tensors: Tensors, settings: dict[str, Any], pieces: int) -> BartConfig:
    def shape(name: str, ndim: int = 2) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, ndim, _MODEL)

    text_vocab, dim = shape("model/encoder/embed_tokens/embedding")
    if pieces > text_vocab:
        raise ValueError(
            f"Expected ids below {text_vocab}, the embeddings of the model, in vocab.json of {path}, "
            f"got {pieces - 1}."
        )
    positions = shape("model/decoder/embed_positions/embedding")[0]
    layer = "{}/layers/{}/FlaxBartAttention_0/q_proj/kernel"
    start = settings.get("decoder_start_token_id", 16_384)
    return BartConfig(
        text_vocab=text_vocab,
        text_len=shape("model/encoder/embed_positions/embedding")[0],
        # Mega's table holds rows that are no codes; the tokenizer's codes end where the start token stands.
        image_vocab=min(start, settings.get("image_vocab_size", start)),
        decoder_vocab=shape("model/decoder/embed_tokens/embedding")[0],
        decoder_start_id=start,
        grid=math.isqrt(positions),
        dim=dim,
        encoder_layers=shape(layer.format("model/encoder", "FlaxBartEncoderLayers"), 3)[0],
        layers=shape(layer.format("model/decoder", "FlaxBartDecoderLayers"), 3)[0],
        heads=settings.get("encoder_attention_heads", 16),
        mlp_width=shape("model/encoder/layers/FlaxBartEncoderLayers/GLU_0/Dense_0/kernel", 3)[2],
        pad_id=settings.get("pad_token_id", 1),
        bos_id=settings.get("bos_token_id", 0),
        eos_id=settings.get("eos_token_id", 2),
    )


def _rules() -> dict[str, ParamRule]:
    rules: dict[str, ParamRule] = {"image_head/kernel": tensor_rule("lm_head/kernel", identity)}
    for ours, part, norm in (("text", "encoder", "norm_text_out"), ("image", "decoder", "norm_out")):
        rules[f"{ours}_embed"] = tensor_rule(f"model/{part}/embed_tokens/embedding", identity)
        rules[f"{ours}_pos"] = tensor_rule(f"model/{part}/embed_positions/embedding", identity)
        for kind in ("scale", "bias"):
            rules[f"{ours}_norm/{kind}"] = tensor_rule(f"model/{part}/layernorm_embedding/{kind}", identity)
        rules[f"{norm}/bias"] = tensor_rule(f"model/{part}/final_ln/bias", identity)
    for ours, part, names in (
        ("text_blocks", "encoder", ("attn",)),
        ("blocks", "decoder", ("attn", "cross")),
    ):
        layer = f"model/{part}/layers/FlaxBart{part.title()}Layers"
        for i, name in enumerate(names):
            for k in ("q", "k", "v", "out"):
                rules[f"{ours}/{name}/{k}/kernel"] = tensor_rule(
                    f"{layer}/FlaxBartAttention_{i}/{k}_proj/kernel", identity
                )
            rules[f"{ours}/norm_{name}/bias"] = tensor_rule(f"{layer}/LayerNorm_{2 * i}/bias", identity)
            for kind in ("scale", "bias"):
                rules[f"{ours}/norm_{name}_out/{kind}"] = tensor_rule(
                    f"{layer}/LayerNorm_{2 * i + 1}/{kind}", identity
                )
        rules[f"{ours}/norm_mlp/bias"] = tensor_rule(f"{layer}/GLU_0/LayerNorm_0/bias", identity)
        rules[f"{ours}/mlp/norm/bias"] = tensor_rule(f"{layer}/GLU_0/LayerNorm_1/bias", identity)
        for i, name in enumerate(("gate", "up", "down")):
            rules[f"{ours}/mlp/{name}/kernel"] = tensor_rule(f"{layer}/GLU_0/Dense_{i}/kernel", identity)
    return rules
