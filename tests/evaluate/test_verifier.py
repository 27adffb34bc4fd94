"""The verifier reads what was generated, through noise and compression, and accepts nothing else."""

import io
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dalle_jax.data.scenes.generator import (
    COLORS,
    FILLS,
    SHAPES,
    SIZES,
    Background,
    Facts,
    ObjectFact,
    Relation,
    Scene,
    SceneObject,
    caption_facts_hold,
    generate_evaluation_set,
    generate_scene,
    held_out_compositions,
    render_scene,
    scene_captions,
)
from dalle_jax.data.scenes.scene import OPPOSITE
from dalle_jax.evaluate.scenes.regions import connected_regions
from dalle_jax.evaluate.scenes.verifier import MIN_CONFIDENCE, detect_objects, verify_scene

PLAIN = Background(kind="plain", tones=((250, 246, 236), (250, 246, 236)))
DIAMETER = {"small": 0.28, "medium": 0.4, "large": 0.56}


def thing(color, shape, x=0.5, y=0.5, size="medium", fill="solid", angle=0.0):
    return SceneObject(
        shape=shape, color=color, size=size, fill=fill, x=x, y=y, diameter=DIAMETER[size], angle=angle
    )


def render_objects(*things, side=64, background=PLAIN):
    return render_scene(Scene(objects=things, background=background), side)


def facts_of(*things, relations=(), **more):
    objects = tuple(ObjectFact(shape=o.shape, color=o.color, size=o.size, fill=o.fill) for o in things)
    return Facts(objects=objects, relations=relations, count=len(things), **more)


def noisy(image, seed, sigma=0.02):
    noise = np.random.default_rng(seed).normal(0, sigma * 255, image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


def jpeg(image, seed):
    file = io.BytesIO()
    Image.fromarray(noisy(image, seed)).save(file, "JPEG", quality=60)
    return np.array(Image.open(file))


def blurred(image, _seed):
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.6)))


def soft(image, seed):
    """Like a discrete VAE's image: blur, a shift of the colors, a little noise."""
    shifted = np.clip(blurred(image, seed) * 0.97 + np.array([6, 0, -2]), 0, 255).astype(np.uint8)
    return noisy(shifted, seed, 0.01)


def clean(image, _seed):
    return image


# ---- what was generated is read


@pytest.mark.parametrize(
    ("side", "most", "spoil", "count", "least"),
    [
        (64, 4, clean, 200, 0.995),
        (64, 4, jpeg, 200, 0.98),
        (32, 4, clean, 200, 0.99),
        (32, 2, clean, 200, 0.99),
        (32, 2, blurred, 200, 0.97),
        (32, 2, soft, 200, 0.95),
        (128, 4, jpeg, 60, 0.98),
        (48, 4, clean, 60, 0.98),
        (256, 4, clean, 20, 1.0),
    ],
)
def test_scenes_are_right_by_their_own_captions(side, most, spoil, count, least):
    wrong = []
    for i in range(count):
        s = generate_scene(i, split="val", max_objects=most)
        image = spoil(render_scene(s, side), i)
        for c in scene_captions(s, index=i, languages=("en", "zh")[i % 2 :][:1]):
            verdict = verify_scene(image, c.facts)
            if not verdict.right:
                wrong.append((i, c.text, verdict.failed))
    assert len(wrong) <= (1 - least) * count, wrong


def test_held_out_scenes_are_read_as_well():
    chosen = generate_evaluation_set("held_out", 150)
    assert all(held_out_compositions(s) for _, s in chosen)
    wrong = [c.text for c, s in chosen if not verify_scene(render_scene(s, 32), c.facts).right]
    assert len(wrong) <= 2, wrong


def table(rows):
    return "\n".join(f"{want}: {dict(got)}" for want, got in rows.items())


@pytest.mark.parametrize(("side", "least"), [(32, 0.98), (64, 0.99)])
def test_confusion_of_shapes_and_of_colours(side, least):
    """Each shape and color, at random size, place, angle and fill, through noise: nearly all as generated."""
    shapes: dict[str, Counter] = {s: Counter() for s in SHAPES}
    colors: dict[str, Counter] = {c: Counter() for c in COLORS}
    for i, shape in enumerate(SHAPES):
        for j, color in enumerate(COLORS):
            s = generate_scene(i * len(COLORS) + j, split="test", min_objects=1, max_objects=1)
            generated = replace(s.objects[0], shape=shape, color=color)
            found = detect_objects(noisy(render_scene(replace(s, objects=(generated,)), side), i))
            shapes[shape][found[0].shape if len(found) == 1 else f"{len(found)} found"] += 1
            colors[color][found[0].color if len(found) == 1 else f"{len(found)} found"] += 1
    for rows in (shapes, colors):
        right = sum(got[want] for want, got in rows.items()) / sum(got.total() for got in rows.values())
        assert right >= least, table(rows)
        assert all(got[want] >= 0.9 * got.total() for want, got in rows.items()), table(rows)


