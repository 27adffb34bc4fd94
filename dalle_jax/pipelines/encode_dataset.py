"""A data set encoded ahead of time: shards of codes that training reads in place of images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from dalle_jax.config import DataConfig, MeshConfig
from dalle_jax.data.codes import (
    CodesInfo,
    ShardWriter,
    describe_codes_source,
    is_shard_complete,
    open_codes_dir,
)
from dalle_jax.data.sources import Split, open_source
from dalle_jax.parallel.mesh import make_mesh
from dalle_jax.parallel.sharding import batch_sharding, replicated
from dalle_jax.pipelines.batching import ProgressFn, pad_rows
from dalle_jax.pipelines.tokenizer import IMAGE_BATCH_SIZE, TokenizerPipeline, encode_uint8

_SHARD_ROWS = 16_384  # rows of a shard; an interruption loses at most one shard


def encode_dataset(
    tokenizer: TokenizerPipeline,
    data: DataConfig,
    directory: str | Path,
    *,
    rows: int | None = None,
    shard_rows: int = _SHARD_ROWS,
    process: tuple[int, int] = (0, 1),
    split: Split = "train",
    progress: ProgressFn | None = None,
) -> tuple[CodesInfo, int]:
    """Encode rows of a split into a directory for `data.codes`.

    Images are cropped to the center, or squashed where `data.crop` is "none". All devices of this process share
    each batch. Memory does not grow with the rows. Complete shards are not encoded again.

    Args:
        tokenizer: the image tokenizer.
        data: source, crop and languages of the rows.
        directory: where the shards are written; those of the evaluation split belong into its folder `eval`.
        rows: the first rows of the split that are encoded; None is all of them.
        shard_rows: rows of a shard.
        process: (p, P): this is process p of P independent ones, which encodes the shards p, p + P, ...
        split: "train" or "eval".
        progress: called with the rows done and all rows of this process.

    Returns:
        The description of the directory, and the number of shards that this call wrote.

    Raises:
        ValueError: more rows than the split has, a directory with other codes, or a source that cannot be read.
    """
    source = open_source(data.source, split, languages=data.languages)
    count = len(source) if rows is None else rows
    if not 1 <= count <= len(source):
        raise ValueError(f"Expected rows in [1, {len(source)}], the rows of the source, got {count}.")
    if shard_rows < 1:
        raise ValueError(f"Expected shard_rows of at least 1, got {shard_rows}.")
    index, num_processes = process
    if not 0 <= index < num_processes:
        raise ValueError(f"Expected process in [0, {num_processes}), the number of processes, got {index}.")
    cfg = tokenizer.config
    info = CodesInfo(
        rows=count, shard_rows=shard_rows, num_codes=cfg.num_codes, vocab=cfg.vocab, image_size=cfg.image_size,
        crop="none" if data.crop == "none" else "center", tokenizer=tokenizer.fingerprint,
        languages=data.languages, classes=tuple(source.classes), source=describe_codes_source(data.source, split),
        fingerprint=source.fingerprint(),
    )  # fmt: skip
    open_codes_dir(directory, info)
    source.log_to(Path(directory) / (f"bad_records-{index}.jsonl" if index else "bad_records.jsonl"))
    own = range(index, info.shards, num_processes)
    missing = [k for k in own if not is_shard_complete(directory, info, k)]
    total = sum(len(info.shard(k)) for k in own)
    done = total - sum(len(info.shard(k)) for k in missing)
    encode, batch_size = _on_all_devices(tokenizer, min(shard_rows, count))
    with ThreadPoolExecutor(data.num_threads) as pool:

        def read(rows: range) -> np.ndarray:
            return np.stack(list(pool.map(lambda i: source.image(i, info.image_size, info.crop), rows)))

        for k in missing:
            shard = info.shard(k)
            batches = [shard[start : start + batch_size] for start in range(0, len(shard), batch_size)]
            with ShardWriter(directory, info, k) as writer:
                images = read(batches[0])
                for batch, next_batch in zip(batches, [*batches[1:], None], strict=True):
                    codes = encode(pad_rows(images, batch_size))
                    if next_batch is not None:  # read while the devices compute
                        images = read(next_batch)
                    for i, row in zip(batch, np.asarray(codes), strict=False):
                        writer.add(row, source.captions(i), source.label(i))
                    done += len(batch)
                    if progress:
                        progress(done, total)
    return info, len(missing)


def _on_all_devices(
    tokenizer: TokenizerPipeline, max_rows: int
) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """The encoder over all devices of this process, and the batch size: IMAGE_BATCH_SIZE on each device, fewer for
    at most `max_rows` rows."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    batch_size = mesh.size * min(IMAGE_BATCH_SIZE, -(-max_rows // mesh.size))
    params, rows = jax.device_put(tokenizer.run.params, replicated(mesh)), batch_sharding(mesh)
    return lambda images: encode_uint8(tokenizer.config, params, jax.device_put(images, rows)), batch_size
