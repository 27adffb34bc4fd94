"""Tests of the procedural scenes: determinism, geometry, held-out compositions, and true captions."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from dalle_jax.data.scenes.generator import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    LANGUAGES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Background,
    Scene,
    SceneObject,
    caption_facts_hold,
    generate_evaluation_set,
    generate_scene,
    held_out_compositions,
    held_out_pairs,
    held_out_relations,
    relation_holds,
    render_scene,
    scene_captions,
)
from dalle_jax.data.scenes.rendering import REACH, SHAPE_DISTANCES, TONES

PLAIN = Background(kind="plain", tones=((255, 255, 255), (255, 255, 255)))


def one(shape="circle", color="red", *, x=0.5, y=0.5, diameter=0.5, angle=0.0, fill="solid", size="large"):
    return SceneObject(
        shape=shape, color=color, size=size, fill=fill, x=x, y=y, diameter=diameter, angle=angle
    )


def image_of(*objects, size=64):
    return render_scene(Scene(objects=objects, background=PLAIN), size)


# ---- determinism


def test_an_index_determines_scene_image_and_captions():
    for i in range(50):
        a, b = generate_scene(i), generate_scene(i)
        assert a == b
        np.testing.assert_array_equal(render_scene(a, 48), render_scene(b, 48))
        assert scene_captions(a, index=i, count=2) == scene_captions(b, index=i, count=2)


def test_scenes_do_not_depend_on_process_and_hash_seed():
    code = (
        "import zlib; from dalle_jax.data.scenes.generator import *\n"
        "for i in range(20):\n"
        "    s = generate_scene(i); text = ''.join(c.text for c in scene_captions(s, index=i))\n"
        "    print(zlib.crc32(render_scene(s, 32).tobytes()), zlib.crc32(text.encode()))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and runs.pop().count("\n") == 20


def test_splits_seeds_and_indices_are_different_streams():
    scenes = [
        generate_scene(i, split=split, seed=seed) for split in SPLITS for seed in (0, 1) for i in range(40)
    ]
    assert len(set(scenes)) == len(scenes)


def test_words_are_equally_frequent():
    """The count of each word in 6000 scenes is within five standard deviations of the mean."""
    single = [generate_scene(i, max_objects=1) for i in range(6000)]
    for words, got in (
        (SIZES, Counter(s.objects[0].size for s in single)),
        (BACKGROUNDS, Counter(s.background.kind for s in single)),
        (COLORS, Counter(s.objects[0].color for s in single)),
        (SHAPES, Counter(s.objects[0].shape for s in single)),
    ):
        mean = 6000 / len(words)
        # up to two of the twelve shapes of a color are held out
        assert all(0.84 * mean - 5 * mean**0.5 < got[w] < 1.16 * mean + 5 * mean**0.5 for w in words), got


# ---- pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_within_its_reach_and_covers_its_area(shape):
    axis = (np.arange(800) + 0.5) / 800 * 3 - 1.5
    u, v = np.broadcast_arrays(axis[None, :], axis[:, None])
    d = SHAPE_DISTANCES[shape](u, v)
    assert d[u * u + v * v > REACH**2].min() > 0
    # the ink equals the area: 64 px, diameter 0.5, so one radius is 16 px
    ink = 255.0 - image_of(one(shape, "black"), size=64)[..., 0]
    area = (d < 0).mean() * 9
    assert ink.sum() / (255 - TONES["black"][0]) == pytest.approx(area * 16**2, rel=0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distance_field_has_slope_at_most_1(shape):
    """Antialiasing is then smooth."""
    axis = np.linspace(-1.2, 1.2, 601)
    d = SHAPE_DISTANCES[shape](*np.broadcast_arrays(axis[None, :], axis[:, None]))
    assert max(np.abs(np.diff(d, axis=0)).max(), np.abs(np.diff(d, axis=1)).max()) <= 0.004 * 1.01


def test_hand_made_pixels():
    image = image_of(one("square", "blue", diameter=0.5), size=64)  # half side 0.78 * 16 px = 12.48 px
    assert image[32, 32].tolist() == list(TONES["blue"])
    assert image[32, 32 - 12].tolist() == list(TONES["blue"])
    edge = 255 - 0.48 * (255 - np.array(TONES["blue"]))  # 0.48 of the thirteenth pixel is covered
    assert np.abs(image[32, 32 - 13] - edge).max() <= 1
    assert image[32, 32 - 14].tolist() == [255, 255, 255]


def test_angle_turns_clockwise():
    level, turned = image_of(one("arrow", angle=0.0)), image_of(one("arrow", angle=90.0))
    assert np.abs(np.rot90(level, -1).astype(int) - turned).max() <= 1


def test_patterns_lighten_the_inside_and_keep_the_silhouette():
    for shape in SHAPES:
        plain = image_of(one(shape, "blue"))
        for fill in FILLS[1:]:
            patterned = image_of(one(shape, "blue", fill=fill))
            changed = (patterned != plain).any(2)
            assert changed.sum() > 10
            assert (plain[changed] == TONES["blue"]).all()  # only where the shape covers the whole pixel
            assert (patterned[changed].astype(int).sum(1) > plain[changed].astype(int).sum(1)).all()


@pytest.mark.parametrize("factor", [2, 4])
def test_image_sizes_show_the_same_scene(factor):
    for i in range(40):
        s = generate_scene(i)
        small = render_scene(s, 64)
        large = render_scene(s, 64 * factor).reshape(64, factor, 64, factor, 3).mean((1, 3))
        assert np.abs(small - large).mean() < 1.0, i


def test_backgrounds_are_light_and_pale_and_colors_are_not():
    for i in range(300):
        background = generate_scene(i).background
        for tone in background.tones:
            assert min(tone) >= 190 and max(tone) - min(tone) <= 60
        assert (background.kind == "plain") == (background.tones[0] == background.tones[1])
    assert all(min(tone) < 110 for tone in TONES.values())
    for a, b in combinations(TONES.values(), 2):
        assert sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) > 70**2


# ---- layout


@pytest.mark.parametrize("split", SPLITS)
def test_objects_are_in_the_frame_and_apart(split):
    layouts = Counter()
    for i in range(1500):
        s = generate_scene(i, split=split)
        layouts[s.relation and s.relation.name] += 1
        assert len({(o.color, o.shape) for o in s.objects}) == len(s.objects)
        for o in s.objects:
            radius = REACH * o.diameter / 2
            assert radius <= o.x <= 1 - radius and radius <= o.y <= 1 - radius, (i, o)
        for a, b in combinations(s.objects, 2):
            gap = np.hypot(a.x - b.x, a.y - b.y) - REACH * (a.diameter + b.diameter) / 2
            inside = s.relation.name == "inside" and {a, b} == {s.objects[-1], s.objects[0]}
            assert gap > 0 or inside, (i, a, b)
    assert {None, "left of", "above", "inside", "between"} <= set(layouts)


def test_an_object_inside_another_is_covered_by_it():
    guests = 0
    for i in range(1500):
        s = generate_scene(i, min_objects=2, max_objects=3)
        if s.relation.name != "inside":
            continue
        guests += 1
        guest, host = s.objects[s.relation.subject], s.objects[s.relation.others[0]]
        ink = (image_of(replace(guest, color="black"), size=256) < 250).any(2)
        under = image_of(replace(host, color="black"), size=256)[..., 0]
        assert (under[ink] == TONES["black"][0]).all(), (i, guest, host)
    assert guests > 100


def test_object_counts_are_within_the_limits():
    for least, most in ((1, 1), (2, 2), (3, 4), (1, 4)):
        counts = Counter(
            len(generate_scene(i, min_objects=least, max_objects=most).objects) for i in range(200)
        )
        assert set(counts) == set(range(least, most + 1))


# ---- held out


def test_held_out_sets_are_small_and_balanced():
    pairs, triples = held_out_pairs(), held_out_relations()
    assert 0.08 <= len(pairs) / (len(COLORS) * len(SHAPES)) <= 0.12
    assert max(Counter(shape for _, shape in pairs).values()) <= 2
    assert max(Counter(color for color, _ in pairs).values()) <= 2
    assert {name for _, name, _ in triples} == {"left of", "above", "inside"}


def test_training_has_every_word_and_no_held_out_composition():
    pairs, triples, parts = set(), set(), set()
    for i in range(20000):
        s = generate_scene(i)
        for o in s.objects:
            pairs.add((o.color, o.shape))
            parts |= {o.color, o.shape, o.size, o.fill}
        for a in s.objects:
            for b in s.objects:
                for name in ("left of", "above", "inside"):
                    if a is not b and relation_holds(name, a, b):
                        triples.add((a.shape, name, b.shape))
    assert not pairs & held_out_pairs()
    assert not triples & held_out_relations()
    assert parts >= set(SHAPES + COLORS + SIZES + FILLS)
    assert len(pairs) == len(COLORS) * len(SHAPES) - len(held_out_pairs())  # training has all other pairs
    for side in (0, 2):  # training has each shape of a held-out triple on that side of the relation
        in_training = {(t[1], t[side]) for t in triples}
        assert {(t[1], t[side]) for t in held_out_relations()} <= in_training


@pytest.mark.parametrize("split", ["val", "test"])
def test_val_and_test_have_no_held_out_composition(split):
    assert not any(held_out_compositions(generate_scene(i, split=split)) for i in range(1500))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_held_out_scene_has_a_held_out_composition(count):
    scenes = [
        held_out_compositions(generate_scene(i, split="held_out", min_objects=count, max_objects=count))
        for i in range(800)
    ]
    assert all(scenes)
    kinds = Counter(len(composition) for found in scenes for composition in found)
    assert kinds[2] > 100 and (count == 1 or kinds[3] > 100)


# ---- relations


def test_relations_by_hand():
    a, b, c = (
        one(x=0.2, y=0.5, diameter=0.2),
        one(x=0.5, y=0.52, diameter=0.2),
        one(x=0.8, y=0.5, diameter=0.2),
    )
    assert (
        relation_holds("left of", a, b)
        and relation_holds("right of", b, a)
        and not relation_holds("right of", a, b)
    )
    assert not relation_holds("above", a, b) and not relation_holds("below", a, b)
    assert (
        relation_holds("between", b, a, c)
        and relation_holds("between", b, c, a)
        and not relation_holds("between", a, b, c)
    )
    up, down = one(x=0.5, y=0.2), one(x=0.45, y=0.8)
    assert (
        relation_holds("above", up, down)
        and relation_holds("below", down, up)
        and not relation_holds("above", down, up)
    )
    host, guest = one(diameter=0.6), one(diameter=0.28, x=0.52)
    assert relation_holds("inside", guest, host) and not relation_holds("inside", host, guest)
    assert not relation_holds("inside", replace(guest, x=0.85), host)
    assert not relation_holds("between", replace(b, y=0.8), a, c)


# ---- captions


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_and_name_every_object(split):
    for i in range(1000):
        s = generate_scene(i, split=split)
        for c in scene_captions(s, index=i, count=2):
            assert caption_facts_hold(c.facts, s), (c, s)
            named = Counter((o.shape, o.color) for o in c.facts.objects)
            assert named == Counter((o.shape, o.color) for o in s.objects)
            assert c.facts.count == len(s.objects)


def test_the_words_of_a_caption_are_those_of_its_facts():
    """The text has the word of each fact and no other word of the same kind."""
    from dalle_jax.data.scenes.captions import ZH_BACKGROUND, ZH_COLOR, ZH_FILL, ZH_SHAPE

    for i in range(600):
        for c in scene_captions(generate_scene(i), index=i):
            facts = c.facts.objects
            if c.language == "en":
                words = c.text.replace(",", " ").replace(":", " ").replace(";", " ").split()
                assert {w for w in words if w in SHAPES} == {o.shape for o in facts}
                assert {w for w in words if w in COLORS} == {o.color for o in facts}
                assert {w for w in words if w in FILLS} == {o.fill for o in facts if o.fill}
                assert (f"{c.facts.background} background" in c.text) == bool(c.facts.background)
            else:
                colors = {color for color, word in ZH_COLOR.items() if word in c.text}
                assert colors == {o.color for o in facts}
                assert all(any(word in c.text for word in ZH_SHAPE[o.shape]) for o in facts)
                assert all(o.fill is None or any(w in c.text for w in ZH_FILL[o.fill]) for o in facts)
                assert ("背景" in c.text) == bool(c.facts.background)
                assert c.facts.background is None or ZH_BACKGROUND[c.facts.background] in c.text


def test_the_first_object_of_a_phrase_is_the_subject_of_its_relation():
    """Checked on the templates that name both objects around the phrase."""
    checked = 0
    for i in range(400):
        s = generate_scene(i, min_objects=2, max_objects=2)
        for c in scene_captions(s, index=i, languages=("en",), count=2):
            for relation in c.facts.relations:
                a, b = (c.facts.objects[k] for k in (relation.subject, relation.others[0]))
                for phrase in (" to the left of ", " to the right of ", " above ", " below "):
                    if phrase in c.text and " with " not in c.text:
                        before, after = c.text.split(phrase)
                        assert f"{a.color} {a.shape}" in before and f"{b.color} {b.shape}" in after
                        assert relation.name.split()[0] in phrase
                        checked += 1
    assert checked > 100


def test_captions_state_sizes_fills_and_relations_often():
    sized = fills = patterned = related = several = 0
    total = 2000
    for i in range(total):
        s = generate_scene(i)
        (c,) = scene_captions(s, index=i, languages=("en",))
        sized += all(o.size for o in c.facts.objects)
        patterned += sum(o.fill != "solid" for o in s.objects)
        fills += sum(o.fill in ("striped", "dotted") for o in c.facts.objects)
        several += len(s.objects) > 1
        related += bool(c.facts.relations)
    assert 0.4 < sized / total < 0.6
    assert fills / patterned > 0.75
    assert related / several > 0.75


def test_captions_differ_between_languages_and_templates():
    texts = [scene_captions(generate_scene(i), index=i, count=3) for i in range(300)]
    for six in texts:
        english, chinese = {c.text for c in six[:3]}, {c.text for c in six[3:]}
        assert all(english) and all(chinese) and not english & chinese
        assert all(text.isascii() for text in english) and not any(text.isascii() for text in chinese)
    assert len({c.text for six in texts for c in six}) > 1500
    relations = {r.name for six in texts for c in six for r in c.facts.relations}
    assert relations == set(RELATIONS)


# ---- evaluation sets


def test_evaluation_sets():
    for kind, counts, split in (
        ("one_object", {1}, False),
        ("two_objects", {2}, False),
        ("held_out", {1, 2}, True),
    ):
        chosen = generate_evaluation_set(kind, 200)
        assert {len(s.objects) for _, s in chosen} == counts
        assert all(caption_facts_hold(c.facts, s) for c, s in chosen)
        assert all(bool(held_out_compositions(s)) == split for _, s in chosen)
        assert {c.language for c, _ in chosen} == set(LANGUAGES)
        assert all(c.facts.relations for c, s in chosen if len(s.objects) > 1)
        assert chosen[:50] == generate_evaluation_set(kind, 50)
        assert chosen[:50] != generate_evaluation_set(kind, 50, seed=1)
    assert {c.language for c, _ in generate_evaluation_set("one_object", 20, languages=("zh",))} == {"zh"}
    assert {len(s.objects) for _, s in generate_evaluation_set("held_out", 100, max_objects=1)} == {1}


# ---- invalid input


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: generate_scene(0, split="training"), r"a split out of .* got 'training'"),
        (lambda: generate_scene(-1), r"index of at least 0, got -1"),
        (lambda: generate_scene(0, min_objects=0), r"got 0 and 4"),
        (lambda: generate_scene(0, max_objects=5), r"got 1 and 5"),
        (lambda: generate_scene(0, min_objects=3, max_objects=2), r"got 3 and 2"),
        (lambda: render_scene(generate_scene(0), 31), r"32 to 256 pixels, got 31"),
        (lambda: render_scene(generate_scene(0), 257), r"32 to 256 pixels, got 257"),
        (lambda: render_scene(generate_scene(0), 64.0), r"32 to 256 pixels, got 64\.0"),
        (
            lambda: scene_captions(generate_scene(0), index=0, languages=("fr",)),
            r"languages out of .* got \('fr',\)",
        ),
        (lambda: scene_captions(generate_scene(0), index=0, languages="en"), r"got 'en'\. Use a tuple"),
        (lambda: scene_captions(generate_scene(0), index=0, languages=()), r"languages out of"),
        (lambda: scene_captions(generate_scene(0), index=-2), r"index of at least 0, got -2"),
        (lambda: scene_captions(generate_scene(0), index=0, count=0), r"count of at least 1 caption"),
        (lambda: generate_evaluation_set("three_objects", 5), r"got 'three_objects'"),
        (lambda: generate_evaluation_set("one_object", 0), r"count of at least 1, got 0"),
        (lambda: generate_evaluation_set("held_out", 1, max_objects=9), r"got 1 and 9"),
        (lambda: relation_holds("near", one(), one()), r"got 'near'"),
        (lambda: relation_holds("between", one(), one()), r"2 other objects for 'between', got 1"),
    ],
)
def test_invalid_arguments_are_rejected(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_scenes_use_only_the_allowed_words():
    allowed = {"sizes": ("medium", "large"), "fills": ("solid",), "backgrounds": ("plain", "gradient")}
    scenes = [generate_scene(i, max_objects=3, **allowed) for i in range(400)]
    things = [thing for one in scenes for thing in one.objects]
    assert {thing.size for thing in things} == {"medium", "large"}
    assert {thing.fill for thing in things} == {"solid"}
    assert {one.background.kind for one in scenes} == {"plain", "gradient"}
    assert not any(one.relation and one.relation.name == "inside" for one in scenes)  # needs a small object
    striped = [generate_scene(i, max_objects=1, fills=("striped",)) for i in range(50)]
    assert {one.objects[0].fill for one in striped} == {"striped"}
    evaluation = generate_evaluation_set("one_object", 40, **allowed)
    assert {one.background.kind for _, one in evaluation} == {"plain", "gradient"}


@pytest.mark.parametrize(
    "words, message",
    [
        ({"sizes": ()}, r"sizes out of .*got \(\)"),
        ({"sizes": ("huge",)}, "'huge'"),
        ({"fills": "solid"}, r"Use a tuple such as \('solid',\)"),
        ({"backgrounds": ("sky",)}, "Expected backgrounds out of"),
        ({"sizes": ("large",), "max_objects": 2}, "sizes with small or medium"),
    ],
)
def test_unknown_words_are_rejected(words, message):
    with pytest.raises(ValueError, match=message):
        generate_scene(0, **words)
