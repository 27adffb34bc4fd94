"""Pictures in and out: encoded bytes to square uint8 arrays, arrays to PNG files and captioned grids.

Every picture becomes RGB: turned as its EXIF says, over white where it is transparent, the first frame where
it moves. H W picture, N pictures.
"""

from __future__ import annotations

import io
import math
import os
import threading
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dalle_jax.files.atomic import write_atomic

Crop = Literal["none", "center", "random", "narrow"]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that starts another program
_MAX_PIXELS = 64_000_000  # a header that claims more is refused before anything is decoded
# Side of the picture over side of a random window, least and most: for the tokenizer (2102.12092, A.2) and for the
# Transformer (B.1).
_ZOOM = {"random": (9 / 8, 12 / 8), "narrow": (1.0, 9 / 8)}
_LARGE_PIXELS = 16_000_000  # pictures above are decoded in one thread of their own: memory
_LARGE_THREAD = "large pictures"
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Fonts with Chinese characters, as the usual systems call them; Pillow knows the folders.
_CJK_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "uming.ttc",
    "ukai.ttc",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simsun.ttc",
    "simhei.ttf",
)


class ImageLimits(NamedTuple):
    """Which pictures are of use: those with sides and a shape that leave something after cropping."""

    min_image_size: int = 1  # pixels of the shorter side
    max_aspect_ratio: float = math.inf  # longer side over shorter


ANY_SIZE = ImageLimits()


class BadImageError(ValueError):
    """A picture that cannot be used. `cause` says why in a word or two: empty, not an image, truncated, bomb,
    broken, too small, too long."""

    def __init__(self, cause: str, message: str):
        super().__init__(message)
        self.cause = cause

    def __reduce__(self):
        return BadImageError, (self.cause, str(self))


# --- in -------------------------------------------------------------------------------------------------


