"""Images per second of the input pipeline, the time of its parts, and the same work by a PyTorch DataLoader.

    python -m benchmarks.data PATH [--cases jpeg-640 jpeg-1280 png-640 jpeg-square codes] [--sizes 64 128 256]
        [--seconds 3] [--threads 2] [--workers 2] [--peer]

PATH is anything that --data.path takes. 128 of its images are stored as photographs of 640 x 480 or 1280 x 960 pixels
(enlarged, with grain), as JPEG of quality 90 or as PNG; jpeg-square are squares of 3/2 of the requested size, as
`dalle-jax data PATH --convert-to tfds --size` stores them. The pipeline reads, decodes, crops at random and makes
batches of 64, as in the training of a tokenizer, on threads or, with --workers, on that many processes. Codes are
random, 1,024 per row, with two captions.

--peer also measures a PyTorch DataLoader with the same number of workers, whose Dataset opens the same files with
Pillow, makes the same crops and resizes them to the same size (needs torch).
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from dalle_jax.config import DataConfig, FolderSource
from dalle_jax.data.codes import CodesInfo, ShardWriter, describe_codes_source, open_codes_dir
from dalle_jax.data.images import decode_image
from dalle_jax.data.loader.pipeline import open_train_source, train_batches
from dalle_jax.data.sources import infer_source, open_source
from dalle_jax.text.tokenizers import TextTokenizer, train_text_tokenizer

FILES, LINKS, BATCH = (
    128,
    40,
    64,
)  # 40 names for each file: shuffling a set of 128 rows costs more than one of 5,120
KINDS = ("threads", "processes")
CASES = ("jpeg-640", "jpeg-1280", "png-640", "jpeg-square", "codes")
CODES, VOCAB, CAPTION = 1024, 8192, "a brown dog runs through the shallow water of a beach {}"


def rate(batches: Iterator, seconds: float) -> float:
    """Rows per second of an iterator over batches, after two of them."""
    for _ in range(2):
        next(batches)
    rows, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        rows += BATCH
        next(batches)
    return rows / (time.perf_counter() - begun)


def each(work: Callable[[int], object], seconds: float) -> float:
    """Microseconds of one call, on one thread."""
    work(0)
    calls, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        work(calls % (FILES * LINKS))
        calls += 1
    return 1e6 * (time.perf_counter() - begun) / calls


def photographs(source, case: str, size: int, folder: Path) -> list[Path]:
    """FILES pictures of a source as files of a size that cameras and web sites have, or as squares of 3/2 `size`."""
    kind, _, width = case.partition("-")
    shape = (3 * size // 2,) * 2 if width == "square" else (int(width), int(width) * 3 // 4)
    rng, paths = np.random.default_rng(0), []
    folder.mkdir(parents=True)
    for i in range(FILES):
        small = Image.fromarray(source.image(i % len(source), 128, "none"))
        large = np.asarray(small.resize(shape, Image.Resampling.BICUBIC), np.float32)
        grain = rng.normal(0, 3, large.shape[:2])[..., None]
        picture = Image.fromarray(np.clip(large + grain, 0, 255).astype(np.uint8))
        paths.append(folder / f"{i:04d}.{kind}")
        picture.save(paths[-1], **({"quality": 90} if kind == "jpeg" else {}))
        for n in range(1, LINKS):
            os.link(paths[-1], folder / f"{i:04d}-{n}.{kind}")
    return sorted(folder.iterdir())


def plain_loader(paths: list[Path], size: int, workers: int) -> Iterator:
    """What one writes with PyTorch and Pillow alone."""
    import torch

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(paths)

        def __getitem__(self, i):
            rng = np.random.default_rng()
            picture = Image.open(paths[i]).convert("RGB")
            side = min(picture.size)
            x, y = (rng.integers(0, length - side + 1) for length in picture.size)
            window = side * min(1.0, size / rng.integers(round(9 / 8 * size), round(12 / 8 * size) + 1))
            x, y = x + rng.uniform(0, side - window), y + rng.uniform(0, side - window)
            box = (x, y, x + window, y + window)
            picture = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
            return torch.from_numpy(np.array(picture))

    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Pictures(), batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True, drop_last=True,
    )  # fmt: skip
    while True:
        yield from loader


def ours(folder: Path, size: int, threads: int, workers: int, seconds: float) -> float:
    source = FolderSource(path=str(folder), eval_fraction=0.0)
    data = DataConfig(
        source=source, batch_size=BATCH, crop="random", num_threads=threads, num_workers=workers
    )
    rows = open_source(source, "train", languages=())
    with train_batches(data, rows, start=0, image_size=size) as batches:
        return rate(batches, seconds)


def parts(paths: list[Path], size: int, seconds: float) -> str:
    """Microseconds of a picture on one thread: reading the file, decoding it, the rest of `decode`."""
    files, rng = [path.read_bytes() for path in paths[::LINKS]] * LINKS, np.random.default_rng(0)
    read = each(lambda i: paths[i].read_bytes(), seconds / 4)

    def load(i):
        with Image.open(io.BytesIO(files[i])) as picture:
            picture.draft(None, (round(1.5 * size), round(1.5 * size)))
            picture.load()

    loaded = each(load, seconds)
    whole = each(lambda i: decode_image(files[i], size, crop="random", rng=rng), seconds)
    return f"read {read:.0f}, decompress {loaded:.0f}, crop and resize {whole - loaded:.0f} us"


def codes(work: Path, threads: int, workers: int, seconds: float) -> None:
    """Rows of codes and captions per second, without and with the captions encoded."""
    rng, source = np.random.default_rng(0), FolderSource(path="none")
    info = CodesInfo(
        rows=16_384, shard_rows=4096, num_codes=CODES, vocab=VOCAB, image_size=256, crop="center", tokenizer="",
        languages=("en", "zh"), classes=(), source=describe_codes_source(source), fingerprint="{}",
    )  # fmt: skip
    open_codes_dir(work / "codes", info)
    for k in range(info.shards):
        with ShardWriter(work / "codes", info, k) as writer:
            for i in info.shard(k):
                said = {"en": (CAPTION.format(i), CAPTION.format(-i))}
                writer.add(rng.integers(0, VOCAB, CODES), said, None)
    rows = open_train_source(DataConfig(source=source, codes=str(work / "codes"), batch_size=BATCH))
    train_text_tokenizer((CAPTION.format(i) for i in range(1000)), work / "text_tokenizer.model", vocab=400)
    text = {
        "text": TextTokenizer.load(work / "text_tokenizer.model"),
        "text_vocab": 400,
        "text_len": 256,
        "bpe_dropout": 0.1,
    }
    read = each(lambda i: rows.row(i * 61 % len(rows)), seconds / 4)
    merge = each(
        lambda i: text["text"].encode(CAPTION, text_vocab=400, text_len=256, bpe_dropout=0.1, seed=i),
        seconds / 4,
    )
    for name, options in (("codes", {}), ("codes and captions", text)):
        rates = []
        for count in (0, workers) if workers else (0,):
            data = DataConfig(source=source, batch_size=BATCH, num_threads=threads, num_workers=count)
            with train_batches(data, rows, start=0, image_size=None, **options) as batches:
                rates.append(f"{rate(batches, seconds):.0f} rows/s on {count or threads} {KINDS[count > 0]}")
        print(f"{name}: {', '.join(rates)}; one row: read {read:.0f}, caption {merge:.0f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--peer", action="store_true")
    args = parser.parse_args()
    source = open_source(infer_source(args.path), "train", languages=())
    with tempfile.TemporaryDirectory() as work:
        for case in args.cases:
            if case == "codes":
                codes(Path(work), args.threads, args.workers, args.seconds)
                continue
            for size in args.sizes:
                folder = Path(work, f"{case}-{size}" if case.endswith("square") else case)
                paths = (
                    sorted(folder.iterdir()) if folder.exists() else photographs(source, case, size, folder)
                )
                mean = sum(path.stat().st_size for path in paths) / len(paths)
                line, ours_ = f"{case} ({mean / 1000:.0f} kB) to {size} px:", []
                for count in (0, args.workers) if args.workers else (0,):
                    ours_.append(ours(paths[0].parent, size, args.threads, count, args.seconds))
                    line += f" {ours_[-1]:.0f}/s on {count or args.threads} {KINDS[count > 0]},"
                if args.peer:
                    plain = rate(plain_loader(paths, size, args.workers or args.threads), args.seconds)
                    ratios = " and ".join(f"{found / plain:.2f}" for found in ours_)
                    line += (
                        f" plain {plain:.0f}/s on {args.workers or args.threads} processes, {ratios} times"
                    )
                print(f"{line}; one picture: {parts(paths, size, args.seconds / 3)}", flush=True)


if __name__ == "__main__":
    main()
