"""Captions of procedural scenes in English and Chinese, each with the facts that it claims.

A caption names every object by color and shape, some by size and fill too, and mostly states a relation that
is plain to see in the image. The facts are what the verifier checks, so nothing may be said that they
lack."""

from dataclasses import dataclass

from dalle_jax.data.scenes.scene import (
    LANGUAGES,
    OPPOSITE,
    CounterRNG,
    Relation,
    Scene,
    is_side,
    relation_holds,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectFact:
    """One object of a caption. size and fill are None if the caption does not state them."""

    shape: str
    color: str
    size: str | None = None
    fill: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a caption claims.

    objects: the demanded objects. relations: between them, as positions in objects. count: how many objects
    the image holds in all, None if it may hold more. background: a word of BACKGROUNDS, None if it is not
    said."""

    objects: tuple[ObjectFact, ...]
    relations: tuple[Relation, ...] = ()
    count: int | None = None
    background: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """text in a language of LANGUAGES, and the facts that it claims."""

    text: str
    language: str
    facts: Facts


EN_SIZE = {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")}
EN_BACKGROUND = {"plain": "a plain", "gradient": "a gradient", "two-tone": "a two-tone"}
EN_RELATION = {
    "left of": ("{a} to the left of {b}", "{a} left of {b}", "{b} with {a} on its left"),
    "right of": ("{a} to the right of {b}", "{a} right of {b}", "{b} with {a} on its right"),
    "above": ("{a} above {b}", "{a} over {b}", "{b} with {a} above it"),
    "below": ("{a} below {b}", "{a} under {b}", "{b} with {a} below it"),
    "inside": ("{a} inside {b}", "{b} with {a} inside it", "{b} containing {a}"),
    "between": (
        "{a} between {b} and {c}",
        "{b} and {c} with {a} between them",
        "{a} in the middle between {b} and {c}",
    ),
}

ZH_SHAPE = {
    "circle": ("圆形",),
    "square": ("方块", "正方形"),
    "triangle": ("三角形",),
    "star": ("五角星", "星形"),
    "heart": ("心形", "爱心"),
    "cross": ("十字", "十字形"),
    "diamond": ("菱形",),
    "ring": ("圆环",),
    "crescent": ("月牙", "新月形"),
    "semicircle": ("半圆", "半圆形"),
    "arrow": ("箭头",),
    "hourglass": ("沙漏", "沙漏形"),
}
ZH_COLOR = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "cyan": "青色",
    "blue": "蓝色", "purple": "紫色", "pink": "粉色", "brown": "棕色", "black": "黑色",
}  # fmt: skip
ZH_SIZE = {"small": ("小的", "小小的"), "medium": ("中等大小的", "中等的"), "large": ("大的", "大大的")}
ZH_FILL = {"solid": ("纯色的",), "striped": ("带条纹的", "条纹"), "dotted": ("带圆点的", "波点")}
ZH_BACKGROUND = {"plain": "纯色", "gradient": "渐变", "two-tone": "双色"}
ZH_RELATION = {
    "left of": ("{a}在{b}的左边", "{b}的左侧有{a}", "{a}位于{b}左侧"),
    "right of": ("{a}在{b}的右边", "{b}的右侧有{a}", "{a}位于{b}右侧"),
    "above": ("{a}在{b}的上方", "{b}的上面有{a}", "{a}位于{b}上方"),
    "below": ("{a}在{b}的下方", "{b}的下面有{a}", "{a}位于{b}下方"),
    "inside": ("{a}在{b}的里面", "{b}里面有{a}", "{a}位于{b}内部"),
    "between": ("{a}在{b}和{c}之间", "{b}和{c}之间有{a}", "{a}位于{b}与{c}中间"),
}
ZH_NUMBER = {2: "两", 3: "三", 4: "四"}
EN_NUMBER = {2: "two", 3: "three", 4: "four"}


def _say_en(stream: CounterRNG, fact: ObjectFact, known: bool) -> str:
    words = f"{fact.color} {fact.shape}"
    if known:
        return "the " + words
    if fact.fill is not None:
        words = f"{fact.fill} {words}"
    if fact.size is not None:
        words = f"{stream.choice(EN_SIZE[fact.size])} {words}"
    return ("an " if words[0] in "aeio" else "a ") + words


def _say_zh(stream: CounterRNG, fact: ObjectFact, known: bool) -> str:
    words = ZH_COLOR[fact.color] + stream.choice(ZH_SHAPE[fact.shape])
    if known:
        return words
    if fact.fill is not None:
        words = stream.choice(ZH_FILL[fact.fill]) + words
    if fact.size is not None:
        words = stream.choice(ZH_SIZE[fact.size]) + words
    return "一个" + words


def _plain_side(scene: Scene, subject: int, other: int) -> str | None:
    """The side of `other` that `subject` is on where a person would not hesitate, else None."""
    a, b = scene.objects[subject], scene.objects[other]
    for name in OPPOSITE:
        if is_side(name, a, b, slack=1.3, min_offset=0.2):
            return name
    return None


def _maybe_inverted(stream: CounterRNG, relation: Relation) -> Relation:
    """Return the same relation, half of the time seen from the other object."""
    if relation.name == "between":
        b, c = relation.others
        return (
            Relation(name="between", subject=relation.subject, others=(c, b))
            if stream.integers(2)
            else relation
        )
    if relation.name in OPPOSITE and stream.integers(2):
        return Relation(name=OPPOSITE[relation.name], subject=relation.others[0], others=(relation.subject,))
    return relation


def _statements(stream: CounterRNG, scene: Scene, always: bool) -> list[Relation]:
    """Choose the relations to state, in order, over indices of the scene's objects."""
    if scene.relation is None or not (always or stream.integers(8)):
        return []
    stated = [_maybe_inverted(stream, scene.relation)]
    known = {scene.relation.subject, *scene.relation.others}
    for new in range(len(scene.objects)):
        if new in known or not stream.integers(3):
            continue
        old = stream.choice(sorted(known))
        side = _plain_side(scene, new, old)
        if side is not None:
            stated.append(Relation(name=side, subject=new, others=(old,)))
            known.add(new)
    return stated


def _join_en(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _join_zh(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else "、".join(parts[:-1]) + "和" + parts[-1]


def _clauses(stream: CounterRNG, facts: Facts, relations: dict, say) -> tuple[list[str], list[str]]:
    """Return one clause per relation, and one phrase per object that no relation names."""
    seen: set[int] = set()
    clauses = []
    for relation in facts.relations:
        words = {}
        for key, position in zip("abc", (relation.subject, *relation.others), strict=False):
            words[key] = say(stream, facts.objects[position], position in seen)
            seen.add(position)
        clauses.append(stream.choice(relations[relation.name]).format(**words))
    rest = [say(stream, fact, False) for i, fact in enumerate(facts.objects) if i not in seen]
    return clauses, rest


def _english(stream: CounterRNG, facts: Facts) -> str:
    clauses, rest = _clauses(stream, facts, EN_RELATION, _say_en)
    if clauses:
        text = "; ".join(clauses) + (
            ("; also " if len(clauses) > 1 else ", and also ") + _join_en(rest) if rest else ""
        )
    elif len(rest) > 1 and stream.integers(2):
        text = f"{EN_NUMBER[len(rest)]} shapes: {', '.join(rest)}"
    else:
        text = _join_en(rest)
    background = f"{EN_BACKGROUND[facts.background]} background" if facts.background else None
    style = stream.integers(4)
    if background and style < 2:
        return f"{text}, on {background}" if clauses else f"{text} on {background}"
    if background:
        return f"on {background}: {text}"
    return (
        text,
        f"a picture of {text}",
        f"there is {text}" if not clauses and len(rest) == 1 else text,
        text,
    )[style]


def _chinese(stream: CounterRNG, facts: Facts) -> str:
    clauses, rest = _clauses(stream, facts, ZH_RELATION, _say_zh)
    if clauses:
        text = "，".join(clauses) + ("，还有" + _join_zh(rest) if rest else "")
    elif len(rest) > 1 and stream.integers(2):
        text = f"{ZH_NUMBER[len(rest)]}个图形：{'、'.join(rest)}"
    else:
        text = _join_zh(rest)
    style = stream.integers(4)
    if facts.background:
        background = ZH_BACKGROUND[facts.background]
        if style < 2:
            return f"{background}背景上，{text}" if clauses else f"{background}背景上的{text}"
        return f"{text}，背景是{background}的"
    lead = "画面中，" if clauses else "一幅画：" if len(rest) > 1 else "画面中有"
    return lead + text if style == 1 else text


_SPEAK = {"en": _english, "zh": _chinese}


def scene_caption(scene: Scene, stream: CounterRNG, language: str, *, always: bool = False) -> Caption:
    """Return one caption with the choices of a random stream. always: state the scene's relation if it has one."""
    stated = _statements(stream, scene, always)
    order = list(dict.fromkeys(i for relation in stated for i in (relation.subject, *relation.others)))
    order += [i for i in range(len(scene.objects)) if i not in order]
    place = {position: i for i, position in enumerate(order)}
    sized = stream.integers(2)  # one draw for the whole caption: half of the captions speak of size
    objects = []
    for position in order:
        thing = scene.objects[position]
        fill = (
            None if (thing.fill == "solid" and stream.integers(12)) or not stream.integers(8) else thing.fill
        )
        size = thing.size if sized else None
        objects.append(ObjectFact(shape=thing.shape, color=thing.color, size=size, fill=fill))
    relations = tuple(
        Relation(name=r.name, subject=place[r.subject], others=tuple(place[i] for i in r.others))
        for r in stated
    )
    background = None if stream.integers(4) else scene.background.kind
    facts = Facts(objects=tuple(objects), relations=relations, count=len(objects), background=background)
    return Caption(text=_SPEAK[language](stream, facts), language=language, facts=facts)


def scene_captions(
    scene: Scene, *, index: int, seed: int = 0, languages: tuple[str, ...] = LANGUAGES, count: int = 1
) -> tuple[Caption, ...]:
    """Return captions that are true of a scene.

    Args:
      scene: The scene.
      index: 0 or more; the same index and seed give the same words.
      seed: See `index`.
      languages: Out of LANGUAGES.
      count: Captions per language, 1 or more.

    Returns:
      The captions of the first language, then those of the next.

    Raises:
      ValueError: An argument is out of range.
    """
    check_caption_languages(languages)
    if index < 0:
        raise ValueError(f"Expected an index of at least 0, got {index}.")
    if count < 1:
        raise ValueError(f"Expected a count of at least 1 caption per language, got {count}.")
    return tuple(
        scene_caption(scene, CounterRNG(seed, 101 + LANGUAGES.index(language), index, k), language)
        for language in languages
        for k in range(count)
    )


def check_caption_languages(languages: tuple[str, ...]) -> None:
    """Raise ValueError unless languages is a nonempty tuple or list of words of LANGUAGES."""
    if isinstance(languages, str) or not languages or any(word not in LANGUAGES for word in languages):
        raise ValueError(
            f"Expected languages out of {LANGUAGES}, got {languages!r}. Use a tuple such as ('en',)."
        )


def caption_facts_hold(facts: Facts, scene: Scene) -> bool:
    """Return whether every fact holds in the scene by its geometry, without its pixels."""
    if facts.count is not None and facts.count != len(scene.objects):
        return False
    if facts.background not in (None, scene.background.kind):
        return False
    placed = []
    for fact in facts.objects:
        same = [
            o
            for o in scene.objects
            if (o.shape, o.color) == (fact.shape, fact.color)
            and fact.size in (None, o.size)
            and fact.fill in (None, o.fill)
        ]
        if not same:
            return False
        placed.append(same[0])  # a scene never shows one (color, shape) twice
    return all(
        relation_holds(r.name, placed[r.subject], *(placed[i] for i in r.others)) for r in facts.relations
    )
