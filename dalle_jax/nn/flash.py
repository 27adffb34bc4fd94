"""Fused attention kernels that do not store the scores of all pairs (FlashAttention, Dao et al. 2022, 2205.14135).

`splash` is JAX's Pallas kernel for TPU. It computes only the blocks that the mask does not zero, so the paper's row,
column and conv layers cost less than full ones. `cudnn` is the fused kernel of NVIDIA's library; it takes the mask as a
bias of one square for all rows and heads and computes all of it. `dense` (attention.dense_attention) is exact on every
platform and the reference of the tests.
B batch, T positions of queries and keys, H heads, K width of a head, M different masks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dalle_jax.config.dalle import AttentionKernel, AttentionKind
from dalle_jax.parallel.sharding import mesh_platform, partition_spec

_TPU_LANES = 128  # the block sizes of splash are multiples of it


def select_kernel(
    requested: AttentionKernel, kinds: Sequence[AttentionKind], length: int, dtype: str
) -> Literal["dense", "splash", "cudnn"]:
    """Select the kernel of a model on the current platform.

    Args:
      requested: `auto` is splash on a TPU from 128 positions on, cuDNN on a GPU if all layers are full and the dtype is
        bfloat16, and dense otherwise.
      kinds: of all layers.
      length: T.
      dtype: compute dtype.

    Raises:
      ValueError: cuDNN does not support the dtype, or a mask over an odd length.
    """
    full = set(kinds) == {"full"}
    match requested:
        case "auto":
            if mesh_platform() == "tpu" and length >= _TPU_LANES:
                return "splash"
            return "cudnn" if mesh_platform() in ("gpu", "cuda") and full and dtype == "bfloat16" else "dense"
        case "cudnn" if dtype != "bfloat16":
            raise ValueError(
                f"Expected dtype bfloat16 for attention_kernel cudnn, got {dtype}. Use auto or dense."
            )
        case "cudnn" if not full and length % 2:
            raise ValueError(
                f"Expected an even number of positions for attention_kernel cudnn with {', '.join(sorted(set(kinds)))} "
                f"layers, got {length}. Use auto or dense, or change text_len."
            )
    return requested


def block_size(length: int) -> int:
    """Return the block size of splash: 256 if it divides the padded length, else 128."""
    return 256 if padded_length(length) % 256 == 0 else _TPU_LANES


def padded_length(length: int) -> int:
    """Return the number of positions that splash computes, `length` rounded up to a multiple of 128."""
    return -(-length // _TPU_LANES) * _TPU_LANES


def _padded_mask(mask_TT: np.ndarray) -> np.ndarray:
    """Pad the mask; a padding position attends to itself, and no other position attends to it."""
    length = len(mask_TT)
    mask = np.eye(padded_length(length), dtype=bool)
    mask[:length, :length] = mask_TT
    return mask


def block_density(mask_TT: np.ndarray) -> float:
    """Return the fraction of blocks of the padded mask that are not zero, which is what splash computes."""
    side = block_size(len(mask_TT))
    mask = _padded_mask(mask_TT)
    count = len(mask) // side
    return float(mask.reshape(count, side, count, side).any(axis=(1, 3)).mean())


def splash_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    masks_MTT: np.ndarray,
    mask_index: jax.Array | int,
) -> jax.Array:
    """Compute softmax attention with JAX's splash attention kernel.

    Rows and heads are sharded over the current mesh, and each device runs the kernel on its shard. On a CPU the kernel
    is interpreted, which is exact and slow. The backward pass runs the forward kernel again.

    Args:
      q_BTHK: queries.
      k_BTHK: keys.
      v_BTHK: values.
      masks_MTT: bool, static.
      mask_index: int32 scalar, which mask applies.

    Returns:
      (B, T, H, K) in the dtype of the values.
    """
    length, width = q_BTHK.shape[1], q_BTHK.shape[3]
    interpret = mesh_platform() == "cpu"
    pads = ((0, 0), (0, padded_length(length) - length), (0, 0), (0, 0))

    def switch(kernel_fn, mask_index, *x_BTHK):
        """Call `kernel_fn` with the kernel of the mask on padded arrays (B, H, T, K), and remove the padding."""
        # The kernels are built here, where they are constants of the traced program: one set per mask.
        branches = [
            functools.partial(kernel_fn, _kernel(mask_TT, x_BTHK[0].shape[2], interpret))
            for mask_TT in masks_MTT
        ]
        x_BHTK = [jnp.pad(x, pads).swapaxes(1, 2) for x in x_BTHK]
        y = branches[0](*x_BHTK) if len(branches) == 1 else jax.lax.switch(mask_index, branches, *x_BHTK)
        return jax.tree.map(lambda y_BHTK: y_BHTK.swapaxes(1, 2)[:, :length], y)

    def over_mesh(kernel_fn, num_outputs, mask_index, *x_BTHK):
        run, mesh = functools.partial(switch, kernel_fn), jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            spec = partition_spec(mesh, ("batch", None, "heads", None), x_BTHK[0].shape)
            # Pallas calls do not declare over which mesh axes their results vary, so this is not checked.
            specs = (PartitionSpec(), *[spec] * len(x_BTHK))
            out = spec if num_outputs == 1 else (spec,) * num_outputs
            run = jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)
        return run(mask_index, *x_BTHK)

    def forward(kernel, q, k, v):
        return jax.vmap(kernel)(q, k, v)

    def backward(kernel, q, k, v, grad):
        return jax.vjp(jax.vmap(kernel), q, k, v)[1](grad)

    # If the switch itself were differentiated, the residuals of each kernel would be results of the switch: copies of
    # queries, keys and values to another layout and back, which take longer than the forward kernel.
    @jax.custom_vjp
    def attend(mask_index, q, k, v):
        return over_mesh(forward, 1, mask_index, q, k, v)

    def attend_backward(residuals, grad):
        return (None, *over_mesh(backward, 3, *residuals, grad))

    attend.defvjp(lambda *x: (attend(*x), x), attend_backward)
    return attend(jnp.asarray(mask_index), q_BTHK * (1.0 / math.sqrt(width)), k_BTHK, v_BTHK).astype(
        v_BTHK.dtype
    )


def _kernel(mask_TT: np.ndarray, heads: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    side, minor = block_size(len(mask_TT)), library.QKVLayout.SEQ_MINOR
    sizes = library.BlockSizes(
        block_q=side, block_kv=side, block_kv_compute=side, block_q_dkv=side, block_kv_dkv=side,
        block_kv_dkv_compute=side, block_q_dq=side, block_kv_dq=side,
        # Positions are along the lanes: heads of 64 would fill half of them, and the copy to that layout costs as much
        # as a projection.
        q_layout=minor, k_layout=minor, v_layout=minor,
    )  # fmt: skip
    mask = library.MultiHeadMask([library.NumpyMask(_padded_mask(mask_TT))] * heads)
    return library.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


def cudnn_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, mask_TT: jax.Array | None = None
) -> jax.Array:
    """Compute softmax attention with cuDNN's fused kernel, in bfloat16.

    Args:
      q_BTHK: queries.
      k_BTHK: keys.
      v_BTHK: values.
      mask_TT: bool; None is causal attention.

    Returns:
      (B, T, H, K).
    """
    mask = None if mask_TT is None else mask_TT[None, None]
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, mask=mask, is_causal=mask is None, implementation="cudnn"
    )
