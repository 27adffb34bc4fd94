"""Image files to square uint8 arrays, arrays to PNG files and captioned grids.

Every image becomes RGB: its EXIF orientation is applied, transparent pixels are composed over white, and of an
animation the first frame is taken. H W image, N images.
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
_MAX_PIXELS = 64_000_000  # a larger image is refused by its header
# Side of the image over side of a random window, smallest and largest: for the tokenizer (2102.12092, A.2) and for the
# Transformer (B.1).
_ZOOM = {"random": (9 / 8, 12 / 8), "narrow": (1.0, 9 / 8)}
_LARGE_PIXELS = 16_000_000  # larger images are decoded in one thread, to bound memory
_LARGE_THREAD = "large images"
_EXIF_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Fonts with Chinese characters of common systems; Pillow searches the font directories.
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
    """Limits on the size and shape of images that are used."""

    min_image_size: int = 1  # shorter side, pixels
    max_aspect_ratio: float = math.inf  # longer side over shorter


ANY_SIZE = ImageLimits()


class BadImageError(ValueError):
    """An image cannot be used. `cause` is a short reason, by which such images are counted."""

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
    """Decode an image file to a square.

    Args:
      data: The bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or PPM file.
      size: Side of the result, pixels; smaller images are enlarged.
      crop: "none" resizes the whole image without keeping its aspect ratio. "center" takes the largest square in the
        middle. "random" takes a random largest square and in it, if the resolution allows, a random window of 8/12 to
        8/9 of its side (2102.12092, A.2, without the flip, which would contradict captions with left and right).
        "narrow" stays near the middle: a square from the middle quarter, a window of 8/9 to all of its side (B.1).
      rng: Random numbers for "random" and "narrow"; unused otherwise.
      limits: Smallest size and largest aspect ratio.

    Returns:
      uint8 (size, size, 3).

    Raises:
      BadImageError: The bytes are not a whole image within `limits` and 64 million pixels.
    """
    _check_rng(crop, rng)
    if not data:
        raise BadImageError("empty image file", "Expected an image, got 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > _MAX_PIXELS:
                raise BadImageError(
                    "too many pixels", f"Expected at most {_MAX_PIXELS} pixels, got {width} x {height}"
                )
            if width < 1 or height < 1:
                raise BadImageError("corrupt image", f"Expected at least one pixel, got {width} x {height}")
            check_image_sides(width, height, limits)
            if image.mode in ("RGB", "L", "CMYK", "YCbCr"):
                needed = round(_ZOOM[crop][1] * size) if crop in _ZOOM else size
                image.draft(None, (needed, needed))  # JPEG: decode at 1/2, 1/4 or 1/8 if that is enough
            large = image.width * image.height > _LARGE_PIXELS  # after draft has made a JPEG smaller
            if large and not threading.current_thread().name.startswith(_LARGE_THREAD):
                return (
                    _large_thread()
                    .submit(decode_image, data, size, crop=crop, rng=rng, limits=limits)
                    .result()
                )
            transpose = _TRANSPOSES.get(_orientation(image))  # of a PNG this loads the pixels
            image.load()
            rgb = _to_rgb(image)
            box = _crop_box(rgb.size, size, crop, rng)
            rgb = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            if transpose is not None:
                rgb = rgb.transpose(transpose)
            return np.array(rgb)
    except (BadImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too many pixels", str(error)) from None
    except Image.UnidentifiedImageError:
        raise BadImageError(
            "not an image", f"Expected an image of a known format, got {len(data)} other bytes"
        ) from None
    except Exception as error:  # decoders raise exceptions of every kind on hostile bytes
        cause = "truncated image" if "truncated" in str(error).lower() else "corrupt image"
        raise BadImageError(cause, f"The image does not decode: {error}") from None


def check_image_sides(width: int, height: int, limits: ImageLimits) -> None:
    """Raise BadImageError for an image outside `limits`. width, height: pixels."""
    short, long = sorted((width, height))
    if short < limits.min_image_size:
        raise BadImageError(
            "image too small",
            f"Expected sides of at least {limits.min_image_size} pixels, got {width} x {height}",
        )
    if long > short * limits.max_aspect_ratio:
        message = f"Expected an aspect ratio of at most {limits.max_aspect_ratio:g}, got {width} x {height}"
        raise BadImageError("aspect ratio too large", message)


def crop_and_resize(
    image_HW3: np.ndarray, size: int, *, crop: Crop = "center", rng: np.random.Generator | None = None
) -> np.ndarray:
    """Cut a square out of a decoded image and resize it, as `decode_image` does.

    Args:
      image_HW3: uint8.
      size: Side of the result, pixels.
      crop: See `decode_image`.
      rng: See `decode_image`.

    Returns:
      uint8 (size, size, 3).
    """
    _check_rng(crop, rng)
    height, width = image_HW3.shape[:2]
    box = _crop_box((width, height), size, crop, rng)
    if box == (0, 0, size, size) and (width, height) == (size, size):
        return np.array(image_HW3)
    image = Image.fromarray(np.ascontiguousarray(image_HW3))
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def load_image(path: str | os.PathLike, size: int, *, crop: Crop = "center") -> np.ndarray:
    """Read an image file as a square, uint8 (size, size, 3). Raises BadImageError with the path if it cannot be
    used."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImageError("missing image file", f"Cannot read the image {path}: {error.strerror}") from None
    try:
        return decode_image(data, size, crop=crop)
    except BadImageError as error:
        raise BadImageError(error.cause, f"{path}: {error}") from None


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # the pixels of an image with corrupt EXIF can still be used
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        bits16 = image.mode.startswith("I;16")
        return Image.fromarray(_gray_to_uint8(np.asarray(image), bits16)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _gray_to_uint8(gray_HW: np.ndarray, bits16: bool) -> np.ndarray:
    """Convert gray of 16 bits, 32 bits or floats to 8 bits.

    Without a range in the file, values up to 1 are fractions of white, values up to 255 have 8 bits, larger ones 16.
    """
    if bits16:
        scale = 1 / 257
    else:
        gray_HW = np.nan_to_num(gray_HW.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        scale = 255.0 if gray_HW.max() <= 1 else 1.0 if gray_HW.max() <= 255 else 1 / 257
    return np.clip(np.rint(gray_HW * scale), 0, 255).astype(np.uint8)


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
    rng = _require_rng(crop, rng)
    x, y = (_square_offset(length - side, crop, rng) for length in (width, height))
    low, high = (min(side, round(zoom * size)) for zoom in _ZOOM[crop])
    window = side * min(1.0, size / rng.integers(low, high + 1))
    x, y = x + rng.uniform(0, side - window), y + rng.uniform(0, side - window)
    return float(x), float(y), min(width, float(x + window)), min(height, float(y + window))


@lru_cache(maxsize=1)
def _large_thread() -> ThreadPoolExecutor:
    """Return the one thread that decodes large images, so that memory does not grow with the number of readers."""
    return ThreadPoolExecutor(1, thread_name_prefix=_LARGE_THREAD)


def _square_offset(spare: int, crop: Crop, rng: np.random.Generator) -> int:
    """Sample the start of the square in [0, spare], or in the middle quarter of it."""
    low, high = (0, spare) if crop == "random" else (3 * spare // 8, 5 * spare // 8)
    return int(rng.integers(low, high + 1))


def _check_rng(crop: Crop, rng: np.random.Generator | None) -> None:
    if crop in _ZOOM:
        _require_rng(crop, rng)


def _require_rng(crop: Crop, rng: np.random.Generator | None) -> np.random.Generator:
    if rng is None:
        raise ValueError(f"Expected an np.random.Generator as rng for crop={crop!r}, got None.")
    return rng


# --- out ------------------------------------------------------------------------------------------------


def encode_png(image: np.ndarray | Image.Image) -> bytes:
    """Return the PNG file of a uint8 (H, W, 3) array or a Pillow image."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"Expected an image uint8 (H, W, 3), got {image.dtype} {image.shape}.")
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def save_png(path: str | os.PathLike, image: np.ndarray | Image.Image) -> None:
    """Write a PNG file atomically; parent directories are made."""
    write_atomic(path, encode_png(image), sync=False)  # not flushed: it can be made again


def image_grid(
    images_NHWC: np.ndarray, columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """Arrange images in rows of `columns` on white, row by row from the top left.

    Args:
      images_NHWC: uint8 (N, H, W, 3), N at least 1.
      columns: Images per row, at least 1.
      labels: A text for each image, written under it in up to four lines; cells are at least 128 pixels wide. Chinese
        characters are left out if the system has no font with them.
      scale: Pixels of the grid per pixel of an image, a whole number.
    """
    images_NHWC = np.asarray(images_NHWC)
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[-1] != 3:
        raise ValueError(f"Expected images uint8 (N, H, W, 3), got {images_NHWC.dtype} {images_NHWC.shape}.")
    if len(images_NHWC) == 0 or columns < 1 or scale < 1:
        raise ValueError(
            f"Expected at least 1 image, columns and scale, got {len(images_NHWC)}, {columns} and {scale}."
        )
    if labels is not None and len(labels) != len(images_NHWC):
        raise ValueError(f"Expected one label for each of {len(images_NHWC)} images, got {len(labels)}.")
    gap, font_size, max_lines = 4, 12, 4
    line_height = font_size + 3
    height, width = (side * scale for side in images_NHWC.shape[1:3])
    columns = min(columns, len(images_NHWC))
    rows = -(-len(images_NHWC) // columns)
    cell_width = width if labels is None else max(width, 128)
    texts = [_wrap(label, cell_width, font_size, max_lines) for label in labels or ()]
    lines = [max((len(t) for t in texts[r * columns : (r + 1) * columns]), default=0) for r in range(rows)]
    tops = np.cumsum([gap] + [height + n * line_height + (gap if n else 0) + gap for n in lines])
    canvas = Image.new("RGB", (gap + columns * (cell_width + gap), int(tops[-1])), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image_HWC in enumerate(images_NHWC):
        row, column = divmod(i, columns)
        x, y = gap + column * (cell_width + gap), int(tops[row])
        image = Image.fromarray(image_HWC).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(image, (x + (cell_width - width) // 2, y))
        for n, (text, font) in enumerate(texts[i] if texts else ()):
            draw.text((x, y + height + gap + n * line_height), text, fill="black", font=font)
    return canvas


_Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@lru_cache(maxsize=8)
def _latin_font(size: int) -> _Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=8)
def _cjk_font(size: int) -> ImageFont.FreeTypeFont | None:
    for name in _CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return None


def _wrap(label: str, width: int, size: int, max_lines: int) -> list[tuple[str, _Font]]:
    """Split a label into lines, each with its font; a label that is too long ends in dots."""
    font = _latin_font(size)
    wide = any(ord(c) > 0x2E80 for c in label)
    if wide and (cjk := _cjk_font(size)) is not None:
        font = cjk
    else:
        label = "".join(c for c in unicodedata.normalize("NFC", label) if ord(c) < 0x250)
    words, word = [], ""
    for c in " ".join(label.split()):  # each Chinese character is a word
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
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last + "..."]
    return [(line, font) for line in lines]


def _fit(word: str, width: int, font: _Font) -> list[str]:
    """Split a word into pieces that are no wider than a line."""
    pieces = []
    while font.getlength(word) > width and len(word) > 1:
        n = next((n for n in range(len(word) - 1, 0, -1) if font.getlength(word[:n]) <= width), 1)
        pieces.append(word[:n])
        word = word[n:]
    return [*pieces, word]


# --- value range: uint8 in files and batches, float32 in [0, 1] in models ---------------------------------


def to_float(image_u8: Any) -> Any:
    """Convert uint8 images, an array of NumPy or jax, to float32 in [0, 1]."""
    if image_u8.dtype != np.uint8:
        raise ValueError(f"Expected images uint8 in [0, 255], got {image_u8.dtype}.")
    return image_u8.astype(np.float32) / np.float32(255.0)


def to_uint8(image: Any) -> np.ndarray:
    """Convert float images in [0, 1] to uint8; values outside are clipped."""
    return np.round(np.clip(np.asarray(image, np.float32), 0.0, 1.0) * 255.0).astype(np.uint8)