def decode_image(
    data: bytes,
    size: int,
    *,
    crop: Crop = "center",
    rng: np.random.Generator | None = None,
    limits: ImageLimits = ANY_SIZE,
) -> np.ndarray:
    """One encoded picture as a square.

    data: a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file.
    size: side of the result, pixels; smaller pictures are enlarged.
    crop: "none" squashes the whole picture into the square; "center" takes the largest square in the middle;
        "random" a random large square and in it, where there are pixels to spare, a random window of 8/12 to
        8/9 of its side (2102.12092, A.2, without the flip, which would contradict captions that say left and
        right); "narrow" stays near the middle: square from the middle quarter, window of 8/9 of its side to all
        of it (B.1).
    rng: draws the random crop; needed for "random" and "narrow" and only used there.

    Returns uint8 (size, size, 3). Raises BadImage for bytes that are not a whole picture of at most 64
    million pixels and within `limits`.
    """
    _check_rng(crop, rng)
    if not data:
        raise BadImageError("empty", "the picture is empty (0 bytes)")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
            width, height = picture.size
            if width * height > _MAX_PIXELS:
                raise BadImageError(
                    "bomb", f"the picture claims {width} x {height} pixels, more than {_MAX_PIXELS}"
                )
            if width < 1 or height < 1:
                raise BadImageError("broken", f"the picture claims {width} x {height} pixels")
            check_sides(width, height, limits)
            if picture.mode in ("RGB", "L", "CMYK", "YCbCr"):
                least = round(_ZOOM[crop][1] * size) if crop in _ZOOM else size
                picture.draft(None, (least, least))  # JPEG: decode at 1/2, 1/4 or 1/8 where that is enough
            large = picture.width * picture.height > _LARGE_PIXELS  # after draft has made a JPEG smaller
            if large and not threading.current_thread().name.startswith(_LARGE_THREAD):
                return (
                    _large_thread()
                    .submit(decode_image, data, size, crop=crop, rng=rng, limits=limits)
                    .result()
                )
            turn = _TURNS.get(_orientation(picture))  # of a PNG this loads the pixels
            picture.load()
            rgb = _to_rgb(picture)
            box = _crop_box(rgb.size, size, crop, rng)
            rgb = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            if turn is not None:
                rgb = rgb.transpose(turn)
            return np.array(rgb)
    except (BadImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("bomb", str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadImageError("not an image", f"not a picture of a known format ({len(data)} bytes)") from None
    except Exception as error:  # decoders meet hostile bytes and answer with exceptions of every kind
        cause = "truncated" if "truncated" in str(error).lower() else "broken"
        raise BadImageError(cause, f"the picture does not decode: {error}") from None


def check_sides(width: int, height: int, limits: ImageLimits) -> None:
    """Raises BadImage for a picture outside `limits`."""
    short, long = sorted((width, height))
    if short < limits.min_image_size:
        raise BadImageError(
            "too small", f"the picture is {width} x {height}, want sides of {limits.min_image_size} pixels"
        )
    if long > short * limits.max_aspect_ratio:
        told = f"the picture is {width} x {height}, want sides of at most {limits.max_aspect_ratio:g} to 1"
        raise BadImageError("too long", told)


def crop_and_resize(
    image_HW3: np.ndarray, size: int, *, crop: Crop = "center", rng: np.random.Generator | None = None
) -> np.ndarray:
    """A decoded picture, uint8 (H, W, 3), as a square: what `decode` does with the pixels of a file."""
    _check_rng(crop, rng)
    height, width = image_HW3.shape[:2]
    box = _crop_box((width, height), size, crop, rng)
    if box == (0, 0, size, size) and (width, height) == (size, size):
        return np.array(image_HW3)
    picture = Image.fromarray(np.ascontiguousarray(image_HW3))
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def load_image(path: str | os.PathLike, size: int, *, crop: Crop = "center") -> np.ndarray:
    """The picture in a file, uint8 (size, size, 3). Raises BadImage naming the path if it cannot be used."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImageError("missing", f"cannot read the picture {path}: {error.strerror}") from None
    try:
        return decode_image(data, size, crop=crop)
    except BadImageError as error:
        raise BadImageError(error.cause, f"{path}: {error}") from None


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":
        bits16 = picture.mode.startswith("I;16")
        return Image.fromarray(_wide_grey(np.asarray(picture), bits16)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _wide_grey(grey_HW: np.ndarray, bits16: bool) -> np.ndarray:
    """Grey of 16 bits, 32 bits or floats as 8 bits. Where the file does not say, values up to 1 are shares of
    white, values up to 255 have 8 bits and larger ones 16."""
    if bits16:
        scale = 1 / 257
    else:
        grey_HW = np.nan_to_num(grey_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        scale = 255.0 if grey_HW.max() <= 1 else 1.0 if grey_HW.max() <= 255 else 1 / 257
    return np.clip(np.rint(grey_HW * scale), 0, 255).astype(np.uint8)


def _crop_box(
    shape: tuple[int, int], size: int, crop: Crop, rng: np.random.Generator | None
) -> tuple[float, float, float, float]:
    width, height = shape
    side = min(width, height)
    if crop == "none":
        return 0, 0, width, height
    if crop == "center":
        x, y = (width - side) // 2, (height - side) // 2
        return x, y, x + side, y + side
    x, y = (_offset(length - side, crop, rng) for length in (width, height))
    least, most = (min(side, round(zoom * size)) for zoom in _ZOOM[crop])
    window = side * min(1.0, size / rng.integers(least, most + 1))
    x, y = x + rng.uniform(0, side - window), y + rng.uniform(0, side - window)
    return float(x), float(y), min(width, float(x + window)), min(height, float(y + window))


@lru_cache(maxsize=1)
def _large_thread() -> ThreadPoolExecutor:
    """Decodes large pictures one after the other, so that memory does not grow with the threads that read."""
    return ThreadPoolExecutor(1, thread_name_prefix=_LARGE_THREAD)


def _offset(spare: int, crop: Crop, rng: np.random.Generator) -> int:
    """Where the square begins: anywhere, or in the middle quarter of where it can."""
    low, high = (0, spare) if crop == "random" else (3 * spare // 8, 5 * spare // 8)
    return int(rng.integers(low, high + 1))


def _check_rng(crop: Crop, rng: np.random.Generator | None) -> None:
    if crop in _ZOOM and rng is None:
        raise ValueError(f"crop={crop!r} draws the window from rng, got None; pass a np.random.Generator")


# --- out ------------------------------------------------------------------------------------------------


def encode_png(picture: np.ndarray | Image.Image) -> bytes:
    """The PNG file of a uint8 (H, W, 3) array or a Pillow picture."""
    if not isinstance(picture, Image.Image):
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            raise ValueError(f"a picture is uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
        picture = Image.fromarray(picture)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def save_png(path: str | os.PathLike, picture: np.ndarray | Image.Image) -> None:
    """Writes a PNG file, whole or not at all; folders are made."""
    write_atomic(path, encode_png(picture), sync=False)  # it can be made again


def image_grid(
    images_NHWC: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Pictures in rows of `columns` on white, row by row from the top left.

    images_NHWC: uint8 (N, H, W, 3), N at least 1.
    labels: one text for each picture, drawn under it in up to four lines; cells become wide enough to read.
        Chinese needs a font that has it; where the system has none those characters are left out.
    scale: whole number of screen pixels per picture pixel.
    """
    images_NHWC = np.asarray(images_NHWC)
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(f"want pictures uint8 (N, H, W, 3), got {images_NHWC.dtype} {images_NHWC.shape}")
    if len(images_NHWC) == 0 or columns < 1 or scale < 1:
        raise ValueError(
            f"{len(images_NHWC)} pictures, columns={columns}, scale={scale}; want at least 1 each"
        )
    if labels is not None and len(labels) != len(images_NHWC):
        raise ValueError(f"{len(images_NHWC)} pictures, {len(labels)} labels; want one label for each")
    gap, font_size, most_lines = 4, 12, 4
    line_height = font_size + 3
    height, width = (side * scale for side in images_NHWC.shape[1:3])
    columns = min(columns, len(images_NHWC))
    rows = -(-len(images_NHWC) // columns)
    cell_width = width if labels is None else max(width, 128)
    texts = [_wrap(label, cell_width, font_size, most_lines) for label in labels or ()]
    lines = [max((len(t) for t in texts[r * columns : (r + 1) * columns]), default=0) for r in range(rows)]
    tops = np.cumsum([gap] + [height + n * line_height + (gap if n else 0) + gap for n in lines])
    canvas = Image.new("RGB", (gap + columns * (cell_width + gap), int(tops[-1])), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image_HWC in enumerate(images_NHWC):
        row, column = divmod(i, columns)
        x, y = gap + column * (cell_width + gap), int(tops[row])
        picture = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(picture, (x + (cell_width - width) // 2, y))
        for n, (text, font) in enumerate(texts[i] if texts else ()):
            draw.text((x, y + height + gap + n * line_height), text, fill="black", font=font)
    return canvas


@lru_cache(maxsize=8)
def _latin_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=8)
def _cjk_font(size: int) -> ImageFont.FreeTypeFont | None:
    for name in _CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def _wrap(label: str, width: int, size: int, most_lines: int) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """The lines of a label, each with its font; a label that is too long ends in dots."""
    font = _latin_font(size)
    wide = any(ord(c) > 0x2E80 for c in label)
    if wide and (cjk := _cjk_font(size)) is not None:
        font = cjk
    else:
        label = "".join(c for c in unicodedata.normalize("NFC", label) if ord(c) < 0x250)
    words, word = [], ""
    for c in " ".join(label.split()):  # a Chinese character is a word of its own
        if c == " " or ord(c) > 0x2E80:
            words += [word] if word else []
            words, word = ([*words, c], "") if c != " " else (words, " ")
        else:
            word += c
    words += [word] if word.strip() else []
    lines, line = [], ""
    for word in words:
        for part in _fit(word, width, font):
            if line and font.getlength(line + part) > width:
                lines.append(line)
                line = part.lstrip()
            else:
                line += part
    lines += [line] if line.strip() else []
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], last + "..."]
    return [(line, font) for line in lines]


def _fit(word: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The word, in pieces if it is wider than a line."""
    pieces = []
    while font.getlength(word) > width and len(word) > 1:
        n = next((n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width), 1)
        pieces.append(word[:n])
        word = word[n:]
    return [*pieces, word]


# --- value range: uint8 in files and batches, float32 in [0, 1] in models ---------------------------------


def to_float(image_u8: Any) -> Any:
    """uint8 pictures, arrays of NumPy or of jax, to float32 in [0, 1]."""
    if image_u8.dtype != np.uint8:
        raise ValueError(f"pictures are {image_u8.dtype}; want uint8, in [0, 255]")
    return image_u8.astype(np.float32) / np.float32(255.0)


def to_uint8(image: Any) -> np.ndarray:
    """Float pictures in [0, 1] to uint8, rounded."""
    return np.round(np.clip(np.asarray(image, np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
