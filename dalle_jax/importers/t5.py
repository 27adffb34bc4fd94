"""The encoder of Hugging Face's T5 v1.1 and Flan-T5, a part of models that encode captions with it (nn/t5.py).

A directory with config.json, spiece.model and the parameters, in one file or several. Published under Apache 2.0.
"""

from __future__ import annotations

import json
from pathlib import Path

from dalle_jax.config import T5Config
from dalle_jax.importers.formats.files import read_tensor_files
from dalle_jax.importers.tensors import (
    ParamRule,
    Tensors,
    block_tensor_rules,
    check_tensors_used,
    count_layers,
    dense_tensor_rules,
    identity,
    tensor_rule,
    tensor_shape,
)
from dalle_jax.text import t5
from dalle_jax.text.tokenizers import TextTokenizer

_MODEL = "the encoder of a T5 v1.1 (Flan-T5)"
_EMBED = "shared.weight"
_TIED = "encoder.embed_tokens.weight"  # the same table; files have one of the names or both
_DECODER = ("decoder.", "lm_head.")
_BLOCK = "encoder.block.{}.layer."
_END = 1  # the piece </s>
_SETTINGS = {  # the architecture of nn/t5.py
    "feed_forward_proj": "gated-gelu",
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "eos_token_id": _END,
}


def read_t5_encoder(path: Path) -> Tensors:
    """Open the tensors of the encoder in a directory, with the token embeddings; the decoder is dropped.

    Raises:
      FileNotFoundError: A file is missing.
      ValueError: A file is of another model.
    """
    config = path / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"Expected a directory with config.json, spiece.model and weights of T5, got no file {config}."
        )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        values = {name: settings.get(name, expected) for name, expected in _SETTINGS.items()}
    except (ValueError, AttributeError):
        raise ValueError(
            f"Expected the configuration of a T5 as a JSON object in {config}, got other text."
        ) from None
    for name, expected in _SETTINGS.items():
        if values[name] != expected:
            raise ValueError(f"{config}: Expected {name} to be {expected!r}, got {values[name]!r}.")
    tensors = read_tensor_files(path)
    if _TIED in tensors:
        tensors.setdefault(_EMBED, tensors[_TIED])
    return {n: tensor for n, tensor in tensors.items() if n != _TIED and not n.startswith(_DECODER)}


def from_tensors(
    path: Path, tensors: Tensors, prefix: str = ""
) -> tuple[T5Config, int, dict[str, ParamRule]]:
    """Return the configuration, the vocabulary size and the rules of the encoder of all `tensors`.

    Args:
      path: The directory, for error messages.
      tensors: The tensors of the encoder.
      prefix: A prefix of all tensor names in the rules.

    Raises:
      ValueError: It lists the tensors that are missing or unknown.
    """

    def shape(name: str) -> tuple[int, ...]:
        return tensor_shape(tensors, name, path, 2, _MODEL)

    vocab, dim = shape(_EMBED)
    relative = _BLOCK.format(0) + "0.SelfAttention.relative_attention_bias.weight"
    buckets, heads = shape(relative)
    config = T5Config(
        dim=dim,
        layers=count_layers(tensors, _BLOCK + "0.layer_norm.weight"),
        heads=heads,
        mlp_width=shape(_BLOCK.format(0) + "1.DenseReluDense.wi_0.weight")[0],
        num_relative_buckets=buckets,
        eos_id=_END,
    )
    check_tensors_used(_rules(config, relative, ""), tensors, path, _MODEL)
    return config, vocab, _rules(config, relative, prefix)


def read_t5_tokenizer(path: Path, vocab: int) -> str:
    """Return spiece.model of the directory as the content of a text tokenizer file.

    Raises:
      FileNotFoundError: The file is missing.
      ValueError: It is no vocabulary, or has more than `vocab` pieces.
    """
    file = path / "spiece.model"
    if not file.is_file():
        raise FileNotFoundError(f"Expected the vocabulary of the T5 beside its weights, got no file {file}.")
    data = file.read_bytes()
    text = t5.serialize_t5(data, _END).decode()
    try:
        pieces = TextTokenizer(text.encode()).vocab_size
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if pieces > vocab:
        raise ValueError(
            f"Expected a vocabulary of at most {vocab} pieces, the size of the T5, got {pieces} in {file}."
        )
    return text


def _rules(cfg: T5Config, relative: str, prefix: str) -> dict[str, ParamRule]:
    block = prefix + _BLOCK
    table = {
        "norm_attn/scale": (f"{block}0.layer_norm.weight", identity),
        "norm_mlp/scale": (f"{block}1.layer_norm.weight", identity),
    }
    for name, source in {"q": "q", "k": "k", "v": "v", "out": "o"}.items():
        table |= dense_tensor_rules(f"attn/{name}", f"{block}0.SelfAttention.{source}", bias=False)
    for name, source in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
        table |= dense_tensor_rules(f"mlp/{name}", f"{block}1.DenseReluDense.{source}", bias=False)
    return {
        "embed": tensor_rule(prefix + _EMBED, identity),
        "relative": tensor_rule(prefix + relative, identity),
        "norm_out/scale": tensor_rule(f"{prefix}encoder.final_layer_norm.weight", identity),
        **block_tensor_rules(cfg.layers, table),
    }
