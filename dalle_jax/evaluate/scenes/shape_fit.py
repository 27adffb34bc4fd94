"""Shape, color and fill of a soft mask, found by rendering every candidate and comparing.

Each shape starts at the mask's area and centroid; the best ones are moved, scaled and rotated by Gauss-Newton steps;
the largest overlap wins. Renderings may be blurred, as the images of a learned decoder are.

H W height and width of the window, P poses (x, y, radius in pixels; angle in radians), N pixels, F fills,
C colors."""

from dataclasses import dataclass

import numpy as np

from dalle_jax.data.scenes.rendering import FILL_DISTANCES, MAX_SIDE, RIM, SHAPE_DISTANCES, shape_coverage
from dalle_jax.data.scenes.scene import COLORS, FILLS, SHAPES
from dalle_jax.evaluate.scenes.masks import STEPS_C3, TONES_C3

MIN_GAIN = 0.4  # fraction of a pattern's contrast below which a fill counts as solid
_CENTERS = np.arange(MAX_SIDE, dtype=np.float32) + np.float32(0.5)


def _unit_table():
    """Area and centroid of each shape of radius 1, by counting fine cells."""
    axis = (np.arange(400) + 0.5) / 400 * 2.4 - 1.2
    u, v = np.broadcast_arrays(axis[None, :], axis[:, None])
    table = {}
    for shape in SHAPES:
        inside = SHAPE_DISTANCES[shape](u, v) < 0
        table[shape] = (inside.sum() * (2.4 / 400) ** 2, u[inside].mean(), v[inside].mean())
    return table


_UNIT = _unit_table()
# Kernels (center, first neighbor, ...) that may have blurred the image, of standard deviation
# 0, 0.5, 0.7 and 1 pixel; the last is for images so large that it blurs no small shape.
BLURS = ((1.0,), (0.76, 0.12), (0.5, 0.25), (0.375, 0.25, 0.0625))
# Half steps of the fit: place and radius in radii, angle in radians.
_NUDGE = np.array([0.05, 0.05, 0.04, 0.05], np.float32)
_TRIALS = np.concatenate([np.zeros((1, 4)), np.eye(4), -np.eye(4)]).astype(np.float32)
_DAMP, _FLOOR = np.ones((4, 4)) + 0.02 * np.eye(4), 1e-3 * np.eye(4)  # a circle has no angle to solve for


def _frame(pose_P4, height, width):
    """Places of the pixels in the frames of P poses, u and v of (P, H, W), and the radii (P, 1, 1)."""
    pose_P4 = pose_P4.astype(np.float32)
    x, y, r, a = (pose_P4[:, i, None, None] for i in range(4))
    c, s = np.cos(a), np.sin(a)
    along = (_CENTERS[:width] - x) / r
    down = (_CENTERS[:height, None] - y) / r
    return c * along + s * down, c * down - s * along, r


def _blurred(image_PHW, blur):
    """Each plane smoothed by a kernel of BLURS along both axes; what lies outside counts as empty."""
    center, *taps = BLURS[blur]
    for axis in (1, 2):
        if not taps:
            return image_PHW
        smooth_PHW = center * image_PHW
        for step, tap in enumerate(taps, 1):
            near, far = [slice(None)] * 3, [slice(None)] * 3
            near[axis], far[axis] = slice(step, None), slice(None, -step)
            part_PHW = tap * image_PHW
            smooth_PHW[tuple(near)] += part_PHW[tuple(far)]
            smooth_PHW[tuple(far)] += part_PHW[tuple(near)]
        image_PHW = smooth_PHW
    return image_PHW


def _rendered(shape, pose_P4, height, width, blur):
    """Coverage (P, H, W) of a shape at P poses, seen through a kernel of BLURS."""
    u, v, r = _frame(pose_P4, height, width)
    return _blurred(shape_coverage(SHAPE_DISTANCES[shape](u, v), r), blur)


def _score(shape, pose_4, mask_HW, blur) -> float:
    """Soft intersection over union of a drawing with the mask."""
    rendered_HW = _rendered(shape, pose_4[None], *mask_HW.shape, blur)[0]
    both = float(np.minimum(rendered_HW, mask_HW).sum())
    return both / max(float(rendered_HW.sum()) + float(mask_HW.sum()) - both, 1e-9)


def _first_pose(shape, mass, cx, cy):
    """The upright pose with the mask's area and centroid."""
    area, ox, oy = _UNIT[shape]
    r = (mass / area) ** 0.5
    return np.array([cx - r * ox, cy - r * oy, r, 0.0])


