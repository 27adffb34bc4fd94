"""Start of a command: huge pages, the clock for times that include start-up, and the compilation cache."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_HUGE_PAGES = "glibc.malloc.hugetlb"  # a tunable of glibc 2.35 and later; older versions ignore it
_THP_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

_start = time.monotonic()


def start_command() -> None:
    """Start the clock and set the compilation cache of jax, which later commands read.

    The cache is in XDG_CACHE_HOME/dalle_jax, by default ~/.cache/dalle_jax; jax's own variables override it
    (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=0). No effect if jax is already imported, as in a test or
    a notebook.
    """
    global _start
    _start = time.monotonic()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "dalle_jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def seconds_since_start() -> float:
    """Return the seconds since the command started."""
    return time.monotonic() - _start


def restart_with_huge_pages() -> None:
    """Replace this process by one whose memory is in huge pages, where Linux gives them to programs that ask for them.

    A training step on a CPU reads and writes hundreds of megabytes of temporary arrays; in pages of 4 KiB it takes up
    to 1.7 times as long (benchmarks/RESULTS.md). The C library reads its settings only when a process starts. No effect
    if jax is already imported or GLIBC_TUNABLES already names this setting (glibc.malloc.hugetlb=0 turns it off).
    """
    setting = _THP_SETTING.read_text() if sys.platform == "linux" and _THP_SETTING.exists() else ""
    environment = huge_page_environment(os.environ, setting)
    if environment is not None and "jax" not in sys.modules and sys.executable and sys.orig_argv:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def huge_page_environment(environ: Mapping[str, str], thp_setting: str) -> dict[str, str] | None:
    """Return `environ` with the setting of glibc for huge pages, or None if it has one or Linux would not heed it.

    Args:
      thp_setting: text of /sys/kernel/mm/transparent_hugepage/enabled, such as "always [madvise] never".
    """
    tunables = environ.get("GLIBC_TUNABLES", "")
    if "[madvise]" not in thp_setting or _HUGE_PAGES in tunables:
        return None
    return {**environ, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{_HUGE_PAGES}=1")))}
