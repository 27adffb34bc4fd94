"""Attention kernels that never store the scores of all pairs, and the choice among them.

`splash` is JAX's Pallas kernel for TPU: it walks the blocks of the mask that hold anything, so the paper's row,
column and conv layers cost less than full ones. `cudnn` is the fused kernel of NVIDIA's library, which takes a mask as
a bias of one square for all rows and heads, and skips nothing of it. `dense` (attention.attend) is exact everywhere and
what the others are tested against.
FlashAttention: Dao et al. 2022, 2205.14135.
B batch, T positions (queries and keys alike), H heads, K width of a head, M different masks.
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
from dalle_jax.parallel.sharding import partition_spec

TPU_LANES = 128  # of a TPU: what the sides of splash's blocks are multiples of
RESIDUALS_NAME = (
    "attention"  # the name under which a remat policy finds what splash's backward pass needs of the forward
)


def mesh_platform() -> str:
    """`cpu`, `gpu` or `tpu`: of the mesh in force, which may be of devices that are not here; else of JAX."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def select_kernel(
    requested: AttentionKernel, kinds: Sequence[AttentionKind], length: int, dtype: str
) -> Literal["dense", "splash", "cudnn"]:
    """The kernel for layers of these kinds over `length` positions on the platform in force.

    `auto`: splash on a TPU from 128 positions on; cuDNN on a GPU where all layers are full and the dtype is
    bfloat16; else dense. Raises ValueError for `cudnn` where it cannot compute what is asked: another dtype, or a mask
    over an odd length.
    """
    full = set(kinds) == {"full"}
    match requested:
        case "auto":
            if mesh_platform() == "tpu" and length >= TPU_LANES:
                return "splash"
            return "cudnn" if mesh_platform() in ("gpu", "cuda") and full and dtype == "bfloat16" else "dense"
        case "cudnn" if dtype != "bfloat16":
            raise ValueError(
                f"attention_kernel cudnn computes in bfloat16, the model in {dtype}; take auto or dense"
            )
        case "cudnn" if not full and length % 2:
            raise ValueError(
                f"attention_kernel cudnn masks an even number of positions, here are {length} of layers that are "
                f"{', '.join(sorted(set(kinds)))}; take auto or dense, or another text_len"
            )
    return requested


def block_size(length: int) -> int:
    """Side of splash's blocks: 256 where it divides the padded length, else 128."""
    return 256 if padded_length(length) % 256 == 0 else TPU_LANES


def padded_length(length: int) -> int:
    """Positions that splash computes for `length`."""
    return -(-length // TPU_LANES) * TPU_LANES


def _padded_mask(mask_TT: np.ndarray) -> np.ndarray:
    """The mask over the padded positions, which see themselves and are seen by nobody else."""
    length = len(mask_TT)
    mask = np.eye(padded_length(length), dtype=bool)
    mask[:length, :length] = mask_TT
    return mask


def block_density(mask_TT: np.ndarray) -> float:
    """Part of the (padded) square whose blocks hold anything: what splash computes of full attention."""
    side = block_size(len(mask_TT))
    mask = _padded_mask(mask_TT)
    count = len(mask) // side
    return float(mask.reshape(count, side, count, side).any(axis=(1, 3)).mean())


def splash_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, masks_MTT: np.ndarray, mask_index: jax.Array
) -> jax.Array:
    """Softmax attention under mask number `which`, an int32 scalar, traced or not.

    Heads and rows lie over the mesh in force as everywhere; each device runs the kernel on its own. On a CPU the
    kernel is interpreted, which is exact and slow. The backward pass runs the forward kernel again. Returns
    (B, T, H, K) in the dtype of `v`.
    """
    length, width = q_BTHK.shape[1], q_BTHK.shape[3]
    interpret = mesh_platform() == "cpu"
    pads = ((0, 0), (0, padded_length(length) - length), (0, 0), (0, 0))

    def switch(do, which, *x_BTHK):
        """`do` with the kernel of mask `which` on arrays (B, H, T, K) of whole blocks; what it returns, cut again."""
        # Built here, where they are constants of the traced program: one set of kernels per mask.
        branches = [functools.partial(do, _kernel(m, x_BTHK[0].shape[2], interpret)) for m in masks_MTT]
        x_BHTK = [jnp.pad(x, pads).swapaxes(1, 2) for x in x_BTHK]
        y = branches[0](*x_BHTK) if len(branches) == 1 else jax.lax.switch(which, branches, *x_BHTK)
        return jax.tree.map(lambda y_BHTK: y_BHTK.swapaxes(1, 2)[:, :length], y)

    def over_mesh(do, outputs, which, *x_BTHK):
        run, mesh = functools.partial(switch, do), jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            spec = partition_spec(mesh, ("batch", None, "heads", None), x_BTHK[0].shape)
            # Pallas calls say nothing about which mesh axes their results vary over: that is not checked.
            specs = (PartitionSpec(), *[spec] * len(x_BTHK))
            out = spec if outputs == 1 else (spec,) * outputs
            run = jax.shard_map(run, in_specs=specs, out_specs=out, check_vma=False)
        return run(which, *x_BTHK)

    def forward(kernel, q, k, v):
        return jax.vmap(kernel)(q, k, v)

    def backward(kernel, q, k, v, gradient):
        return jax.vjp(jax.vmap(kernel), q, k, v)[1](gradient)

    # Were the switch differentiated as it stands, what each kernel keeps would leave it as its result: copies of
    # queries, keys and values in another layout and back, dearer than the forward kernel.
    @jax.custom_vjp
    def attend(which, q, k, v):
        return over_mesh(forward, 1, which, q, k, v)

    def attend_backward(kept, gradient):
        return (None, *over_mesh(backward, 3, *kept, gradient))

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
        # Positions along the lanes: heads of 64 would fill half of them, and the copy that puts them there
        # costs as much as a projection.
        q_layout=minor, k_layout=minor, v_layout=minor,
    )  # fmt: skip
    mask = library.MultiHeadMask([library.NumpyMask(_padded_mask(mask_TT))] * heads)
    return library.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


def cudnn_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, mask_TT: jax.Array | None = None
) -> jax.Array:
    """Attention by cuDNN, bfloat16, under a mask, or full and causal. Returns (B, T, H, K)."""
    mask = None if mask_TT is None else mask_TT[None, None]
    return jax.nn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHK, mask=mask, is_causal=mask is None, implementation="cudnn"
    )
