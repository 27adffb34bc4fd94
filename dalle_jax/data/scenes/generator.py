"""Procedural captioned scenes of colored shapes, generated on demand by index. Nothing is downloaded.

The layout of a scene comes first: sizes, then positions that cannot overlap. Then come its objects: shapes and colors,
sampled again while they show a held-out composition. See scene.py for the records and the held-out sets, rendering.py
for the pixels, captions.py for the words; their public names are importable from here.

    scene_7 = scene(7)
    image = render(scene_7, 64)                       # uint8 (64, 64, 3)
    english, chinese = captions(scene_7, index=7)
"""

from typing import Literal

from dalle_jax.data.scenes.captions import (
    Caption,
    Facts,
    ObjectFact,
    caption_facts_hold,
    check_caption_languages,
    scene_caption,
    scene_captions,
)
from dalle_jax.data.scenes.rendering import REACH, TONES, render_scene
from dalle_jax.data.scenes.scene import (
    BACKGROUNDS,
    COLORS,
    DIAMETERS,
    FILLS,
    HOSTS,
    JITTER,
    LANGUAGES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Background,
    CounterRNG,
    Relation,
    Scene,
    SceneObject,
    held_out_compositions,
    held_out_pairs,
    held_out_relations,
    is_side,
    relation_holds,
    shows_held_out_relation,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "FILLS",
    "LANGUAGES",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "Background",
    "Caption",
    "Facts",
    "ObjectFact",
    "Relation",
    "Scene",
    "SceneObject",
    "caption_facts_hold",
    "generate_evaluation_set",
    "generate_scene",
    "held_out_compositions",
    "held_out_pairs",
    "held_out_relations",
    "relation_holds",
    "render_scene",
    "scene_captions",
]  # fmt: skip

EDGE = 0.01  # free margin, fraction of the side
GAP = 0.02  # smallest distance of the circles around two objects
LIGHTS = ((252, 252, 252), (250, 246, 236), (240, 242, 246))
PASTELS = (
    (204, 224, 250),
    (206, 240, 218),
    (250, 222, 222),
    (226, 214, 248),
    (246, 230, 198),
    (216, 218, 224),
)
TURNS = tuple(range(-10, 11))  # degrees; small enough that a square never looks like a diamond

_PAIRS = sorted(held_out_pairs())
_TRIPLES = sorted(held_out_relations())
_SIDES = ("left of", "above")


def _stands_out(a: str, b: str) -> bool:
    """Return whether two colors also differ in lightness: compression loses hue first."""
    step = [p - q for p, q in zip(TONES[a], TONES[b], strict=True)]
    luma = 0.299 * step[0] + 0.587 * step[1] + 0.114 * step[2]
    return abs(luma) > 35 and sum(d * d for d in step) > 115**2


# Color of the outer object -> colors of an object inside it.
_ON = {host: tuple(c for c in COLORS if _stands_out(c, host)) for host in COLORS}


def _spread(stream: CounterRNG, widths: list[float]) -> list[float]:
    """Sample centers of intervals of these widths, one after another in [0, 1]."""
    free = 1.0 - 2 * EDGE - GAP * (len(widths) - 1) - sum(widths)
    cuts = sorted([stream.random() for _ in widths])
    centers, start = [], EDGE
    for width, cut in zip(widths, cuts, strict=True):
        centers.append(start + width / 2 + cut * free)
        start += width + GAP
    return centers


def _pair(stream: CounterRNG, widths: list[float]) -> list[tuple[float, float]]:
    """Place two objects side by side along the first axis; their offset along the second is clearly smaller."""
    along = _spread(stream, widths)
    across = [_spread(stream, [w])[0] for w in widths]
    most = 0.7 * (along[1] - along[0])
    offset = across[1] - across[0]
    if abs(offset) > most:  # the narrower one has the room to move
        limit = most if offset > 0 else -most
        if widths[0] < widths[1]:
            across[0] = across[1] - limit
        else:
            across[1] = across[0] + limit
    return list(zip(along, across, strict=True))


