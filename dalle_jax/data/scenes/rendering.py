"""Shapes as signed distances, and scenes as pixels.

Each shape is a function d(u, v) <= 0 inside, in units of its own radius, u right and v down, as in Quilez,
"2D distance functions". A pixel's coverage is clip(1/2 - d * radius_in_pixels, 0, 1), which antialiases at
any size. Only +, *, min, max, sqrt and rint touch pixels: IEEE fixes their results, so the bytes are equal
everywhere.

S side of the image, H W height and width of one object's patch, 3 color planes."""

import math
from functools import lru_cache

import numpy as np

from dalle_jax.data.scenes.scene import Background, Scene, SceneObject

REACH = 1.11  # farthest point of any shape from its center, in radii
MIN_SIDE, MAX_SIDE = 32, 256

TONES = {
    "red": (222, 36, 40),
    "orange": (250, 136, 16),
    "yellow": (250, 214, 24),
    "green": (30, 156, 66),
    "cyan": (24, 200, 214),
    "blue": (34, 76, 214),
    "purple": (132, 52, 190),
    "pink": (244, 98, 172),
    "brown": (126, 74, 36),
    "black": (26, 26, 32),
}
TINT = 0.45  # how far the second tone of a striped or dotted fill lies from the color towards white
TINTS = {name: tuple(round(c + TINT * (255 - c)) for c in tone) for name, tone in TONES.items()}
RIM = 0.18  # outline of plain color around a striped or dotted fill, in radii: keeps the silhouette whole

_PIXELS = np.arange(MAX_SIDE, dtype=np.float32) + np.float32(0.5)
# Half a level is added to every tone at the start: blending keeps it, and the cut to uint8 then rounds.
_TONE_31 = {
    name: np.array(tone, np.float32).reshape(3, 1, 1) + np.float32(0.5) for name, tone in TONES.items()
}
_STEP_31 = {
    name: np.array(TINTS[name], np.float32).reshape(3, 1, 1) - _TONE_31[name] + np.float32(0.5)
    for name in TONES
}


def _length(u, v):
    return np.sqrt(u * u + v * v)


def circle(u, v):
    return _length(u, v) - 1.0


def square(u, v):
    return np.maximum(np.abs(u), np.abs(v)) - 0.78


def triangle(u, v):
    side = 0.892 * np.abs(u) - 0.452 * v - 0.452  # line from (0, -1) to (0.86, 0.7)
    return np.maximum(side, v - 0.7)


def star(u, v):
    # Two reflections fold the five points onto one; what is left is half of its edge.
    u = np.abs(u)
    for k in (0.809017, -0.809017):
        over = 2.0 * np.maximum(k * u + 0.587785 * v, 0.0)
        u = u - k * over
        v = v - 0.587785 * over
    return 0.908 * np.abs(u) - 0.418 * (v + 1.1)


def heart(u, v):
    s, t = np.abs(u) - 0.455, v + 0.35  # from the center of one lobe
    lobe = _length(s, t) - 0.535
    flank = 0.7843 * s + 0.6204 * t - 0.535  # tangent of the lobe, through the tip
    cone = np.maximum(np.maximum(flank, -t), 0.6204 * s - 0.7843 * t)
    return np.minimum(lobe, cone)


def cross(u, v):
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - 1.04, np.minimum(u, v) - 0.36)


def diamond(u, v):
    return 0.8192 * np.abs(u) + 0.5735 * np.abs(v) - 0.6309  # half width 0.77, half height 1.1


def ring(u, v):
    return np.abs(_length(u, v) - 0.75) - 0.33


def crescent(u, v):
    u = u - 0.08
    return np.maximum(_length(u, v) - 1.06, 0.85 - _length(u - 0.6, v))


def semicircle(u, v):
    v = v - 0.48
    return np.maximum(_length(u, v) - 1.0, v)


def arrow(u, v):
    v = np.abs(v)
    shaft = np.maximum(v - 0.32, np.abs(u + 0.48) - 0.58)
    head = np.maximum(0.6606 * u + 0.751 * v - 0.7135, -0.05 - u)  # from (1.08, 0) to (0, 0.95)
    return np.minimum(shaft, head)


def hourglass(u, v):
    v = np.abs(v)
    return np.maximum(v - 0.85, 0.817 * np.abs(u) - 0.577 * v - 0.09)


SHAPE_DISTANCES = {
    f.__name__: f
    for f in (
        circle,
        square,
        triangle,
        star,
        heart,
        cross,
        diamond,
        ring,
        crescent,
        semicircle,
        arrow,
        hourglass,
    )
}


@lru_cache(maxsize=1024)
def _turn(angle: float) -> tuple[float, float]:
    # cos and sin come from libm, which may differ in the last bit between machines: round that away
    return round(math.cos(math.radians(angle)), 6), round(math.sin(math.radians(angle)), 6)