def _refined(shape, pose_4, mask_HW, blur, rounds):
    """The pose after Gauss-Newton steps on the squared difference of drawing and mask."""
    height, width = mask_HW.shape
    for _ in range(rounds):
        unit_4 = _NUDGE * np.array([pose_4[2], pose_4[2], pose_4[2], 1.0])
        trial_94 = pose_4 + _TRIALS * unit_4
        rendered_9N = _rendered(shape, trial_94, height, width, blur).reshape(9, -1)
        slope_4N = rendered_9N[1:5] - rendered_9N[5:]  # per two nudges
        normal_44 = slope_4N @ slope_4N.T * _DAMP + _FLOOR
        move_4 = np.linalg.solve(normal_44, slope_4N @ (mask_HW.ravel() - rendered_9N[0])) * 2
        pose_4 = pose_4 + np.clip(move_4, -4, 4) * unit_4
        pose_4[2] = max(pose_4[2], 1.0)
        pose_4[3] = min(max(pose_4[3], -0.21), 0.21)
    return pose_4


@dataclass(slots=True)
class ShapeFit:
    """A shape at a pose, blurred by the kernel BLURS[blur]; score: its overlap with the mask."""

    shape: str
    pose_4: np.ndarray
    blur: int
    score: float


def fit_shape(masks, blurs) -> ShapeFit:
    """Return the shape with the largest overlap with one of the masks, for any of the first `blurs` kernels."""
    height, width = masks[0].shape
    tries = []
    for mask_HW in masks:
        mass = float(mask_HW.sum())
        cx = float(mask_HW.sum(0) @ _CENTERS[:width]) / mass
        cy = float(mask_HW.sum(1) @ _CENTERS[:height]) / mass
        for shape in SHAPES:
            pose_4 = _first_pose(shape, mass, cx, cy)
            tries.append((_score(shape, pose_4, mask_HW, 1), shape, pose_4, mask_HW))
    tries.sort(key=lambda t: -t[0])
    best = ShapeFit(tries[0][1], tries[0][2], 0, -1.0)
    for first, shape, pose_4, mask_HW in tries[:5]:
        if first < best.score - 0.15:  # a fit from here gains less than this
            break
        pose_4 = _refined(shape, pose_4, mask_HW, 1, rounds=2)
        score, blur = max((_score(shape, pose_4, mask_HW, blur), -blur) for blur in range(blurs))
        if score > best.score:
            best, best_mask_HW = ShapeFit(shape, pose_4, -blur, score), mask_HW
    pose_4 = _refined(best.shape, best.pose_4, best_mask_HW, best.blur, rounds=1)
    score = _score(best.shape, pose_4, best_mask_HW, best.blur)
    return ShapeFit(best.shape, pose_4, best.blur, score) if score > best.score else best


def fit_color_and_fill(fit: ShapeFit, image_HW3, ground_HW3):
    """Return the color and fill whose rendering over the background is nearest to the pixels.

    A patterned rendering is the plain one plus gain * light * (tint - tone); a pattern counts where the gain that fits
    best is at least MIN_GAIN, so that noise is none."""
    height, width = image_HW3.shape[:2]
    u, v, r = (a[0] for a in _frame(fit.pose_4[None], height, width))
    r = r.item()
    d_HW = SHAPE_DISTANCES[fit.shape](u, v)
    cover_HW = np.clip(0.5 - d_HW * r, 0, 1)
    seen_HW = _blurred(cover_HW[None], fit.blur)[0]
    on_HW = seen_HW > 0.5
    share_N1 = seen_HW[on_HW][:, None]
    rest_N3 = image_HW3[on_HW] - (1 - share_N1) * ground_HW3[on_HW]  # what the object itself has added
    off_NC3 = rest_N3[:, None] - share_N1[:, :, None] * TONES_C3
    errors_FC, gains_FC = [(off_NC3**2).sum((0, 2))], [np.zeros(len(COLORS))]
    step2_C = (STEPS_C3**2).sum(1)
    for fill in FILLS[1:]:
        light_HW = cover_HW * np.clip(0.5 - np.maximum(FILL_DISTANCES[fill](u, v), d_HW + RIM) * r, 0, 1)
        light_N = _blurred(light_HW[None], fit.blur)[0][on_HW]
        along_C = np.einsum("nc,n->c", (off_NC3 * STEPS_C3).sum(2), light_N)
        power_C = max(float(light_N @ light_N), 1e-6) * step2_C
        gain_C = np.clip(along_C / power_C, 0, 1.2)
        errors_FC.append(errors_FC[0] - 2 * gain_C * along_C + gain_C**2 * power_C)
        gains_FC.append(gain_C)
    errors_FC = np.array(errors_FC)
    color = int(np.argmin(errors_FC.min(0)))
    fill = int(np.argmin(errors_FC[:, color]))
    if gains_FC[fill][color] < MIN_GAIN:
        fill = 0
    return COLORS[color], FILLS[fill]
