"""Pictures per second that the input pipeline delivers, by source and size.

    python -m benchmarks.data PATH [--sizes 64 128 256] [--threads 2] [--seconds 5]

PATH is anything that --data.path takes. Rows are read, decoded, cropped at random and batched, as in training.
Prints one line for each size; `decode` is the rate of one thread that only decodes and crops the same files, so
the distance between the two is what the pipeline adds.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from dalle_jax.config import DataConfig
from dalle_jax.data.images import decode
from dalle_jax.data.pipeline import open_train_source, train_batches
from dalle_jax.data.sources import source_of


def pipeline_rate(data: DataConfig, size: int, seconds: float) -> float:
    """Rows per second of the whole pipeline, after a first batch."""
    with train_batches(data, open_train_source(data), start=0, image_size=size) as batches:
        next(batches)
        rows, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds:
            rows += len(next(batches)["image"])
        return rows / (time.perf_counter() - begin)


def decode_rate(files: list[bytes], size: int, seconds: float) -> float:
    """Files per second that one thread decodes."""
    rng, done, begin = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        decode(files[done % len(files)], size, crop="random", rng=rng)
        done += 1
    return done / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5.0)
    args = parser.parse_args()
    data = DataConfig(source=source_of(args.path), batch=64, crop="random", threads=args.threads)
    source = open_train_source(data)
    files = [source.stored(i) for i in range(min(256, len(source)))]
    files = [file for file in files if isinstance(file, bytes)]
    for size in args.sizes:
        whole = pipeline_rate(data, size, args.seconds)
        alone = f"decode alone {decode_rate(files, size, args.seconds):7.0f}/s on one" if files else ""
        print(f"{size:4d} px: pipeline {whole:7.0f} pictures/s on {args.threads} threads; {alone}")


if __name__ == "__main__":
    main()