def _row(stream: CounterRNG, widths: list[float]) -> list[tuple[float, float]]:
    """Place three objects in a row along the first axis, nearly level."""
    level = _spread(stream, [max(widths) + 0.06])[0]
    return [(x, level + 0.06 * (stream.random() - 0.5)) for x in _spread(stream, widths)]


def _grid(stream: CounterRNG, widths: list[float]) -> list[tuple[float, float]]:
    """Place three or four objects in two bands along the first axis, so that no two overlap."""
    bands = [widths[:2], widths[2:]]
    levels = _spread(stream, [max(band) for band in bands])
    places = []
    for band, level in zip(bands, levels, strict=True):
        for x, width in zip(_spread(stream, band), band, strict=True):
            places.append((x, level + (max(band) - width) * (stream.random() - 0.5)))
    return places


def _sizes(stream: CounterRNG, count: int, layout: str, sizes: tuple[str, ...]) -> list[str]:
    """Sample allowed sizes that fit the layout; the first is large if another object is inside it."""
    if layout == "row":
        return ["small"] * 3
    if layout == "inside":
        return ["large"] + ["small"] * (count - 1)
    if count == 1:
        return [stream.choice(sizes)]
    many = tuple(size for size in sizes if size != "large")
    chosen = [stream.choice(many) for _ in range(count)]
    if (
        count == 2 and not stream.integers(3) and {"small", "large"} <= set(sizes)
    ):  # they fit beside each other
        chosen = ["large", "small"] if stream.integers(2) else ["small", "large"]
    return chosen


def _layout(stream: CounterRNG, count: int, sizes: tuple[str, ...]) -> str:
    draw = stream.integers(20)
    if count in (2, 3) and draw < 4 and {"small", "large"} <= set(sizes):
        return "inside"
    if count == 3 and draw < 11 and "small" in sizes:
        return "row"
    return "free"


class _Spot:
    """Position and size of an object without a shape; relations read its x, y and diameter."""

    __slots__ = ("diameter", "size", "x", "y")

    def __init__(self, x, y, diameter, size):
        self.x, self.y, self.diameter, self.size = x, y, diameter, size


def _place(stream: CounterRNG, count: int, layout: str, allowed: tuple[str, ...]) -> list[_Spot]:
    sizes = _sizes(stream, count, layout, allowed)
    most = 0.0 if layout == "row" else JITTER  # three in a row have no room to grow
    diameters = [DIAMETERS[size] * (1 - JITTER + (JITTER + most) * stream.random()) for size in sizes]
    inner = layout == "inside"
    widths = [REACH * d for d in (diameters[:-1] if inner else diameters)]
    if len(widths) == 1:
        places = [(_spread(stream, widths)[0], _spread(stream, widths)[0])]
    elif len(widths) == 2:
        places = _pair(stream, widths)
    else:
        places = _row(stream, widths) if layout == "row" else _grid(stream, widths)
    if stream.integers(2):  # the first axis becomes y
        places = [(y, x) for x, y in places]
    if stream.integers(2) and len(places) == 2:  # the first object comes second
        places = [(1 - x, 1 - y) for x, y in places]
    if inner:  # the inner object is rendered last, over the outer one
        x, y = places[0]
        places.append((x + 0.01 * (stream.random() - 0.5), y + 0.01 * (stream.random() - 0.5)))
    return [_Spot(x, y, d, s) for (x, y), d, s in zip(places, diameters, sizes, strict=True)]


def _relation(stream: CounterRNG, spots: list[_Spot], layout: str) -> Relation | None:
    """Choose the relation of the layout; None for a single object."""
    if len(spots) == 1:
        return None
    if layout == "inside":
        return Relation(name="inside", subject=len(spots) - 1, others=(0,))
    if layout == "row" and stream.integers(4):
        return Relation(name="between", subject=1, others=(0, 2))
    plain = [
        (name, i, j)
        for i, a in enumerate(spots)
        for j, b in enumerate(spots)
        for name in _SIDES
        if i != j and is_side(name, a, b, slack=1.3, min_offset=0.2)
    ]
    name, subject, other = stream.choice(plain)
    return Relation(name=name, subject=subject, others=(other,))


