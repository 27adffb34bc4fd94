"""The loss computed in chunks of the vocabulary equals the loss of all logits, which it never stores."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.nn.cross_entropy import cross_entropy


def test_chunked_loss_by_hand():
    """Two tokens, three ids: -log softmax of the target."""
    x = np.array([[[1.0, 0.0], [0.0, 2.0]]], np.float32)
    kernel = np.array([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]], np.float32)
    want = np.mean([np.log(np.exp([1, 2, 3]).sum()) - 1, np.log(np.exp([0, 1, 2]).sum()) - 2])
    for chunk in (0, 1, 2):
        got = cross_entropy(x, kernel, jnp.array([[0, 2]]), dtype="float32", vocab_chunk=chunk)
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_logits_never_exist_as_a_whole():
    """No array of the compiled gradient has the size of rows x tokens x vocabulary, or half of it."""
    rows, tokens, width, vocab = 4, 8, 4, 96

    def compiled_text(chunk):
        def value(x, kernel):
            return cross_entropy(x, kernel, ids, dtype="float32", vocab_chunk=chunk)

        ids = jnp.zeros((rows, tokens), jnp.int32)
        x, kernel = jnp.zeros((rows, tokens, width)), jnp.zeros((width, vocab))
        return jax.jit(jax.grad(value, argnums=(0, 1))).lower(x, kernel).compile().as_text()

    def largest(text):
        shapes = re.findall(r"\w+\[([\d,]+)\]", text)
        return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)

    assert largest(compiled_text(0)) >= rows * tokens * vocab
    assert largest(compiled_text(16)) < rows * tokens * vocab / 2
