"""Captions of a record, from its fields or from its class by templates, and captions of a whole source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle_jax.data.sources.dataset import Captions, Dataset


def captions_from_fields(
    fields: Mapping[str, Any], names: Mapping[str, Sequence[str]], languages: Sequence[str]
) -> Captions:
    """Return the captions that the fields of a record hold.

    Args:
      fields: Field name -> value: a string or a list of strings. Empty strings and other types are left out.
      names: Language -> names of fields; the first one that the record has counts.
      languages: Languages to return.
    """
    captions = {}
    for language in languages:
        value = next((fields[n] for n in names.get(language, ()) if fields.get(n) is not None), None)
        values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        texts = tuple(text.strip() for text in values if isinstance(text, str) and text.strip())
        if texts:
            captions[language] = texts
    return captions


def class_captions(name: str, templates: Sequence[str], languages: Sequence[str]) -> Captions:
    """Return the captions of a class: its name in place of `{}` in each template. English only."""
    name = name.replace("_", " ").strip()
    return {"en": tuple(t.replace("{}", name) for t in templates)} if "en" in languages and name else {}


def parse_json_object(data: bytes | str) -> dict[str, Any] | None:
    """Return the object that JSON text holds, or None if it holds something else or is invalid."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def parse_caption_lines(data: bytes) -> dict[str, Any] | None:
    """Return the lines of UTF-8 text as the field `caption` of a record; None if the text is not UTF-8."""
    try:
        return {"caption": data.decode("utf-8-sig").splitlines()}
    except UnicodeDecodeError:
        return None


def iter_captions(source: Dataset, count: int) -> Iterator[str]:
    """Yield about `count` captions, all languages of rows spread evenly over the source."""
    captions_per_row = sum(len(texts) for texts in source.captions(0).values())
    rows = min(len(source), -(-count // max(1, captions_per_row)))
    left = count
    for row in range(rows):
        for texts in source.captions(row * len(source) // rows).values():
            yield from texts[:left]
            left -= len(texts[:left])