def _held_out_choice(stream: CounterRNG, spots: list[_Spot], relation: Relation | None) -> dict[int, tuple]:
    """Choose the objects that make a scene a held-out one: index -> (color or None, shape)."""
    if relation is not None and relation.name != "between" and stream.integers(2):
        subject, _, other = stream.choice([t for t in _TRIPLES if t[1] == relation.name])
        return {relation.subject: (None, subject), relation.others[0]: (None, other)}
    position = stream.integers(len(spots))
    host = relation is not None and relation.name == "inside" and position == relation.others[0]
    color, shape = stream.choice([pair for pair in _PAIRS if pair[1] in HOSTS] if host else _PAIRS)
    return {position: (color, shape)}


def _fill(stream: CounterRNG, fills: tuple[str, ...]) -> str:
    """Sample a fill; half of the objects are solid if that is allowed."""
    patterns = tuple(fill for fill in fills if fill != "solid")
    plain = "solid" in fills and (not patterns or stream.integers(2))
    return "solid" if plain else stream.choice(patterns)


def _sample_objects(
    stream: CounterRNG, spots: list[_Spot], relation: Relation | None, fixed: dict, fills: tuple[str, ...]
) -> list[SceneObject] | None:
    """Sample objects for the spots without held-out compositions other than the fixed ones; None if that fails."""
    host = guest = None
    if relation is not None and relation.name == "inside":
        host, guest = relation.others[0], relation.subject
    things: list[SceneObject] = []
    for position, spot in enumerate(spots):
        color, shape = fixed.get(position, (None, None))
        for _ in range(64):
            thing = SceneObject(
                shape=shape or stream.choice(HOSTS if position == host else SHAPES),
                color=color or stream.choice(COLORS),
                size=spot.size,
                fill="solid" if position in (host, guest) else _fill(stream, fills),
                x=spot.x,
                y=spot.y,
                diameter=spot.diameter,
                angle=stream.choice(TURNS),
            )
            if _allowed(thing, position, things, guest, host, fixed):
                things.append(thing)
                break
        else:
            return None
    return things


def _allowed(thing: SceneObject, position: int, things: list[SceneObject], guest, host, fixed: dict) -> bool:
    color_fixed = fixed.get(position, (None, None))[0] is not None
    if not color_fixed and (thing.color, thing.shape) in held_out_pairs():
        return False
    for other_position, other in enumerate(things):
        if (thing.color, thing.shape) == (other.color, other.shape):
            return False
        if (position, other_position) == (guest, host) and thing.color not in _ON[other.color]:
            return False
        both_fixed = position in fixed and other_position in fixed
        if not both_fixed and shows_held_out_relation(thing, other):
            return False
    return True


def _background(stream: CounterRNG, kinds: tuple[str, ...]) -> Background:
    kind = stream.choice(kinds)
    axis = "x" if stream.integers(2) else "y"
    first = stream.choice(PASTELS)
    if kind == "plain":
        first = stream.choice(LIGHTS) if stream.integers(2) else first
        return Background(kind=kind, tones=(first, first))
    tones = (first, stream.choice(LIGHTS))
    if stream.integers(2):
        tones = tones[::-1]
    return Background(kind=kind, tones=tones, axis=axis, split=0.35 + 0.3 * stream.random())


