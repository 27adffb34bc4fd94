"""What every configuration is checked with."""

from __future__ import annotations


def require(holds: bool, message: str) -> None:
    """Raises ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)
