"""Model FLOPs of the DALL-E Transformer by formula: two for each weight of a matrix and token, and attention over the
full square of positions. Recomputation is not counted (Chowdhery et al. 2022, 2204.02311, B).
"""

from __future__ import annotations

from dalle_jax.config import DalleConfig


def dalle_flops(cfg: DalleConfig, rows: int, *, text_head: bool = True) -> float:
    """Return the FLOPs of one forward pass over `rows` rows of the whole stream, without the text encoder.

    Args:
      text_head: count the text head at every text position; sampling does not compute it.
    """
    matrices = 3 if cfg.activation == "swiglu" else 2
    block = 4 * cfg.dim**2 + matrices * cfg.dim * cfg.mlp_dim
    attention = 2 * cfg.seq_len * cfg.dim  # scores and weighted values, per position
    per_token = cfg.layers * (block + attention)
    text = cfg.num_text_ids if text_head and cfg.text_loss_weight > 0 else 0
    heads = cfg.text_len * text + cfg.num_codes * cfg.image_vocab
    if cfg.text_encoder is not None:  # the projection of encoded captions to the width of the stream
        heads += cfg.text_len * (cfg.text_encoder.dim + cfg.dim)
    return 2.0 * rows * (cfg.seq_len * per_token + cfg.dim * heads)


def encoder_flops(cfg: DalleConfig, rows: int) -> float:
    """Return the FLOPs of the frozen text encoder over `rows` captions; 0 without one."""
    if (encoder := cfg.text_encoder) is None:
        return 0.0
    block = 4 * encoder.dim**2 + 3 * encoder.dim * encoder.mlp_width + 2 * cfg.text_len * encoder.dim
    return 2.0 * rows * cfg.text_len * encoder.layers * block


def dalle_train_flops(cfg: DalleConfig, rows: int) -> float:
    """Return the FLOPs of one training step: the backward pass counts twice, and never enters the text encoder."""
    return 3 * dalle_flops(cfg, rows) + encoder_flops(cfg, rows)
