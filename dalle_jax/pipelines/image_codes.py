"""Pictures to codes and back with a trained image tokenizer; a whole source to shards of codes.

R rows, N codes of a picture, H W picture.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np

from dalle_jax.config import DataConfig, MeshConfig, TokenizerConfig
from dalle_jax.data.codes import CodesInfo, ShardWriter, describe_source, is_complete, open_codes_dir
from dalle_jax.data.images import to_float
from dalle_jax.data.sources import Split, open_source
from dalle_jax.models import tokenizer as tokenizers
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding, replicated
from dalle_jax.pipelines.batching import ProgressFn, in_batches, pad_rows
from dalle_jax.pipelines.loading import ImageTokenizer, Params

IMAGE_BATCH = 64  # pictures encoded or decoded at once on a device
SHARD_ROWS = 16_384  # rows of a shard of codes: what is encoded again, at most, after an interruption


@partial(jax.jit, static_argnums=0)
def _encode(cfg: TokenizerConfig, params: Params, image_u8: jax.Array) -> jax.Array:
    return tokenizers.encode(cfg, params, to_float(image_u8))


_decode = jax.jit(tokenizers.decode, static_argnums=0)


def encode_images(tokenizer: ImageTokenizer, images: np.ndarray, *, batch: int = IMAGE_BATCH) -> np.ndarray:
    """Codes of pictures: uint8 (R, H, W, 3) to int32 (R, N). Raises ValueError for another shape or dtype."""
    if images.dtype != np.uint8:
        raise ValueError(f"pictures are {images.dtype}, want uint8 (rows, height, width, 3)")
    return in_batches(
        partial(_encode, tokenizer.config, tokenizer.params), (images,), min(batch, len(images))
    )


def decode_codes(
    tokenizer: ImageTokenizer,
    codes: np.ndarray,
    *,
    batch: int = IMAGE_BATCH,
    progress: ProgressFn | None = None,
) -> np.ndarray:
    """Pictures of codes: integers (R, N) to float32 (R, H, W, 3) in [0, 1].

    Raises ValueError for a shape, dtype or code that the tokenizer does not have.
    """
    cfg = tokenizer.config
    codes = np.asarray(codes)
    if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer) or not len(codes):
        raise ValueError(f"codes are {codes.dtype} {codes.shape}; want integers (pictures, {cfg.num_codes})")
    if codes.shape[1] != cfg.num_codes:
        raise ValueError(
            f"codes have {codes.shape[1]} columns; this tokenizer's pictures have {cfg.num_codes} codes "
            f"({cfg.grid} x {cfg.grid}); use the tokenizer that encoded them"
        )
    if codes.min() < 0 or codes.max() >= cfg.vocab:
        row = int(np.flatnonzero(((codes < 0) | (codes >= cfg.vocab)).any(axis=1))[0])
        raise ValueError(
            f"row {row} has codes from {codes[row].min()} to {codes[row].max()}; this tokenizer's are in "
            f"[0, {cfg.vocab}); use the tokenizer that encoded them"
        )
    one = partial(_decode, cfg, tokenizer.params)
    return in_batches(one, (codes.astype(np.int32),), min(batch, len(codes)), progress)


def encode_source(
    tokenizer: ImageTokenizer,
    data: DataConfig,
    directory: str | Path,
    *,
    rows: int | None = None,
    shard_rows: int = SHARD_ROWS,
    process: tuple[int, int] = (0, 1),
    split: Split = "train",
    progress: ProgressFn | None = None,
) -> tuple[CodesInfo, int]:
    """Encodes the first `rows` rows (None: all) of a split into a directory for `data.codes`; those of the evaluation
    split belong into its folder `eval`.

    Pictures are cropped to the centre, or squashed where `data.crop` is "none". All devices of this process share
    each batch; memory does not grow with the rows.
    shard_rows: rows of a shard. A shard that is there whole is not encoded again.
    process: (p, P), number p of P processes, which need not know of each other: shards p, p + P, ... are its own.

    Returns what the directory is of, and how many shards this call made. Raises ValueError for more rows than
    there are, for a directory of other codes, and what the source raises.
    """
    source = open_source(data.source, split, languages=data.languages)
    count = len(source) if rows is None else rows
    if not 1 <= count <= len(source):
        raise ValueError(f"{count} rows of a source of {len(source)}; want 1 to {len(source)}")
    if shard_rows < 1:
        raise ValueError(f"{shard_rows} rows in a shard; want 1 or more")
    first, processes = process
    if not 0 <= first < processes:
        raise ValueError(f"process {first} of {processes}; want 0 to {processes - 1}")
    cfg = tokenizer.config
    info = CodesInfo(
        rows=count, shard_rows=shard_rows, num_codes=cfg.num_codes, vocab=cfg.vocab, image_size=cfg.image_size,
        crop="none" if data.crop == "none" else "center", tokenizer=tokenizer.fingerprint,
        languages=data.languages, classes=tuple(source.classes), source=describe_source(data.source, split),
        fingerprint=source.fingerprint(),
    )  # fmt: skip
    open_codes_dir(directory, info)
    source.log_to(Path(directory) / (f"bad_records-{first}.jsonl" if first else "bad_records.jsonl"))
    mine = range(first, info.shards, processes)
    left = [k for k in mine if not is_complete(directory, info, k)]
    total = sum(len(info.shard(k)) for k in mine)
    done = total - sum(len(info.shard(k)) for k in left)
    encode, batch = _on_all_devices(tokenizer, most=min(shard_rows, count))
    with ThreadPoolExecutor(data.num_threads) as pool:

        def read(wanted: range) -> np.ndarray:
            return np.stack(list(pool.map(lambda i: source.image(i, info.image_size, info.crop), wanted)))

        for k in left:
            shard = info.shard(k)
            parts = [shard[at : at + batch] for at in range(0, len(shard), batch)]
            with ShardWriter(directory, info, k) as writer:
                images = read(parts[0])
                for part, following in zip(parts, [*parts[1:], None], strict=True):
                    codes = encode(pad_rows(images, batch))
                    if following is not None:  # read while the devices work
                        images = read(following)
                    for i, row in zip(part, np.asarray(codes), strict=False):
                        writer.add(row, source.captions(i), source.label(i))
                    done += len(part)
                    if progress:
                        progress(done, total)
    return info, len(left)


def _on_all_devices(tokenizer: ImageTokenizer, most: int) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """The encoder over all devices of this process, and the rows of a batch: IMAGE_BATCH on each of them, fewer
    where there are at most `most` rows."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    batch = mesh.size * min(IMAGE_BATCH, -(-most // mesh.size))
    params, rows = jax.device_put(tokenizer.params, replicated(mesh)), batch_sharding(mesh)
    return lambda images: _encode(tokenizer.config, params, jax.device_put(images, rows)), batch
