"""Procedural scenes: words, records, the random stream, relations and held-out compositions.

A scene is one to four colored shapes on a light background. Coordinates are in [0, 1] with x to the right
and y downward, so a scene has no resolution. Every choice comes from a counter: the stream of (seed, split,
index) is the same on every machine, in every process, and needs no generator object.

Compositions held out of training are (color, shape) pairs and (shape, relation, shape) triples. Each color,
each shape and each relation stays in training; only these ways of putting them together do not."""

from dataclasses import dataclass
from itertools import combinations

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross",
          "diamond", "ring", "crescent", "semicircle", "arrow", "hourglass")  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "brown", "black")
SIZES = ("small", "medium", "large")
FILLS = ("solid", "striped", "dotted")
BACKGROUNDS = ("plain", "gradient", "two-tone")
RELATIONS = ("left of", "right of", "above", "below", "inside", "between")
LANGUAGES = ("en", "zh")
SPLITS = ("train", "val", "test", "held_out")

DIAMETERS = {"small": 0.28, "medium": 0.40, "large": 0.56}  # fraction of the image's side, before JITTER
JITTER = 0.025
HOSTS = ("circle", "square", "heart")  # shapes wide enough to hold a small object when they are large
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneObject:
    """One shape in a scene.

    shape, color, size, fill: a word of SHAPES, COLORS, SIZES, FILLS. x, y: center in [0, 1], y downward.
    diameter: fraction of the image's side. angle: degrees, clockwise."""

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    diameter: float
    angle: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """What lies behind the objects.

    kind: a word of BACKGROUNDS. tones: two RGB triples of 0..255, equal when plain. axis: 'x' or 'y', the
    direction in which the tone changes. split: where it changes when two-tone, in [0, 1]."""

    kind: str
    tones: tuple[tuple[int, int, int], tuple[int, int, int]]
    axis: str = "x"
    split: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Relation:
    """objects[subject] stands in the relation `name` to objects[others[0]] (and others[1] for 'between').

    name: a word of RELATIONS. subject, others: positions in the tuple of objects that owns this relation."""

    name: str
    subject: int
    others: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A image before it has pixels: objects in drawing order, background, and the relation it was laid out
    for.

    relation is None when the scene has one object."""

    objects: tuple[SceneObject, ...]
    background: Background
    relation: Relation | None = None


class CounterRNG:
    """Random numbers that are a function of the seed words: splitmix64 of the words, then a 64-bit LCG."""

    __slots__ = ("_state",)

    def __init__(self, *words: int):
        state = 0
        for word in words:  # splitmix64's finalizer after each word, so (1, 2) and (2, 1) part
            state = (state + word + 0x9E3779B97F4A7C15) & _MASK
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
            state ^= state >> 31
        self._state = state

    def integers(self, n: int) -> int:
        """Return an integer in [0, n), from the high half of the state (an LCG's low bits are weak)."""
        self._state = state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK
        return ((state >> 32) * n) >> 32

    def choice(self, words):
        """Return one entry of a sequence, all equally likely."""
        self._state = state = (self._state * 6364136223846793005 + 1442695040888963407) & _MASK
        return words[((state >> 32) * len(words)) >> 32]

    def random(self) -> float:
        """Return a float in [0, 1), a multiple of 2**-16, so that sums of a few are exact."""
        return self.integers(65536) / 65536


def is_side(name: str, a, b, *, slack: float = 0.8, min_offset: float = 0.1) -> bool:
    """Return whether a is `name` ('left of', 'right of', 'above', 'below') b: the offset that way is at least
    `least` and at least `slack` times the offset across. a, b: anything with x and y in [0, 1]."""
    dx, dy = b.x - a.x, b.y - a.y
    if name in ("above", "below"):
        dx, dy = dy, dx
    if name in ("right of", "below"):
        dx = -dx
    return dx >= min_offset and dx >= slack * abs(dy)


def _is_inside(a, b) -> bool:
    """Return whether a lies within b: much smaller, and its center in the middle of b. a, b: x, y, diameter."""
    reach = 0.25 * b.diameter
    return a.diameter < 0.72 * b.diameter and (a.x - b.x) ** 2 + (a.y - b.y) ** 2 < reach * reach


def _is_between(a, b, c) -> bool:
    """Return whether a lies near the middle part of the line from b to c, each with x and y in [0, 1]."""
    lx, ly = c.x - b.x, c.y - b.y
    length2 = lx * lx + ly * ly
    if length2 < 0.16:  # ends closer than 0.4 leave no room for a third object
        return False
    along = ((a.x - b.x) * lx + (a.y - b.y) * ly) / length2
    across = abs((a.x - b.x) * ly - (a.y - b.y) * lx) / length2**0.5
    return 0.25 <= along <= 0.75 and across <= 0.15


def relation_holds(name: str, a, *others) -> bool:
    """Return whether a stands in relation `name` to the others by geometry alone.

    name: a word of RELATIONS. a, others: anything with x, y, diameter (SceneObject or the verifier's Found);
    two others for 'between', else one. Raises ValueError for an unknown relation or a wrong number of
    others."""
    if name not in RELATIONS:
        raise ValueError(f"Expected a relation out of {RELATIONS}, got {name!r}.")
    num_others = 2 if name == "between" else 1
    if len(others) != num_others:
        raise ValueError(
            f"Expected {num_others} other objects for '{name}', got {len(others)}. Use one argument for each."
        )
    if name == "between":
        return _is_between(a, *others)
    if name == "inside":
        return _is_inside(a, others[0])
    return is_side(name, a, others[0])


def _held_out_pairs() -> frozenset[tuple[str, str]]:
    # One color per shape; 7 is prime to 10, so the twelve pairs fall on all ten colors.
    return frozenset((COLORS[(7 * i + 3) % len(COLORS)], shape) for i, shape in enumerate(SHAPES))


def _held_out_relations() -> frozenset[tuple[str, str, str]]:
    n = len(SHAPES)
    side = {(SHAPES[i], "left of", SHAPES[(i + 5) % n]) for i in range(n)}
    side |= {(SHAPES[i], "above", SHAPES[(i + 4) % n]) for i in range(n)}
    inside = {("star", "inside", "circle"), ("ring", "inside", "square"), ("diamond", "inside", "heart")}
    return frozenset(side | inside)


_PAIRS = _held_out_pairs()
_TRIPLES = _held_out_relations()


def held_out_pairs() -> frozenset[tuple[str, str]]:
    """The (color, shape) pairs that training never shows: 12 of 120, one per shape, all colors touched."""
    return _PAIRS


def held_out_relations() -> frozenset[tuple[str, str, str]]:
    """The (shape, relation, shape) triples that training never shows.

    relation is 'left of', 'above' or 'inside'; 'right of' and 'below' are these read backwards."""
    return _TRIPLES


def shows_held_out_relation(a: SceneObject, b: SceneObject) -> bool:
    """Return whether a and b together show a held-out relation, by their positions."""
    return any(
        (p.shape, name, q.shape) in _TRIPLES and relation_holds(name, p, q)
        for name in ("left of", "above", "inside")
        for p, q in ((a, b), (b, a))
    )


def held_out_compositions(scene: Scene) -> frozenset[tuple[str, ...]]:
    """Every held-out pair and triple that the scene shows; empty for any scene of train, val and test."""
    pairs = {(o.color, o.shape) for o in scene.objects} & _PAIRS
    triples = {
        (p.shape, name, q.shape)
        for a, b in combinations(scene.objects, 2)
        for p, q in ((a, b), (b, a))
        for name in ("left of", "above", "inside")
        if (p.shape, name, q.shape) in _TRIPLES and relation_holds(name, p, q)
    }
    return frozenset(pairs | triples)
