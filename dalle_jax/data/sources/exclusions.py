"""Lists of records to leave out of training (`data.source.exclude`)."""

from __future__ import annotations

import os
from pathlib import Path

from dalle_jax.data.sources.captions import parse_json_object


def read_excluded_names(path: str) -> list[str]:
    """Read the names of records from a list.

    Args:
      path: A text file. Each line is a name, or a JSON object with `train`, as `dalle-jax data PATH --duplicates`
        writes it, or `name`. Empty lines are skipped.

    Raises:
      FileNotFoundError: The file does not exist.
      ValueError: The file cannot be read, or a line names no record.
    """
    try:
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"Expected a list of names in data.source.exclude, got no file {path!r}."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.source.exclude: cannot read {path}: {error}") from None
    names = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = parse_json_object(line) if line.lstrip().startswith("{") else {"name": line.strip()}
        name = next(((fields or {})[f] for f in ("train", "name") if f in (fields or {})), None)
        if not isinstance(name, str):
            raise ValueError(
                f'Expected a name, or JSON with "train" or "name", in line {number} of data.source.exclude {path}, '
                f"got {line[:60]!r}."
            )
        names.append(name)
    return names
