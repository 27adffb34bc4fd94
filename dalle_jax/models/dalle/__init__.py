"""The autoregressive Transformer of DALL-E over text and image tokens (Ramesh et al. 2021, 2102.12092, 2.2 and B).

One stream: `text_len` text tokens, then the image tokens in raster order; each position predicts the next token. Text
ids lie in [0, text_vocab) for the pieces of the text tokenizer. The pad token of text position i has the id
text_vocab + i; it has a row of its own in the text embedding, or is mapped to `pad_id`. Training scans over stacked
layers; sampling runs them one by one, each with its KV cache. `DalleConfig` covers minDALL-E, ruDALL-E and LlamaGen.

With a frozen `text_encoder` (nn/t5.py) a caption of n pieces occupies the last n text positions, and the others are
masked. Classifier-free guidance then uses a null caption of the same length, with learned vectors in place of the
encoder's output; its ids hold no piece and end in text_vocab + n - 1.

model.py: parameters, logits, loss. decoding.py: sampling over KV caches. embedding.py: what both share. flops.py: model
FLOPs.
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
from dalle_jax.models.dalle.embedding import null_text, null_texts
from dalle_jax.models.dalle.model import check_dalle_mesh, hidden_states, init, layer_masks, logits, loss

__all__ = [
    "DalleCache",
    "check_dalle_mesh",
    "commit_drafts",
    "decode_drafts",
    "decode_step",
    "hidden_states",
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
