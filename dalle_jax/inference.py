"""Trained models at work: captions to pictures, pictures to codes and back, each from a run directory.

    model = load_text_to_image("runs/scenes_dalle")
    images = decode_codes(model.tokenizer, draw_codes(model, ["a red circle"], seeds=[0]))

Rows are computed in batches of one size, the last one padded, so that every call compiles once. A picture
follows from its caption and seed alone; batches of another size only round otherwise.
B batch, N codes of a picture, H W picture, C captions, R rows.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import autoregressive
from dalle_jax import tokenizer as tokenizers
from dalle_jax.config import ClipConfig, DataConfig, MeshConfig, TokenizerConfig, TransformerConfig
from dalle_jax.data.codes import CodesInfo, ShardWriter, begin, described, is_whole
from dalle_jax.data.images import to_bytes, to_floats
from dalle_jax.data.sources import open_source
from dalle_jax.nn.sharding import batch_sharding, make_mesh, replicated
from dalle_jax.sampling.generate import generate, generate_rows, row_keys
from dalle_jax.sampling.queue import Queue
from dalle_jax.text import TextTokenizer
from dalle_jax.train.bucket import local_dir
from dalle_jax.train.rundir import Run, fingerprint, load_frozen, load_run, read_config

Params = dict[str, Any]
Progress = Callable[[int, int], None]  # rows done, rows in all

DRAW_BATCH = 8  # pictures drawn at once where the caller does not say
PIXEL_BATCH = 64  # pictures encoded or decoded at once on a device
SHARD_ROWS = 16_384  # rows of a shard of codes: what is encoded again, at most, after an interruption


class Tokenizer(NamedTuple):
    """A frozen image tokenizer. fingerprint: changes with any of its parameters (`rundir.fingerprint`)."""

    config: TokenizerConfig
    params: Params
    fingerprint: str


class TextToImage(NamedTuple):
    """A trained Transformer with the vocabulary and the image tokenizer that it was trained on."""

    run: Run
    text: TextTokenizer
    tokenizer: Tokenizer

    @property
    def config(self) -> TransformerConfig:
        return self.run.config.model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How codes are drawn; checked when made. A guidance of 1 is no guidance."""

    temperature: float = 1.0  # 0 takes the most probable code
    top_k: int | None = None  # codes that stay in the draw; None is all
    top_p: float | None = None  # share of the probability that stays in the draw, (0, 1]; None is all
    guidance: float = 1.0  # scale of classifier-free guidance

    def __post_init__(self):
        for holds, message in (
            (0 <= self.temperature < np.inf, f"temperature is {self.temperature}; want 0 (greedy) or more"),
            (self.top_k is None or self.top_k >= 1, f"top_k is {self.top_k}; want at least 1 code"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p is {self.top_p}; want a share in (0, 1]"),
            (0 <= self.guidance < np.inf, f"guidance is {self.guidance}; want 0 or more, 1 is none"),
        ):
            if not holds:
                raise ValueError(message)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The image tokenizer of a run: a tokenizer run itself, or the copy that a Transformer run keeps.

    Raises FileNotFoundError, ValueError or OSError as `load_run` does.
    """
    path = local_dir(path)
    model = read_config(path).model
    if isinstance(model, ClipConfig):
        raise ValueError(f"{path} is a run of stage clip: it has no image tokenizer; give a run that has one")
    if isinstance(model, TokenizerConfig):
        run = load_run(path)
        return Tokenizer(run.config.model, run.params, fingerprint(run.config.model, run.params))
    if not (path / "tokenizer" / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has no tokenizer/ yet; train it first, or give the tokenizer's own run"
        )
    return Tokenizer(*load_frozen(path / "tokenizer"))


def load_text_to_image(path: str | Path) -> TextToImage:
    """The Transformer of a run directory, ready to draw.

    Raises FileNotFoundError for a run that is missing or has no checkpoint, ValueError for a run of another
    stage, OSError for files that cannot be read.
    """
    path = local_dir(path)
    kind = read_config(path).model.kind
    if kind == "clip":
        raise ValueError(
            f"{path} is a run of stage clip: it ranks pictures and draws none. Give the run of a Transformer, and this "
            f"one as --clip {path}"
        )
    if kind not in ("dalle", "bart", "dvae", "vqgan"):
        raise ValueError(f"{path} is a run of stage {kind}, want one of a Transformer")
    if kind not in ("dalle", "bart"):
        raise ValueError(
            f"{path} is a tokenizer run (stage {kind}): it knows no captions. Give the run of a Transformer "
            f"trained on it (--tokenizer {path}); `encode` and `decode` work with tokenizer runs"
        )
    run = load_run(path)
    return TextToImage(run, TextTokenizer.load(path / "text.model"), load_tokenizer(path))


class Counter:
    """A `Progress` on standard error, `name 120/400`: at most one line in two seconds, and the last one."""

    def __init__(self, name: str):
        self._name, self._printed = name, time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._printed > 2 or done == total:
            self._printed = now
            print(f"{self._name} {done}/{total}", file=sys.stderr, flush=True)


# --- captions to codes ------------------------------------------------------------------------------------


def text_rows(model: TextToImage, captions: Sequence[str]) -> np.ndarray:
    """Token ids of captions, int32 (R, T). An empty caption is the null caption; a longer one is cut."""
    cfg = model.config
    one = partial(model.text.encode, text_vocab=cfg.text_vocab, text_len=cfg.text_len)
    return np.stack([one(caption) for caption in captions])


def check_null(model: TextToImage, text_CT: np.ndarray, guidance: float) -> None:
    """Raises ValueError where the null caption is wanted of a model that never saw it."""
    guided, null = guidance != 1, bool((text_CT[:, 0] >= model.config.text_vocab).any())
    if model.config.null_rate == 0 and (guided or null):
        what = f"guidance {guidance:g}" if guided else "an empty caption"
        raise ValueError(
            f"{what} needs the null caption, which this model never saw (trained with model.null_rate 0). "
            "Use guidance 1 and captions with text, or train with a null_rate of 0.1"
        )


def queue_of(model: TextToImage, slots: int, *, top_k: int | None = None) -> Queue:
    """A queue that draws with the model; its requests have the ids of `text_rows`."""
    top_k = None if top_k is None else min(top_k, model.config.image_vocab)
    return Queue(model.config, _unstack(model.config, model.run.params), slots, top_k=top_k)


def draw_codes(
    model: TextToImage,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    prefix: np.ndarray | None = None,
    batch: int = DRAW_BATCH,
    progress: Progress | None = None,
) -> np.ndarray:
    """The codes of R = n * C pictures, n of each caption, neighbours: int32 (R, N).

    captions: C texts; "" draws without a caption. A caption is run once for all its pictures in a batch.
    seeds: R integers in [0, 2**32), those of the first caption first. prefix: int32 (P,), the first P < N
    codes of every picture. batch: rows at once, at most.

    Raises ValueError for rows that do not match, seeds out of range, and for guidance or an empty caption
    where the model was trained without null captions: it never learned what to draw for one.
    """
    found = [codes for codes, _ in _drawn(model, captions, seeds, sampling, prefix, batch, progress)]
    return np.concatenate(found)


def draw_pictures(
    model: TextToImage,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling = Sampling(),
    *,
    prefix: np.ndarray | None = None,
    batch: int = DRAW_BATCH,
    progress: Progress | None = None,
    rows: int | None = None,
    shown: Callable[[np.ndarray], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`draw_codes` and `decode_codes`, batch by batch as they are done: codes int32 (b, N) and pictures, uint8
    (b, H, W, 3).

    rows: after so many rows of codes of a batch, each time, `shown` is called with its unfinished pictures, uint8
    (b, H, W, 3), grey where nothing is drawn yet; the device draws on meanwhile.
    Raises what `draw_codes` does, and ValueError for `rows` below 1.
    """
    tokenizer = model.tokenizer

    def show(codes: np.ndarray) -> None:
        shown(_unfinished(tokenizer, codes))

    for codes, size in _drawn(model, captions, seeds, sampling, prefix, batch, progress, rows, show):
        pictures = decode_codes(tokenizer, _padded(codes, size), batch=size)[: len(codes)]
        yield codes, to_bytes(pictures)


def _unfinished(tokenizer: Tokenizer, codes: np.ndarray) -> np.ndarray:
    """Pictures of the first codes of each, (b, M): the last whole row stands for those to come, under the grey."""
    cfg = tokenizer.config
    done = codes.shape[1] // cfg.grid
    rows = codes[:, : done * cfg.grid].reshape(len(codes), done, cfg.grid)
    rows = np.concatenate([rows, np.repeat(rows[:, -1:], cfg.grid - done, axis=1)], axis=1)
    pictures = to_bytes(decode_codes(tokenizer, rows.reshape(len(codes), -1), batch=len(codes)))
    pictures[:, done * (cfg.image_size // cfg.grid) :] = 128
    return pictures


def batch_shape(captions: int, copies: int, batch: int) -> tuple[int, int]:
    """Captions in a batch and pictures of each, for `copies` pictures of each caption and at most `batch` at once.

    More copies than a batch holds are spread evenly over the batches of one caption.
    """
    parts = -(-copies // batch)
    per_caption = -(-copies // parts)
    return min(captions, batch // per_caption), per_caption


def _drawn(
    model: TextToImage,
    captions: Sequence[str],
    seeds: Sequence[int],
    sampling: Sampling,
    prefix: np.ndarray | None,
    batch: int,
    progress: Progress | None,
    rows: int | None = None,
    shown: Callable[[np.ndarray], None] | None = None,
) -> Iterator[tuple[np.ndarray, int]]:
    """Codes of neighbouring rows, (b, N), in order, and the rows that were computed for them, b and padding."""
    cfg = model.config
    if not len(captions) or not len(seeds) or len(seeds) % len(captions):
        raise ValueError(
            f"{len(captions)} captions and {len(seeds)} seeds; want one seed per caption, or as many for each, "
            "at least one"
        )
    if min(seeds) < 0 or max(seeds) >= 2**32:
        raise ValueError(f"seeds from {min(seeds)} to {max(seeds)}; want integers in [0, 2**32)")
    if batch < 1:
        raise ValueError(f"batch is {batch}; want at least 1 picture at once")
    text_CT = text_rows(model, captions)
    check_null(model, text_CT, sampling.guidance)
    guided = sampling.guidance != 1
    options = {
        "temperature": jnp.float32(sampling.temperature),
        "top_k": None if sampling.top_k is None else min(sampling.top_k, cfg.image_vocab),
        "top_p": None if sampling.top_p is None else jnp.float32(sampling.top_p),
        "guidance": jnp.float32(sampling.guidance) if guided else None,
    }
    seeds_CK = np.asarray(seeds, np.uint32).reshape(len(captions), -1)
    at_once, copies = batch_shape(*seeds_CK.shape, batch)
    size = at_once * copies
    if prefix is not None:
        options["prime_BP"] = jnp.broadcast_to(jnp.asarray(prefix, jnp.int32)[None], (size, len(prefix)))

    params = _unstack(cfg, model.run.params)  # once, not in every batch
    done = 0
    for first in range(0, len(captions), at_once):
        text = _padded(text_CT[first : first + at_once], at_once)
        for start in range(0, seeds_CK.shape[1], copies):
            here = seeds_CK[first : first + at_once, start : start + copies]
            keys = row_keys(_padded(_padded(here.T, copies).T, at_once).ravel())

            def asked(codes, here=here):  # without the padding
                codes = np.asarray(codes).reshape(at_once, copies, -1)[: len(here), : here.shape[1]]
                return codes.reshape(here.size, -1)

            if rows is None:
                codes = generate(cfg, params, jnp.asarray(text), keys, **options)
            else:
                for codes in generate_rows(cfg, params, jnp.asarray(text), keys, rows=rows, **options):
                    shown(asked(codes))
            done += here.size
            if progress:
                progress(done, seeds_CK.size)
            yield asked(codes), size


_unstack = jax.jit(autoregressive.unstack, static_argnums=0)


# --- codes and pixels -------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _encode(cfg: TokenizerConfig, params: Params, image_u8: jax.Array) -> jax.Array:
    return tokenizers.encode(cfg, params, to_floats(image_u8))


_decode = jax.jit(tokenizers.decode, static_argnums=0)


def encode_images(tokenizer: Tokenizer, images: np.ndarray, *, batch: int = PIXEL_BATCH) -> np.ndarray:
    """Codes of pictures: uint8 (R, H, W, 3) to int32 (R, N). Raises ValueError for another shape or dtype."""
    if images.dtype != np.uint8:
        raise ValueError(f"pictures are {images.dtype}, want uint8 (rows, height, width, 3)")
    return in_batches(
        partial(_encode, tokenizer.config, tokenizer.params), (images,), min(batch, len(images))
    )


def decode_codes(
    tokenizer: Tokenizer, codes: np.ndarray, *, batch: int = PIXEL_BATCH, progress: Progress | None = None
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
    tokenizer: Tokenizer,
    data: DataConfig,
    directory: str | Path,
    *,
    rows: int | None = None,
    shard_rows: int = SHARD_ROWS,
    process: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> tuple[CodesInfo, int]:
    """Encodes the first `rows` rows (None: all) of the train source into a directory for `data.codes`.

    Pictures are cropped to the centre, or squashed where `data.crop` is "none". All devices of this process share
    each batch; memory does not grow with the rows.
    shard_rows: rows of a shard. A shard that is there whole is not encoded again.
    process: (p, P), number p of P processes, which need not know of each other: shards p, p + P, ... are its own.

    Returns what the directory is of, and how many shards this call made. Raises ValueError for more rows than
    there are, for a directory of other codes, and what the source raises.
    """
    source = open_source(data.source, "train", languages=data.languages)
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
        languages=data.languages, classes=tuple(source.classes), source=described(data.source),
        identity=source.identity(),
    )  # fmt: skip
    begin(directory, info)
    source.log_to(Path(directory) / (f"unusable-{first}.jsonl" if first else "unusable.jsonl"))
    mine = range(first, info.shards, processes)
    left = [k for k in mine if not is_whole(directory, info, k)]
    total = sum(len(info.shard(k)) for k in mine)
    done = total - sum(len(info.shard(k)) for k in left)
    encode, batch = _on_all_devices(tokenizer, most=min(shard_rows, count))
    with ThreadPoolExecutor(data.threads) as pool:

        def read(wanted: range) -> np.ndarray:
            return np.stack(list(pool.map(lambda i: source.image(i, info.image_size, info.crop), wanted)))

        for k in left:
            shard = info.shard(k)
            parts = [shard[at : at + batch] for at in range(0, len(shard), batch)]
            with ShardWriter(directory, info, k) as writer:
                images = read(parts[0])
                for part, following in zip(parts, [*parts[1:], None], strict=True):
                    codes = encode(_padded(images, batch))
                    if following is not None:  # read while the devices work
                        images = read(following)
                    for i, row in zip(part, np.asarray(codes), strict=False):
                        writer.add(row, source.captions(i), source.label(i))
                    done += len(part)
                    if progress:
                        progress(done, total)
    return info, len(left)


def _on_all_devices(tokenizer: Tokenizer, most: int) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """The encoder over all devices of this process, and the rows of a batch: PIXEL_BATCH on each of them, fewer
    where there are at most `most` rows."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    batch = mesh.size * min(PIXEL_BATCH, -(-most // mesh.size))
    params, rows = jax.device_put(tokenizer.params, replicated(mesh)), batch_sharding(mesh)
    return lambda images: _encode(tokenizer.config, params, jax.device_put(images, rows)), batch


def _padded(rows: np.ndarray, batch: int) -> np.ndarray:
    """`rows` up to `batch` of them, the last one repeated."""
    missing = batch - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def in_batches(
    fn: Callable[..., jax.Array], rows: tuple[np.ndarray, ...], batch: int, progress: Progress | None = None
) -> np.ndarray:
    """`fn` over the leading axis of `rows`, `batch` rows at a time, the last batch padded."""
    count, found = len(rows[0]), []
    for start in range(0, count, batch):
        here = [r[start : start + batch] for r in rows]
        found.append(np.asarray(fn(*(jnp.asarray(_padded(r, batch)) for r in here)))[: len(here[0])])
        if progress:
            progress(min(start + batch, count), count)
    return np.concatenate(found)
