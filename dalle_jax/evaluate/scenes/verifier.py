"""Detection of the objects in an image of a procedural scene, and verification of a caption's facts.

Analysis by synthesis, without a learned model: regions.py finds what differs from the background, masks.py turns it
into a soft mask per object, shape_fit.py renders every shape over the mask and keeps the best.

S side of the image, H W height and width of a window, 3 color channels."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from dalle_jax.data.scenes.captions import Facts
from dalle_jax.data.scenes.rendering import MAX_SIDE, MIN_SIDE
from dalle_jax.data.scenes.scene import DIAMETERS, relation_holds
from dalle_jax.evaluate.scenes.masks import object_masks
from dalle_jax.evaluate.scenes.regions import MIN_AREA, fit_background, regions_of_objects
from dalle_jax.evaluate.scenes.shape_fit import BLURS, fit_color_and_fill, fit_shape

MIN_CONFIDENCE = 0.80  # overlap with the rendered shape below which a region is no shape
_WORKING_SIDE = 64  # larger images are averaged down to this where their side is a multiple of it


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectedObject:
    """An object detected in an image.

    Attributes:
        shape, color, size, fill: a word of SHAPES, COLORS, SIZES, FILLS.
        x, y: center in [0, 1], y downwards.
        diameter: fraction of the side.
        confidence: overlap of the region with the rendered shape, in [0, 1]; below MIN_CONFIDENCE no fact holds by it.
    """

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    diameter: float
    confidence: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """The verdict on an image.

    Attributes:
        right: whether every fact holds.
        score: fraction of the facts that hold.
        failed: descriptions of those that do not.
    """

    right: bool
    score: float
    failed: tuple[str, ...]


def _pixels(image) -> np.ndarray:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
        raise ValueError(
            f"Expected a square image of shape (side, side, 3), got {image.shape}. Crop it, channels last."
        )
    side = image.shape[0]
    if not MIN_SIDE <= side <= MAX_SIDE:
        raise ValueError(f"Expected a side of {MIN_SIDE} to {MAX_SIDE} pixels, got {side}. Resize the image.")
    if image.dtype == np.uint8:
        image_SS3 = image * np.float64(1 / 255)
    elif np.issubdtype(image.dtype, np.floating):
        image_SS3 = image.astype(np.float64)
        if not np.isfinite(image_SS3).all() or image_SS3.min() < 0 or image_SS3.max() > 1:
            raise ValueError(
                "Expected finite floats in [0, 1], got values outside. Clip the image or pass uint8."
            )
    else:
        raise ValueError(f"Expected uint8 or floats in [0, 1], got {image.dtype}. Convert the image.")
    step = side // _WORKING_SIDE
    if step > 1 and side == step * _WORKING_SIDE:
        image_SS3 = image_SS3.reshape(_WORKING_SIDE, step, _WORKING_SIDE, step, 3).mean((1, 3))
    return image_SS3


def _size_of(diameter):
    return min(DIAMETERS, key=lambda size: abs(np.log(diameter / DIAMETERS[size])))


def _found(masks, image_HW3, ground_HW3, top, left, side) -> DetectedObject:
    blurs = len(BLURS) if side >= 48 else len(BLURS) - 1
    fit = fit_shape([mask_HW.astype(np.float32) for mask_HW in masks], blurs)
    color, fill = fit_color_and_fill(fit, image_HW3, ground_HW3)
    x, y, r, _ = fit.pose_4.tolist()
    diameter = 2 * r / side
    return DetectedObject(
        shape=fit.shape,
        color=color,
        size=_size_of(diameter),
        fill=fill,
        x=(x + left) / side,
        y=(y + top) / side,
        diameter=diameter,
        confidence=fit.score if 0.22 <= diameter <= 0.70 else 0.0,  # no size of the scenes
    )


def _read_region(image_SS3, ground_SS3, flat, side) -> list[DetectedObject]:
    rows, columns = flat // side, flat % side
    top, bottom = max(0, int(rows.min()) - 2), min(side, int(rows.max()) + 3)
    left, right = max(0, int(columns.min()) - 2), min(side, int(columns.max()) + 3)
    own_HW = np.zeros((bottom - top, right - left), bool)
    own_HW[rows - top, columns - left] = True
    window = np.s_[top:bottom, left:right]
    return [
        _found(*parts, top, left, side)
        for parts in object_masks(image_SS3[window], ground_SS3[window], own_HW, side)
        if parts[0][0].sum() >= MIN_AREA * side * side
    ]


def _least(found) -> float:
    return min((one.confidence for one in found), default=0.0)


def _read(image) -> tuple[tuple[DetectedObject, ...], str | None]:
    image_SS3 = _pixels(image)
    side = image_SS3.shape[0]
    behind = fit_background(image_SS3)
    if behind is None:
        return (), None
    ground_SS3, kind = behind
    found = []
    for flat, pieces in regions_of_objects(image_SS3, ground_SS3):
        whole: list[DetectedObject] = _read_region(image_SS3, ground_SS3, flat, side)
        # Neighbors that blur has joined, or one object with a loose pattern: the better reading wins.
        if len(pieces) > 1 and _least(whole) < 0.9:
            cut = [one for piece in pieces for one in _read_region(image_SS3, ground_SS3, piece, side)]
            whole = cut if _least(cut) > _least(whole) else whole
        found += whole
    return tuple(found), kind


def detect_objects(image) -> tuple[DetectedObject, ...]:
    """Detect the objects of an image.

    Args:
        image: uint8, or floats in [0, 1], of shape (side, side, 3) with a side of 32 to 256.

    Returns:
        Objects in reading order of their regions, an outer object before an inner one. A region that is no shape has a
        confidence below MIN_CONFIDENCE. () where no light background is found.

    Raises:
        ValueError: another shape, dtype or range.
    """
    return _read(image)[0]


def _failures(facts: Facts, chosen: list[DetectedObject | None]) -> list[str]:
    """The facts that fail if chosen[i] is the object of facts.objects[i]; None is a missing object."""
    failed = []
    for fact, found in zip(facts.objects, chosen, strict=True):
        name = f"{fact.color} {fact.shape}"
        if found is None:
            failed.append(f"{name}: missing")
        for word, got in (("size", found and found.size), ("fill", found and found.fill)):
            want = getattr(fact, word)
            if want is not None and want != got:
                failed.append(f"{name}: {word} {want}, got {got}")
    for relation in facts.relations:
        things = [chosen[i] for i in (relation.subject, *relation.others)]
        if None in things or not relation_holds(relation.name, *things):
            names = [
                f"{facts.objects[i].color} {facts.objects[i].shape}"
                for i in (relation.subject, *relation.others)
            ]
            failed.append(f"{names[0]} {relation.name} {' and '.join(names[1:])}")
    return failed


def _assignments(facts: Facts, found: tuple[DetectedObject, ...]):
    """All assignments of different detected objects of the right color and shape to the objects of the facts."""
    sure = [f for f in found if f.confidence >= MIN_CONFIDENCE]
    wanted: dict[tuple[str, str], list[int]] = {}
    for i, fact in enumerate(facts.objects):
        wanted.setdefault((fact.color, fact.shape), []).append(i)
    ways: list[list[DetectedObject | None]] = [[None] * len(facts.objects)]
    for (color, shape), positions in wanted.items():
        same: list[DetectedObject | None] = [*[f for f in sure if (f.color, f.shape) == (color, shape)][:5]]
        same += [None] * max(0, len(positions) - len(same))
        orders = list(permutations(same, len(positions)))
        grown = []
        for way in ways:
            for order in orders:
                grown.append(list(way))
                for position, one in zip(positions, order, strict=True):
                    grown[-1][position] = one
        ways = grown
    return ways


def verify_scene(image, facts: Facts) -> Verdict:
    """Check whether an image agrees with a caption.

    A right image has each object with its color and shape, with its size and fill where they are stated, each relation,
    and the count and the background where they are stated; and no region that is no shape.

    Args:
        image: as for `detect_objects`.
        facts: of a Caption, with at least one object.

    Raises:
        ValueError: an invalid image, or facts without objects.
    """
    if not facts.objects:
        raise ValueError("Expected facts with at least one object, got none. Take them from a Caption.")
    found, kind = _read(image)
    failed = min((_failures(facts, way) for way in _assignments(facts, found)), key=len)
    total = len(facts.relations)
    total += sum(1 + (o.size is not None) + (o.fill is not None) for o in facts.objects)
    if facts.count is not None:
        total += 1
        if len(found) != facts.count:
            failed.append(f"count: {facts.count}, got {len(found)}")
    if facts.background is not None:
        total += 1
        if kind != facts.background:
            failed.append(f"background: {facts.background}, got {kind}")
    return Verdict(right=not failed, score=1 - len(failed) / total, failed=tuple(failed))
