"""The products of a decode step with few rows as single GPU kernels: norm, matrix, bias, activation, residual sum.

A step of a small batch reads every matrix once, and that is all its time should be. XLA makes two kernels of a norm,
one or two of a product, one of what follows, and each costs a launch, at batch 1 about as long as the reading
(benchmarks/RESULTS.md). Here a program makes F' outputs of all rows: it walks D, norms what comes in on the way, takes
products in the matrix units with sums in float32, and ends with what follows. Each program finds the statistics of the
norm for itself: the rows are few, and lie in the cache of the chip.

Triton, as in decode_kernel.py. Not run on a GPU yet: compiled for one, and interpreted on a CPU.
B rows, D channels in, F channels out, M matrices joined, R rows of a tile, S channels of a tile.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dalle_jax.nn.attention import GATES, Activation, Block, Look, Norm, activate, norm, ready

Params = dict[str, Any]

ROWS = 16  # R, the least that matrix units take; more than so many rows are better left to XLA
OUTPUTS, CHANNELS = 16, 512  # F' and S: 16 KiB of a matrix in bfloat16


def serves(params: Params, rows: int) -> bool:
    """Whether these kernels can take the products of a step: of few rows, with matrices by output whose inputs are not
    rounded. Elsewhere XLA does."""
    out = params["blocks"][0]["attn"]["out"]
    return rows <= ROWS and "kernel_t" in out and "scale_w8a8" not in out


def linear(
    p: Params,
    x_BD: jax.Array,
    dtype: Any,
    *,
    norm: tuple[Norm, Params, float] | None = None,
    activation: Activation | None = None,
    residual_BF: jax.Array | None = None,
    out: Any = None,
    interpret: bool = False,
) -> jax.Array | list[jax.Array]:
    """What `matrices.affine` gives of at most ROWS rows, with what stands before and after it.

    p: a matrix by output, (F, D) or joined (M, F, D), in the compute dtype or with weights in 8 bits. norm: kind,
    parameters and epsilon of one of `x_BD` before the product. activation: after it; of a gated one `p` joins the gate
    and what it gates; `gelu` is left out, as Triton has no error function. residual_BF: what is added last. Returns
    (B, F) in `out`, which is `dtype` where it is not given; of joined matrices that of each.
    """
    assert len(x_BD) <= ROWS and activation != "gelu"
    out = dtype if out is None else out
    kernel = p["kernel_t"]
    joined, (outputs, channels) = kernel.shape[:-2], kernel.shape[-2:]
    matrices = 1 if activation in GATES or not joined else joined[0]
    held = {"x": x_BD, "kernel": kernel.reshape(-1, channels)}
    held |= {name: p[name].reshape(-1) for name in ("bias", "scale") if name in p}
    if norm is not None:
        held |= {f"norm_{name}": value for name, value in norm[1].items()}
    if residual_BF is not None:
        held["residual"] = residual_BF
    how = (dtype, norm and norm[0], norm and norm[2], activation, outputs)
    y_BF = pl.pallas_call(
        functools.partial(_program, how),
        grid=(pl.cdiv(outputs, OUTPUTS), matrices),
        out_shape=[jax.ShapeDtypeStruct((len(x_BD), outputs), out)] * matrices,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="decode_linear",
    )(held)
    return y_BF if matrices > 1 else y_BF[0]


def block_step(
    block: Block, p: Params, x_B1D: jax.Array, look: Look, turns: jax.Array | None, *, interpret: bool = False
) -> tuple[jax.Array, Any]:
    """What a Block makes of one position of at most ROWS rows, its parameters as sampling on a GPU has them."""
    dense = functools.partial(linear, dtype=block.dtype, interpret=interpret)
    attn, mlp, x_BD = p["attn"], p["mlp"], x_B1D[:, 0]

    def before(name):
        return block.norm, p[name], block.epsilon

    def after(name, matrix, y_BD, x_BD):
        if not block.sandwich:
            return dense(matrix, y_BD, residual_BF=x_BD)
        own = norm(block.norm, epsilon=block.epsilon).apply({"params": p[name]}, dense(matrix, y_BD))
        return x_BD + own.astype(block.dtype)

    qkv = dense(attn["q_k_v"], x_BD, norm=before("norm_attn"))
    q, k, v = (y_BD.reshape(len(x_BD), 1, block.heads, -1) for y_BD in qkv)
    q, k = ready(attn, q, k, turns)
    y_B1HK, cache = look(q, k, v)
    x_BD = after("norm_attn_out", attn["out"], y_B1HK.reshape(x_BD.shape), x_BD)
    up, here = ("gate_up" if block.activation in GATES else "up"), block.activation != "gelu"
    y_BF = dense(mlp[up], x_BD, norm=before("norm_mlp"), activation=block.activation if here else None)
    y_BF = y_BF if here else activate(block.activation, y_BF)
    return after("norm_mlp_out", mlp["down"], y_BF, x_BD)[:, None], cache


def _program(how, held, *y_BF) -> None:
    """`held` and `y_BF`, one for each matrix, are references to whole arrays."""
    dtype, norm, epsilon, activation, outputs = how
    (rows, channels), steps = held["x"].shape, pl.cdiv(held["x"].shape[1], CHANNELS)
    first, which = pl.program_id(0) * OUTPUTS, pl.program_id(1)
    # From a traced 0: a slice that begins at a known place may not reach beyond what there is, whatever its mask.
    every, there_R = pl.ds(pl.program_id(0) * 0, ROWS), jnp.arange(ROWS) < rows
    there_F = first + jnp.arange(OUTPUTS) < outputs

    def channels_of(i):
        at = i * CHANNELS
        return pl.ds(at, CHANNELS), at + jnp.arange(CHANNELS) < channels

    def of_x(i):
        part, there_S = channels_of(i)
        return triton.load(held["x"].at[every, part], mask=there_R[:, None] & there_S[None], other=0)

    if norm is not None:

        def add(i, sums):
            x_RS = of_x(i).astype(jnp.float32)
            return sums[0] + jnp.sum(x_RS, axis=1), sums[1] + jnp.sum(x_RS * x_RS, axis=1)

        sum_R, square_R = jax.lax.fori_loop(0, steps, add, (jnp.zeros(ROWS),) * 2)
        mean_R = sum_R / channels if norm == "layer" else jnp.zeros(ROWS)
        spread_R = jax.lax.rsqrt(jnp.maximum(square_R / channels - mean_R * mean_R, 0) + epsilon)

    def normed(i):
        x_RS = of_x(i)
        if norm is not None:
            part, there_S = channels_of(i)
            x_RS = (x_RS.astype(jnp.float32) - mean_R[:, None]) * spread_R[:, None]
            x_RS = x_RS * triton.load(held["norm_scale"].at[part], mask=there_S, other=0)[None]
            if "norm_bias" in held:
                x_RS = x_RS + triton.load(held["norm_bias"].at[part], mask=there_S, other=0)[None]
        return x_RS.astype(dtype)

    def product(offset):
        """Of the matrix whose outputs begin at `offset`, (R, F'), with its bias."""
        mine = pl.ds(offset + first, OUTPUTS)

        def add(i, y_RF):
            part, there_S = channels_of(i)
            mask = there_F[:, None] & there_S[None]
            w_FS = triton.load(held["kernel"].at[mine, part], mask=mask, other=0.0).astype(dtype)
            return y_RF + triton.dot(normed(i), w_FS, trans_b=True, allow_tf32=False)

        y_RF = jax.lax.fori_loop(0, steps, add, jnp.zeros((ROWS, OUTPUTS)))
        if "scale" in held:
            y_RF = y_RF * triton.load(held["scale"].at[mine], mask=there_F, other=0)[None]
        if "bias" in held:
            y_RF = y_RF + triton.load(held["bias"].at[mine], mask=there_F, other=0)[None].astype(jnp.float32)
        return y_RF

    if activation in GATES:
        y_RF = GATES[activation](product(0)) * product(outputs)
    else:
        y_RF = product(which * outputs)
        if activation is not None:
            y_RF = activate(activation, y_RF)
    there_RF, mine = there_R[:, None] & there_F[None], pl.ds(first, OUTPUTS)
    if "residual" in held:
        y_RF = y_RF + triton.load(held["residual"].at[every, mine], mask=there_RF, other=0).astype(
            jnp.float32
        )

    for i, y in enumerate(y_BF):

        @pl.when(which == i)
        def _(y=y):
            triton.store(y.at[every, mine], y_RF.astype(y.dtype), mask=there_RF)
