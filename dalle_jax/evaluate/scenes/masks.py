"""Soft masks of the one or two objects in a region, from their colors.

The mask of a region of one color is the fraction of the way from the background to that color, at each pixel. A second
color belongs to an inner object, or to a neighbor that touches.

H W height and width of the region's window, N pixels, C colors, 3 color channels."""

import numpy as np

from dalle_jax.data.scenes.rendering import TINTS, TONES
from dalle_jax.data.scenes.scene import COLORS
from dalle_jax.evaluate.scenes.regions import (
    bounding_box,
    connected_regions,
    dilate,
    erode,
    flood_fill,
    overlap_fractions,
)

TONES_C3 = np.array([TONES[c] for c in COLORS]) / 255
STEPS_C3 = np.array([TINTS[c] for c in COLORS]) / 255 - TONES_C3  # from a color to its tint


def _color_distance(pixels_N3):
    """(N, C) distance of each pixel to the nearest tone between a color and its tint."""
    off_NC3 = pixels_N3[:, None] - TONES_C3
    share_NC = np.clip((off_NC3 * STEPS_C3).sum(2) / (STEPS_C3**2).sum(1), 0, 1)
    return np.sqrt(((off_NC3 - share_NC[..., None] * STEPS_C3) ** 2).sum(2))


def _labels(pixels_N3, inner_N):
    """(nearest color of each pixel, whether it is inside and near enough to count)."""
    distance_NC = _color_distance(pixels_N3)
    return distance_NC.argmin(1), (distance_NC.min(1) < 0.16) & inner_N


def _second_color(image_HW3, own_HW, inner_HW, side):
    """(main color, its pure pixels, second color, its largest pure part); the last two None without one."""
    label_N, pure_N = _labels(image_HW3[own_HW], inner_HW[own_HW])
    count_C = np.bincount(label_N[pure_N], minlength=len(COLORS))
    main = int(count_C.argmax())
    if count_C[main] == 0:
        main = int(_color_distance(np.median(image_HW3[own_HW], 0)[None])[0].argmin())
    least = max(3, 0.002 * side * side)
    main_HW = np.zeros(own_HW.shape, bool)
    main_HW[own_HW] = pure_N & (label_N == main)
    best, color = None, None
    for other in np.flatnonzero(count_C >= least):
        if other == main:
            continue
        pure_HW = np.zeros(own_HW.shape, bool)
        pure_HW[own_HW] = pure_N & (label_N == other)
        for part in connected_regions(pure_HW):
            if len(part) >= least and (best is None or len(part) > len(best)):
                best, color = part, int(other)
    if best is None:
        return main, main_HW, None, None
    seed_HW = np.zeros(own_HW.shape, bool)
    seed_HW.ravel()[best] = True
    other_HW = np.zeros(own_HW.shape, bool)
    other_HW[own_HW] = pure_N & (label_N == color)
    if _spans(other_HW, main_HW):  # a wide guest can have more pure pixels than the host around it
        return color, other_HW, main, main_HW
    return main, main_HW, color, seed_HW


def _spans(outer_HW, inner_HW) -> bool:
    """True if the bounding box of one mask lies strictly within that of the other."""
    width = outer_HW.shape[1]
    top, left, bottom, right = bounding_box(np.flatnonzero(outer_HW), width)
    a, b, c, d = bounding_box(np.flatnonzero(inner_HW), width)
    return top < a and left < b and bottom > c and right > d


def _soft_masks(image_HW3, ground_HW3, tone_3, own_HW) -> list[np.ndarray]:
    """Soft masks of a region of one color: how far each pixel has gone from the background to the tone.

    Where its inside is lighter than the tone, a second one has the inside filled: a pattern, or else a
    blur."""
    way_HW3 = tone_3 - ground_HW3
    gone_HW3 = image_HW3 - ground_HW3
    length2_HW = (way_HW3**2).sum(2)
    share_HW = np.clip((gone_HW3 * way_HW3).sum(2) / length2_HW, 0, 1) * own_HW
    # A pixel that touches no background lies inside: the rim keeps light patterns away from the background.
    inner_HW = erode((np.sqrt((gone_HW3**2).sum(2) / length2_HW) > 0.3) & own_HW)
    if inner_HW.any() and share_HW[inner_HW].mean() < 0.95:
        return [share_HW, np.where(inner_HW, 1.0, share_HW)]
    return [share_HW]


def object_masks(image_HW3, ground_HW3, own_HW, side):
    """Return [(candidate soft masks, image, background)] of the one or two objects in a region, the outer one first."""
    inner_HW = erode(own_HW)
    if not inner_HW.any():
        inner_HW = own_HW
    main, main_HW, second, seed_HW = _second_color(image_HW3, own_HW, inner_HW, side)
    tone_3 = TONES_C3[main]
    if seed_HW is None:
        return [(_soft_masks(image_HW3, ground_HW3, tone_3, dilate(own_HW)), image_HW3, ground_HW3)]
    way_3 = TONES_C3[second] - tone_3
    share_HW = np.clip(((image_HW3 - tone_3) @ way_3) / (way_3 @ way_3), 0, 1)
    other_HW = flood_fill((share_HW > 0.3) & inner_HW, seed_HW)
    near_HW = dilate(other_HW)
    if not (near_HW & ~own_HW).any():  # enclosed: an inner object over the outer one
        host_HW = np.clip(_soft_masks(image_HW3, ground_HW3, tone_3, dilate(own_HW))[0], 0, 1)
        near_HW1 = near_HW[..., None]
        return [
            ([np.where(near_HW, 1.0, host_HW)], np.where(near_HW1, tone_3, image_HW3), ground_HW3),
            ([share_HW * near_HW], image_HW3, np.broadcast_to(tone_3, image_HW3.shape)),
        ]
    first_HW, other_HW = overlap_fractions(own_HW, [main_HW, seed_HW])  # two that touch
    return [
        (_soft_masks(image_HW3, ground_HW3, tone_3, dilate(first_HW) & ~other_HW), image_HW3, ground_HW3),
        (
            _soft_masks(image_HW3, ground_HW3, TONES_C3[second], dilate(other_HW) & ~first_HW),
            image_HW3,
            ground_HW3,
        ),
    ]