def test_places_and_diameters_are_measured():
    for i in range(60):
        s = generate_scene(i, split="test")
        found = {(f.color, f.shape): f for f in detect_objects(render_scene(s, 64))}
        assert len(found) == len(s.objects)
        for o in s.objects:
            f = found[o.color, o.shape]
            assert abs(f.x - o.x) < 0.01 and abs(f.y - o.y) < 0.01, (o, f)
            assert abs(f.diameter - o.diameter) < 0.025, (o, f)


def test_uint8_and_float_read_the_same():
    image = render_scene(generate_scene(3), 64)
    assert detect_objects(image) == detect_objects(image.astype(np.float64) / 255)


def test_guest_and_host():
    host, guest = thing("yellow", "square", size="large"), thing("blue", "star", size="small")
    inside = Relation(name="inside", subject=1, others=(0,))
    image = render_objects(host, guest)
    assert verify_scene(image, facts_of(host, guest, relations=(inside,))).right
    assert not verify_scene(render_objects(host), facts_of(host, guest, relations=(inside,))).right
    turned = Relation(name="inside", subject=0, others=(1,))
    assert not verify_scene(image, facts_of(host, guest, relations=(turned,))).right
    apart = render_objects(replace(host, x=0.35, y=0.35), replace(guest, x=0.83, y=0.83))
    verdict = verify_scene(apart, facts_of(host, guest, relations=(inside,)))
    assert verdict.failed == ("blue star inside yellow square",)


def test_two_alike_are_told_apart_by_size():
    """Two red circles: the facts must find the assignment under which they hold."""
    small, large = thing("red", "circle", 0.2, 0.5, "small"), thing("red", "circle", 0.65, 0.5, "large")
    left = Relation(name="left of", subject=1, others=(0,))
    assert verify_scene(render_objects(small, large), facts_of(large, small, relations=(left,))).right
    right = Relation(name="right of", subject=1, others=(0,))
    assert not verify_scene(render_objects(small, large), facts_of(large, small, relations=(right,))).right
    assert not verify_scene(render_objects(small, replace(small, x=0.7)), facts_of(large, small)).right


# ---- what was not generated is refused


@pytest.mark.parametrize("side", [32, 64])
def test_mismatched_pairs_are_refused(side):
    """Each image with another scene's caption, and with its own caption after one change."""
    accepted, tried = [], 0
    scenes = [generate_scene(i, split="test") for i in range(80)]
    told = [scene_captions(s, index=i)[i % 2] for i, s in enumerate(scenes)]
    for i, s in enumerate(scenes):
        image, facts = render_scene(s, side), told[i].facts
        first = facts.objects[0]
        other = {
            "shape": SHAPES[(SHAPES.index(first.shape) + 1 + i % 11) % 12],
            "color": COLORS[(COLORS.index(first.color) + 1 + i % 9) % 10],
            "size": SIZES[(i + 1) % 3],
            "fill": FILLS[(i + 1) % 3],
        }
        changed = [replace(first, **{key: word}) for key, word in other.items()]
        for claim in [told[i - 1].facts, *(replace(facts, objects=(o, *facts.objects[1:])) for o in changed)]:
            if not caption_facts_hold(claim, s):
                tried += 1
                if verify_scene(image, claim).right:
                    accepted.append((i, claim))
    assert tried > 250
    assert len(accepted) < 0.02 * tried, accepted


A, B = thing("red", "circle", 0.25, 0.5), thing("blue", "cross", 0.75, 0.5)
LEFT = (Relation(name="left of", subject=0, others=(1,)),)
CLAIM = facts_of(A, B, relations=LEFT, background="plain")


def test_the_claim_itself_is_right():
    verdict = verify_scene(render_objects(A, B), CLAIM)
    assert verdict.right and verdict.score == 1 and verdict.failed == ()


@pytest.mark.parametrize(
    ("image", "failed", "held"),
    [
        # of 9 facts: two objects, two sizes, two fills, the relation, the count, the background
        (render_objects(replace(A, x=B.x), replace(B, x=A.x)), ["red circle left of blue cross"], 8),
        (render_objects(replace(A, color="blue"), replace(B, color="red")), ["red circle: missing"], 2),
        (render_objects(replace(A, size="small", diameter=0.28), B), ["size medium, got small"], 8),
        (render_objects(replace(A, fill="striped"), B), ["fill solid, got striped"], 8),
        (render_objects(A, B, thing("green", "heart", 0.5, 0.84, "small")), ["count: 2, got 3"], 8),
        (render_objects(A), ["blue cross: missing", "count: 2, got 1"], 4),
        (render_objects(A, B, background=replace(PLAIN, kind="two-tone", tones=((252, 252, 252), (204, 224, 250)))),
         ["background: plain, got two-tone"], 8),
        (render_objects(), ["red circle: missing", "blue cross: missing", "count: 2, got 0"], 1),
    ],
    ids=["swapped places", "swapped colors", "size", "fill", "one more", "one less", "background", "blank"],
)  # fmt: skip
def test_one_thing_wrong(image, failed, held):
    verdict = verify_scene(image, CLAIM)
    assert not verdict.right
    assert verdict.score == pytest.approx(held / 9)
    assert all(any(part in line for line in verdict.failed) for part in failed), verdict.failed


