"""The rooms of the house: imports run one way, and what is heavy loads only where it is used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dalle_jax

PACKAGE = Path(dalle_jax.__file__).parent

# Subpackages from the lowest to the highest; each may import itself and those before it.
ORDER = (
    "typing", "files", "config", "text", "parallel", "nn", "models", "data", "sampling", "importers", "checkpoint", "train",
    "aot", "pipelines", "evaluate", "cli", "__main__",
)  # fmt: skip
MAY_IMPORT = {"__init__": set(), **{room: set(ORDER[:i]) for i, room in enumerate(ORDER)}}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path, package=PACKAGE):
    """Dotted name of a file, `dalle_jax.nn.masks`; a package's own file ends in `.__init__`."""
    return ".".join((package.name, *path.relative_to(package).with_suffix("").parts))


def imported(source: str, name: str) -> list[tuple[int, str]]:
    """(line, dotted module) of every import anywhere in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x
                parts = name.split(".")[: -node.level]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from dalle_jax import dvae` names a module by its alias; a function by it does no harm here
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def wrong_arrows(source: str, name: str) -> list[str]:
    """A sentence for each import of `source` that runs against the table."""
    room = name.split(".")[1]
    if room not in MAY_IMPORT:
        return [f"{name}: room {room!r} has no row in tests/test_layout.py; give it one"]
    lines = []
    for line, module in imported(source, name):
        parts = module.split(".")
        if parts[0] != "dalle_jax" or len(parts) < 2:
            continue
        if parts[1] != room and parts[1] not in MAY_IMPORT[room]:
            allowed = ", ".join(sorted(MAY_IMPORT[room])) or "nothing"
            lines.append(f"{name}:{line} imports {module}, but {room} may import only: {allowed}")
    return lines


def test_imports_run_one_way():
    assert len(FILES) > 10
    wrong = [line for path in FILES for line in wrong_arrows(path.read_text(encoding="utf-8"), name_of(path))]
    assert not wrong, "\n" + "\n".join(wrong)


def test_the_walk_sees_every_form_of_import():
    """Else the law above could hold because nothing is looked at."""
    forms = [
        "import dalle_jax.models.dalle",
        "import dalle_jax.models.dalle as d",
        "from dalle_jax.models import dalle",
        "from dalle_jax.models.dalle import init",
        "def f():\n    from dalle_jax.models.dalle import init",
        "from ..models import dalle",
        "from ..models.dalle import init",
    ]
    for form in forms:
        assert wrong_arrows(form, "dalle_jax.nn.masks"), form
        assert not wrong_arrows(form, "dalle_jax.sampling.generate"), form
    assert wrong_arrows("x = 1", "dalle_jax.attic.x") == [
        "dalle_jax.attic.x: room 'attic' has no row in tests/test_layout.py; give it one"
    ]


def test_every_row_of_the_table_is_a_room():
    gone = [
        room for room in MAY_IMPORT if not list(PACKAGE.glob(f"{room}.py")) and not (PACKAGE / room).is_dir()
    ]
    assert not gone, f"tests/test_layout.py has rows for rooms that do not exist: {', '.join(gone)}"


def test_python_m():
    command = [sys.executable, "-m", "dalle_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout.strip()) == (0, dalle_jax.__version__), done.stderr


def test_every_room_stands_in_the_docs():
    table = (PACKAGE.parent / "docs" / "library.md").read_text(encoding="utf-8").split("## Functions")[0]
    missing = [room for room in MAY_IMPORT if room != "__init__" and f"`{room}" not in table]
    assert not missing, f"docs/library.md has no row for {', '.join(missing)}"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("orbax", {"dalle_jax.checkpoint.manager"}),
        ("grain", {"dalle_jax.data.loader.pipeline"}),
        ("array_record", {"dalle_jax.data.codes"}),
        ("sentencepiece", {"dalle_jax.text.tokenizers"}),
        ("torch", set()),
    ],
)
def test_library_has_one_home(library, homes):
    found = {
        name_of(path)
        for path in FILES
        for _, module in imported(path.read_text(encoding="utf-8"), name_of(path))
        if module.split(".")[0] == library
    }
    assert found == homes


def fresh(code: str) -> str:
    """Standard output of `code` in a new interpreter."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = (
    "tensorflow_datasets",
    "tensorflow",
    "grain",
    "array_record",
    "orbax",
    "PIL",
    "sentencepiece",
    "tyro",
    "optax",
)


def test_import_is_light():
    """`import dalle_jax` loads nothing but itself, and so touches no device."""
    seconds, *loaded = fresh(
        "import time, sys; t = time.perf_counter(); import dalle_jax; print(time.perf_counter() - t);"
        f"print(*[m for m in {('jax', 'jaxlib', 'flax', 'numpy', *HEAVY)} if m in sys.modules])"
    ).splitlines()
    assert not "".join(loaded), f"import dalle_jax loads {loaded}"
    assert float(seconds) < 1.5


def test_model_rooms_load_no_data_libraries():
    """The functions a researcher imports need jax and flax only, and importing them starts no backend."""
    out = fresh(
        "import sys, dalle_jax as dj; dj.dalle.init, dj.nn.__name__;"
        "import dalle_jax.sampling.generate, dalle_jax.models.dvae, dalle_jax.parallel.sharding;"
        f"print(*[m for m in {HEAVY} if m in sys.modules]);"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert out == "False", f"loaded, then whether a device was touched: {out}"


def test_rooms_are_attributes():
    assert dalle_jax.config.DalleConfig.__name__ == "DalleConfig"
    assert set(dalle_jax.__all__) <= set(dir(dalle_jax))
    with pytest.raises(AttributeError, match=r"no attribute 'dall'; it has config, typing, text"):
        _ = dalle_jax.dall
    missing = [
        name
        for name in dalle_jax.__all__
        if not [*PACKAGE.glob(f"{name}*"), *PACKAGE.glob(f"models/{name}*")]
    ]
    assert not missing, f"dalle_jax names rooms that do not exist: {missing}"