def generate_scene(
    index: int,
    *,
    split: str = "train",
    seed: int = 0,
    min_objects: int = 1,
    max_objects: int = 4,
    sizes: tuple[str, ...] = SIZES,
    fills: tuple[str, ...] = FILLS,
    backgrounds: tuple[str, ...] = BACKGROUNDS,
) -> Scene:
    """Return the scene of an index.

    Args:
      index: 0 or more, without an upper limit.
      split: One of SPLITS; each has its own random stream. Scenes of train, val and test never show a held-out
        composition, every scene of held_out shows one.
      seed: Another seed gives another data set.
      min_objects: Smallest number of objects, 1 to 4.
      max_objects: Largest number of objects; the number is uniform between the two.
      sizes: Out of SIZES. Without both small and large no object is inside another.
      fills: Out of FILLS. Objects inside one another are always solid.
      backgrounds: Out of BACKGROUNDS.

    Raises:
      ValueError: An argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"Expected a split out of {SPLITS}, got {split!r}.")
    if index < 0:
        raise ValueError(f"Expected an index of at least 0, got {index}.")
    if not 1 <= min_objects <= max_objects <= 4:
        raise ValueError(
            f"Expected 1 <= min_objects <= max_objects <= 4, got {min_objects} and {max_objects}."
        )
    _check_scene_options(sizes, fills, backgrounds, max_objects)
    for attempt in range(100):
        stream = CounterRNG(seed, SPLITS.index(split), index, attempt)
        count = min_objects + stream.integers(max_objects - min_objects + 1)
        layout = _layout(stream, count, sizes)
        spots = _place(stream, count, layout, sizes)
        relation = _relation(stream, spots, layout)
        fixed = _held_out_choice(stream, spots, relation) if split == "held_out" else {}
        things = _sample_objects(stream, spots, relation, fixed, fills)
        if things is not None:
            return Scene(
                objects=tuple(things), background=_background(stream, backgrounds), relation=relation
            )
    raise AssertionError(f"no scene for {split} {index} in 100 attempts")


def _check_scene_options(
    sizes: tuple[str, ...], fills: tuple[str, ...], backgrounds: tuple[str, ...], max_objects: int
) -> None:
    """Raise ValueError unless the words are known and allow scenes of `max_objects` objects."""
    for name, words, known in (
        ("sizes", sizes, SIZES),
        ("fills", fills, FILLS),
        ("backgrounds", backgrounds, BACKGROUNDS),
    ):
        if isinstance(words, str) or not words or any(word not in known for word in words):
            raise ValueError(
                f"Expected {name} out of {known}, got {words!r}. Use a tuple such as ({known[0]!r},)."
            )
    if max_objects > 1 and set(sizes) == {"large"}:
        raise ValueError("Expected sizes with small or medium for two objects or more, got only large.")


def generate_evaluation_set(
    kind: Literal["one_object", "two_objects", "held_out"],
    count: int,
    *,
    seed: int = 0,
    languages: tuple[str, ...] = LANGUAGES,
    max_objects: int = 2,
    sizes: tuple[str, ...] = SIZES,
    fills: tuple[str, ...] = FILLS,
    backgrounds: tuple[str, ...] = BACKGROUNDS,
) -> tuple[tuple[Caption, Scene], ...]:
    """Return captions to generate images for, none of them in training, each with a scene that it is true of.

    A relation is always stated if the scene has one.

    Args:
      kind: one_object and two_objects use compositions of training, from the test stream; held_out uses the others,
        with 1 to max_objects objects.
      count: Number of pairs, at least 1.
      seed: See `scene`.
      languages: Taken in turn.
      max_objects: See `kind`.
      sizes: See `scene`.
      fills: See `scene`.
      backgrounds: See `scene`.

    Raises:
      ValueError: An argument is out of range.
    """
    check_caption_languages(languages)
    if count < 1:
        raise ValueError(f"Expected a count of at least 1, got {count}.")
    match kind:
        case "one_object":
            split, fewest, most = "test", 1, 1
        case "two_objects":
            split, fewest, most = "test", 2, 2
        case "held_out":
            split, fewest, most = "held_out", 1, max_objects
        case _:
            raise ValueError(f"Expected a kind of one_object, two_objects or held_out, got {kind!r}.")
    pairs = []
    for index in range(count):
        one = generate_scene(
            index,
            split=split,
            seed=seed,
            min_objects=fewest,
            max_objects=most,
            sizes=sizes,
            fills=fills,
            backgrounds=backgrounds,
        )
        stream = CounterRNG(seed, 201, SPLITS.index(split), index)
        pairs.append((scene_caption(one, stream, languages[index % len(languages)], always=True), one))
    return tuple(pairs)