@pytest.mark.parametrize("side", [32, 64])
def test_garbage_is_never_right(side):
    rng = np.random.default_rng(0)
    junk = [
        *(np.full((side, side, 3), level, np.uint8) for level in (0, 128, 255)),
        *(rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(10)),
        *(rng.integers(200, 256, (side, side, 3), dtype=np.uint8) for _ in range(10)),
        *(
            np.array(
                Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize((side, side))
            )
            for cells in (3, 5, 8)
            for _ in range(10)
        ),
    ]
    for image in junk:
        assert not any(f.confidence >= MIN_CONFIDENCE for f in detect_objects(image))
    for i, image in enumerate(junk):
        (c,) = scene_captions(generate_scene(i, max_objects=1), index=i, languages=("en",))
        assert not verify_scene(image, c.facts).right


@pytest.mark.parametrize("shape", SHAPES)
def test_half_a_shape_is_not_the_shape(shape):
    for size in ("medium", "large"):
        whole = thing("blue", shape, size=size, angle=4.0)
        image = render_objects(whole)
        ink = np.cumsum((image != render_objects()).any(2).sum(0))
        middle = int(np.searchsorted(ink, ink[-1] / 2))
        image[:, middle:] = render_objects()[:, middle:]
        assert not verify_scene(image, facts_of(whole)).right, detect_objects(image)


@pytest.mark.parametrize("shape", SHAPES)
def test_smeared_beyond_reading_is_refused(shape):
    """A blur almost as wide as the object's radius leaves a blob, which is none of the shapes."""
    whole = thing("red", shape, size="medium")
    image = np.array(Image.fromarray(render_objects(whole)).filter(ImageFilter.GaussianBlur(10)))
    assert not verify_scene(image, facts_of(whole)).right


@pytest.mark.parametrize("name", ["left of", "right of", "above", "below"])
def test_each_side_and_its_opposite(name):
    dx, dy = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[name]
    a = thing("purple", "heart", 0.5 + 0.25 * dx, 0.5 + 0.25 * dy)
    b = thing("orange", "arrow", 0.5 - 0.25 * dx, 0.5 - 0.25 * dy)
    for word in OPPOSITE:
        claim = facts_of(a, b, relations=(Relation(name=word, subject=0, others=(1,)),))
        assert verify_scene(render_objects(a, b), claim).right == (word == name)


def test_between():
    row = [thing(c, "square", x, 0.5, "small") for c, x in (("red", 0.17), ("green", 0.5), ("black", 0.83))]
    for middle in range(3):
        others = tuple(k for k in range(3) if k != middle)
        claim = facts_of(*row, relations=(Relation(name="between", subject=middle, others=others),))
        assert verify_scene(render_objects(*row), claim).right == (middle == 1)


# ---- parts and hostile input


def test_regions_by_hand():
    mask = np.array(
        [[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0]], bool
    )
    parts = sorted((sorted(part.tolist()) for part in connected_regions(mask)), key=len)
    assert parts == [[23], [0, 1], [4, 9, 10, 12, 13, 14, 15, 16, 17]]
    assert connected_regions(np.zeros((4, 4), bool)) == []


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (np.zeros((64, 64), np.uint8), r"square image of shape .* got \(64, 64\)"),
        (np.zeros((64, 64, 4), np.uint8), r"got \(64, 64, 4\)"),
        (np.zeros((64, 32, 3), np.uint8), r"got \(64, 32, 3\)"),
        (np.zeros((3, 64, 64), np.uint8), r"channels last"),
        (np.zeros((16, 16, 3), np.uint8), r"32 to 256 pixels, got 16"),
        (np.zeros((512, 512, 3), np.uint8), r"32 to 256 pixels, got 512"),
        (np.full((64, 64, 3), 255.0), r"floats in \[0, 1\].*Clip"),
        (np.full((64, 64, 3), np.nan), r"finite floats"),
        (np.full((64, 64, 3), -0.1, np.float32), r"floats in \[0, 1\]"),
        (np.zeros((64, 64, 3), np.int32), r"uint8 or floats in \[0, 1\], got int32"),
    ],
)
def test_bad_pictures(image, match):
    with pytest.raises(ValueError, match=match):
        detect_objects(image)
    with pytest.raises(ValueError, match=match):
        verify_scene(image, CLAIM)


def test_facts_without_objects():
    with pytest.raises(ValueError, match="at least one object"):
        verify_scene(render_objects(A), Facts(objects=()))