@lru_cache(maxsize=1024)
def _raised(tone: tuple[int, int, int]) -> np.ndarray:
    raised_3 = np.array(tone, np.float32)[:, None] + np.float32(0.5)
    raised_3.setflags(write=False)  # shared by all threads
    return raised_3


def _shape_coordinates(
    x: float, y: float, diameter: float, angle: float, side: int, reach: float = REACH, pad: float = 1.0
):
    """Return the pixels that an object can touch, and their coordinates in the object's frame.

    x, y, diameter: in [0, 1]. angle: degrees. side: pixels. Returns (rows, columns, u_HW, v_HW, radius), the
    first two slices, the last the radius in pixels. The slices are empty if the object lies outside the
    image."""
    radius = diameter * side * 0.5
    extent = reach * radius + pad
    cx, cy = x * side, y * side
    columns = slice(max(0, int(cx - extent)), max(0, min(side, int(cx + extent) + 1)))
    rows = slice(max(0, int(cy - extent)), max(0, min(side, int(cy + extent) + 1)))
    c, s = _turn(angle)
    along = (_PIXELS[columns] - cx) / radius
    down = ((_PIXELS[rows] - cy) / radius)[:, None]
    return rows, columns, c * along + s * down, c * down - s * along, radius


def shape_coverage(distance_HW, radius: float):
    """Return the fraction of each pixel that the shape covers, float32 in [0, 1], from its signed distance in radii."""
    fraction_HW = distance_HW * -radius
    fraction_HW += 0.5
    return np.minimum(np.maximum(fraction_HW, 0.0, out=fraction_HW), 1.0, out=fraction_HW)


def _stripes_fill(u, v):
    """Return the distance of each position to the light bands of a striped fill, in radii: slanted bands, period
    0.6."""
    t = (u + v) * (0.7071 / 0.6)
    return (np.abs(t - np.rint(t)) - 0.25) * 0.6


def _dots_fill(u, v):
    """Return the distance of each position to the light dots of a dotted fill, in radii: a square grid, spacing
    0.52."""
    s, t = u * (1 / 0.52), v * (1 / 0.52)
    return _length(s - np.rint(s), t - np.rint(t)) * 0.52 - 0.18


FILL_DISTANCES = {"striped": _stripes_fill, "dotted": _dots_fill}


def _backdrop(background: Background, side: int):
    """Float32 (3, S, S) canvas of the background, every tone raised by one half."""
    canvas_3SS = np.empty((3, side, side), np.float32)
    first_3 = _raised(background.tones[0])
    if background.kind == "plain":
        canvas_3SS[...] = first_3[:, :, None]
        return canvas_3SS
    step_3 = _raised(background.tones[1]) - first_3
    if background.kind == "gradient":
        t_S = _PIXELS[:side] / side
    else:
        t_S = np.minimum(np.maximum(_PIXELS[:side] - (background.split * side - 0.5), 0.0), 1.0)
    line_3S = first_3 + step_3 * t_S
    canvas_3SS[...] = line_3S[:, None, :] if background.axis == "x" else line_3S[:, :, None]
    return canvas_3SS


def _draw(canvas_3SS, thing: SceneObject, side: int) -> None:
    rows, columns, u, v, radius = _shape_coordinates(thing.x, thing.y, thing.diameter, thing.angle, side)
    d_HW = SHAPE_DISTANCES[thing.shape](u, v)
    ink_3HW = _TONE_31[thing.color]
    if thing.fill != "solid":
        light_HW = shape_coverage(np.maximum(FILL_DISTANCES[thing.fill](u, v), d_HW + RIM), radius)
        ink_3HW = ink_3HW + _STEP_31[thing.color] * light_HW
    patch_3HW = canvas_3SS[:, rows, columns]
    patch_3HW += shape_coverage(d_HW, radius) * (ink_3HW - patch_3HW)


def render_scene(scene: Scene, size: int) -> np.ndarray:
    """Render a scene.

    size: side of the image in pixels, 32..256. Returns uint8 (size, size, 3). The same scene at two sizes
    is the same image. Raises ValueError if size is out of range."""
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not MIN_SIDE <= size <= MAX_SIDE:
        raise ValueError(
            f"Expected a size of {MIN_SIDE} to {MAX_SIDE} pixels, got {size!r}. Render in that range and resize."
        )
    size = int(size)
    canvas_3SS = _backdrop(scene.background, size)
    for thing in scene.objects:
        _draw(canvas_3SS, thing, size)
    image_SS3 = np.empty((size, size, 3), np.uint8)
    for channel, plane_SS in enumerate(canvas_3SS.astype(np.uint8)):  # three times the speed of one transpose
        image_SS3[..., channel] = plane_SS
    return image_SS3
