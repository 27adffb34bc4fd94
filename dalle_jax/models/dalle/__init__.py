"""The autoregressive Transformer of DALL-E over text and image tokens (Ramesh et al. 2021, 2102.12092, 2.2, B).

One stream: `text_len` text tokens, then the codes of the picture in raster order; each position predicts the
next. Text ids lie in [0, text_vocab) for pieces and at text_vocab + i for the pad token of position i, which has
a row of its own in the text embedding, or is `pad_id`. Training scans over the layers; sampling runs them one
by one, each with its KV cache. The choices of `DalleConfig` cover minDALL-E, ruDALL-E and LlamaGen too.

With a `text_encoder` (nn/t5.py), which is frozen, captions of n pieces stand at the last n of the text positions, and
the others are not seen. A null caption has a length, too, and learned vectors in place of what the encoder makes: one
that guides a caption is as long as that. In text ids it is a row without a piece that ends in text_vocab + n - 1.
Parameters, scores and loss: model.py; sampling over caches: decoding.py; the ends that both share: stream.py.
"""

from dalle_jax.models.dalle.decoding import (
    DalleCache,
    commit_drafts,
    decode_drafts,
    decode_step,
    init_cache,
    insert_into_cache,
    prefill,
    resize_cache,
)
from dalle_jax.models.dalle.embedding import Params, null_text, null_texts
from dalle_jax.models.dalle.model import check_dalle_mesh, hidden, init, layer_masks, logits, loss

__all__ = [
    "DalleCache",
    "Params",
    "check_dalle_mesh",
    "commit_drafts",
    "decode_drafts",
    "decode_step",
    "hidden",
    "init",
    "init_cache",
    "insert_into_cache",
    "layer_masks",
    "logits",
    "loss",
    "null_text",
    "null_texts",
    "prefill",
    "resize_cache",
]
