"""The embedded data set: captioned scenes of coloured shapes, any index, drawn on demand. Nothing is
downloaded.

A scene is laid out first (sizes, then places that cannot overlap), then peopled (shapes and colours, drawn
again while they would show a held-out composition), then captioned. See scene_model for the records and the
held-out sets, shapes for the pixels, scene_captions for the words; all of their public names are importable
from here.

    scene_7 = scene(7)
    image = render(scene_7, 64)                       # uint8 (64, 64, 3)
    english, chinese = captions(scene_7, index=7)
"""

from typing import Literal

from dalle_jax.data.scenes.captions import (
    Caption,
    Facts,
    ObjectFact,
    caption,
    captions,
    check_languages,
    facts_hold,
)
from dalle_jax.data.scenes.rendering import REACH, TONES, render
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
    "captions",
    "evaluation_set",
    "facts_hold",
    "held_out_compositions",
    "held_out_pairs",
    "held_out_relations",
    "relation_holds",
    "render",
    "scene",
]  # fmt: skip

EDGE = 0.01  # free margin of the picture
GAP = 0.02  # least free space between the circles around two objects
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
    """True if two colours differ in lightness too: hue alone is what compression loses first."""
    step = [p - q for p, q in zip(TONES[a], TONES[b], strict=True)]
    luma = 0.299 * step[0] + 0.587 * step[1] + 0.114 * step[2]
    return abs(luma) > 35 and sum(d * d for d in step) > 115**2


# Colours that a guest may have on its host.
_ON = {host: tuple(c for c in COLORS if _stands_out(c, host)) for host in COLORS}


def _spread(stream: CounterRNG, widths: list[float]) -> list[float]:
    """Centres of intervals laid one after another in [0, 1], the free space shared out at random."""
    free = 1.0 - 2 * EDGE - GAP * (len(widths) - 1) - sum(widths)
    cuts = sorted([stream.random() for _ in widths])
    centres, start = [], EDGE
    for width, cut in zip(widths, cuts, strict=True):
        centres.append(start + width / 2 + cut * free)
        start += width + GAP
    return centres


def _pair(stream: CounterRNG, widths: list[float]) -> list[tuple[float, float]]:
    """Two objects side by side along the first axis; the second axis stays clearly the lesser offset."""
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
    """Three objects in a line along the first axis, nearly level."""
    level = _spread(stream, [max(widths) + 0.06])[0]
    return [(x, level + 0.06 * (stream.random() - 0.5)) for x in _spread(stream, widths)]


def _grid(stream: CounterRNG, widths: list[float]) -> list[tuple[float, float]]:
    """Three or four objects in two bands along the first axis, so that no two of them can meet."""
    bands = [widths[:2], widths[2:]]
    levels = _spread(stream, [max(band) for band in bands])
    places = []
    for band, level in zip(bands, levels, strict=True):
        for x, width in zip(_spread(stream, band), band, strict=True):
            places.append((x, level + (max(band) - width) * (stream.random() - 0.5)))
    return places


def _sizes(stream: CounterRNG, count: int, layout: str, sizes: tuple[str, ...]) -> list[str]:
    """Sizes that fit the layout, out of those allowed; the first is large where it hosts another object."""
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
    """Place and size of an object that has no shape yet; has the x, y and diameter that relations read."""

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
    if inner:  # the guest goes last: it is drawn over its host
        x, y = places[0]
        places.append((x + 0.01 * (stream.random() - 0.5), y + 0.01 * (stream.random() - 0.5)))
    return [_Spot(x, y, d, s) for (x, y), d, s in zip(places, diameters, sizes, strict=True)]


def _relation(stream: CounterRNG, spots: list[_Spot], layout: str) -> Relation | None:
    """The relation that the scene is laid out for; None for a single object."""
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
    """For a held-out scene: {position: (colour or None, shape)} of the objects that make it one."""
    if relation is not None and relation.name != "between" and stream.integers(2):
        subject, _, other = stream.choice([t for t in _TRIPLES if t[1] == relation.name])
        return {relation.subject: (None, subject), relation.others[0]: (None, other)}
    position = stream.integers(len(spots))
    host = relation is not None and relation.name == "inside" and position == relation.others[0]
    colour, shape = stream.choice([pair for pair in _PAIRS if pair[1] in HOSTS] if host else _PAIRS)
    return {position: (colour, shape)}


def _fill(stream: CounterRNG, fills: tuple[str, ...]) -> str:
    """Half of the objects are solid where that is allowed."""
    patterns = tuple(fill for fill in fills if fill != "solid")
    plain = "solid" in fills and (not patterns or stream.integers(2))
    return "solid" if plain else stream.choice(patterns)


