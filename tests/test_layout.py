"""Tests of the package layout: imports run one way, and heavy libraries load only where they are used."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dalle_jax

PACKAGE = Path(dalle_jax.__file__).parent

# Subpackages from the lowest to the highest; each imports only itself and those before it.
ORDER = (
    "typing", "files", "config", "text", "parallel", "nn", "models", "data", "sampling", "importers", "checkpoint",
    "train", "aot", "pipelines", "evaluate", "cli", "__main__",
)  # fmt: skip
MAY_IMPORT = {"__init__": set(), **{subpackage: set(ORDER[:i]) for i, subpackage in enumerate(ORDER)}}
FILES = sorted(PACKAGE.rglob("*.py"))


def dotted_name(path, package=PACKAGE):
    """Return the dotted name of a file, `dalle_jax.nn.masks`; that of a package ends in `.__init__`."""
    return ".".join((package.name, *path.relative_to(package).with_suffix("").parts))


def imports_of(source: str, name: str) -> list[tuple[int, str]]:
    """Return (line, dotted module) of every import in a file, also inside functions."""
    imports = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # from . import x
                parts = name.split(".")[: -node.level]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            # `from dalle_jax.x import y`: y may be a module or a function; only the subpackage matters here.
            imports += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return imports


def wrong_imports(source: str, name: str) -> list[str]:
    """Return a message for each import of `source` that runs against ORDER."""
    subpackage = name.split(".")[1]
    if subpackage not in MAY_IMPORT:
        return [f"{name}: subpackage {subpackage!r} is not in ORDER of tests/test_layout.py"]
    lines = []
    for line, module in imports_of(source, name):
        parts = module.split(".")
        if parts[0] != "dalle_jax" or len(parts) < 2:
            continue
        if parts[1] != subpackage and parts[1] not in MAY_IMPORT[subpackage]:
            allowed = ", ".join(sorted(MAY_IMPORT[subpackage])) or "nothing"
            lines.append(f"{name}:{line} imports {module}, but {subpackage} may import only: {allowed}")
    return lines


def test_imports_run_one_way():
    assert len(FILES) > 10
    wrong = [
        line for path in FILES for line in wrong_imports(path.read_text(encoding="utf-8"), dotted_name(path))
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_every_form_of_import_is_checked():
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
        assert wrong_imports(form, "dalle_jax.nn.masks"), form
        assert not wrong_imports(form, "dalle_jax.sampling.generate"), form
    assert wrong_imports("x = 1", "dalle_jax.attic.x") == [
        "dalle_jax.attic.x: subpackage 'attic' is not in ORDER of tests/test_layout.py"
    ]


def test_order_names_existing_subpackages():
    missing = [
        subpackage
        for subpackage in MAY_IMPORT
        if not list(PACKAGE.glob(f"{subpackage}.py")) and not (PACKAGE / subpackage).is_dir()
    ]
    assert not missing, f"ORDER of tests/test_layout.py has names that do not exist: {', '.join(missing)}"


def test_every_package_is_in_the_wheel():
    listed = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {".".join(path.relative_to(PACKAGE.parent).parent.parts) for path in FILES}
    assert set(listed["tool"]["setuptools"]["packages"]) == packages | {"dalle_jax.configs"}


def test_python_m():
    command = [sys.executable, "-m", "dalle_jax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout.strip()) == (0, dalle_jax.__version__), done.stderr


def test_docs_list_the_subpackages_in_order():
    table = (PACKAGE.parent / "docs" / "library.md").read_text(encoding="utf-8").split("## API reference")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)/?`", row)]
    assert names == list(reversed(ORDER))


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("orbax", {"dalle_jax.checkpoint.manager"}),
        ("grain", {"dalle_jax.data.loader.pipeline"}),
        ("array_record", {"dalle_jax.data.codes"}),
        ("sentencepiece", {"dalle_jax.text.sentencepiece_model"}),
        ("torch", set()),
    ],
)
def test_library_is_imported_in_one_module(library, modules):
    importers = {
        dotted_name(path)
        for path in FILES
        for _, module in imports_of(path.read_text(encoding="utf-8"), dotted_name(path))
        if module.split(".")[0] == library
    }
    assert importers == modules


def fresh(code: str) -> str:
    """Return the standard output of `code` in a new interpreter."""
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
    """`import dalle_jax` loads no other library and initializes no device."""
    seconds, *loaded = fresh(
        "import time, sys; t = time.perf_counter(); import dalle_jax; print(time.perf_counter() - t);"
        f"print(*[m for m in {('jax', 'jaxlib', 'flax', 'numpy', *HEAVY)} if m in sys.modules])"
    ).splitlines()
    assert not "".join(loaded), f"import dalle_jax loads {loaded}"
    assert float(seconds) < 1.5


def test_model_functions_load_no_data_libraries():
    """Model and sampling functions need jax and flax only, and importing them initializes no backend."""
    out = fresh(
        "import sys, dalle_jax as dj; dj.dalle.init, dj.nn.__name__;"
        "import dalle_jax.sampling.generate, dalle_jax.models.dvae, dalle_jax.parallel.sharding;"
        f"print(*[m for m in {HEAVY} if m in sys.modules]);"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert out == "False", f"libraries loaded, then whether a backend is initialized: {out}"


def test_subpackages_and_models_are_attributes():
    assert dalle_jax.config.DalleConfig.__name__ == "DalleConfig"
    assert dalle_jax.load is dalle_jax.pipelines.load
    for name in set(dir(dalle_jax)) - {"load"}:
        assert getattr(dalle_jax, name).__name__ in (f"dalle_jax.{name}", f"dalle_jax.models.{name}")
    with pytest.raises(AttributeError, match=r"Expected one of config, files, typing.*got dalle_jax.dall\."):
        _ = dalle_jax.dall