def _people(
    stream: CounterRNG, spots: list[_Spot], relation: Relation | None, fixed: dict, fills: tuple[str, ...]
) -> list[SceneObject] | None:
    """Objects for the spots, showing no held-out composition but the fixed ones; None if none was found."""
    host = relation.others[0] if relation is not None and relation.name == "inside" else None
    guest = relation.subject if host is not None else None
    things: list[SceneObject] = []
    for position, spot in enumerate(spots):
        colour, shape = fixed.get(position, (None, None))
        for _ in range(64):
            thing = SceneObject(
                shape=shape or stream.choice(HOSTS if position == host else SHAPES),
                color=colour or stream.choice(COLORS),
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
    colour_fixed = fixed.get(position, (None, None))[0] is not None
    if not colour_fixed and (thing.color, thing.shape) in held_out_pairs():
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


def scene(
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
    """The scene of an index.

    index: 0 or more, without an upper end. split: a word of SPLITS; each has its own random stream. 'train',
    'val' and 'test' never show a held-out composition, every scene of 'held_out' shows one. seed: another
    data set. min_objects, max_objects: 1..4, the number of objects is drawn evenly between them. sizes, fills,
    backgrounds: the words to draw from; without both small and large no object stands inside another, and the
    ones that do are solid in any case. Raises ValueError for an unknown split or word, a negative index or an
    impossible number of objects."""
    if split not in SPLITS:
        raise ValueError(f"want a split of {SPLITS}, got {split!r}; use one of these words")
    if index < 0:
        raise ValueError(f"want an index of 0 or more, got {index}; count scenes from 0")
    if not 1 <= min_objects <= max_objects <= 4:
        raise ValueError(
            f"want 1 <= min_objects <= max_objects <= 4, got {min_objects} and {max_objects}; "
            "a scene holds 1 to 4 objects"
        )
    check_words(sizes, fills, backgrounds, max_objects)
    for attempt in range(100):
        stream = CounterRNG(seed, SPLITS.index(split), index, attempt)
        count = min_objects + stream.integers(max_objects - min_objects + 1)
        layout = _layout(stream, count, sizes)
        spots = _place(stream, count, layout, sizes)
        relation = _relation(stream, spots, layout)
        fixed = _held_out_choice(stream, spots, relation) if split == "held_out" else {}
        things = _people(stream, spots, relation, fixed, fills)
        if things is not None:
            return Scene(
                objects=tuple(things), background=_background(stream, backgrounds), relation=relation
            )
    raise AssertionError(f"no scene for {split} {index} in 100 attempts")


def check_words(
    sizes: tuple[str, ...], fills: tuple[str, ...], backgrounds: tuple[str, ...], max_objects: int
) -> None:
    """Raises ValueError unless these are words of the data set that so many objects can be drawn with."""
    for name, words, known in (
        ("sizes", sizes, SIZES),
        ("fills", fills, FILLS),
        ("backgrounds", backgrounds, BACKGROUNDS),
    ):
        if isinstance(words, str) or not words or any(word not in known for word in words):
            raise ValueError(
                f"want {name} out of {known}, got {words!r}; pass a tuple such as ({known[0]!r},)"
            )
    if max_objects > 1 and set(sizes) == {"large"}:
        raise ValueError(
            "want small or medium in sizes where a scene holds two objects or more, got only large"
        )


def evaluation_set(
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
    """Captions to draw pictures for, none of them seen in training, each with a scene that it is true of.

    kind: 'one_object' and 'two_objects' use compositions that training shows, from the test stream;
    'held_out' uses those it never shows, with 1 to max_objects objects. count: pairs returned, languages
    taken in turn. A relation is always stated where the scene has one. Raises ValueError for an unknown kind
    or language, or a count below 1."""
    check_languages(languages)
    if count < 1:
        raise ValueError(f"want a count of 1 or more, got {count}; ask for at least one caption")
    match kind:
        case "one_object":
            split, fewest, most = "test", 1, 1
        case "two_objects":
            split, fewest, most = "test", 2, 2
        case "held_out":
            split, fewest, most = "held_out", 1, max_objects
        case _:
            raise ValueError(
                f"want a kind of one_object, two_objects or held_out, got {kind!r}; use one of these"
            )
    pairs = []
    for index in range(count):
        one = scene(
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
        pairs.append((caption(one, stream, languages[index % len(languages)], always=True), one))
    return tuple(pairs)
