"""Test of public names: a name is public in one module, except the verbs of the model protocol."""

import ast
from collections import defaultdict
from pathlib import Path

import dalle_jax

PACKAGE = Path(dalle_jax.__file__).parent

# The functions of a model (docs/library.md), the interface of importers, and the handler and flags of a command.
PROTOCOL = {
    "init", "encode", "decode", "loss", "logits", "sample", "prefill", "decode_step", "init_cache", "resize_cache",
    "insert_into_cache", "decode_drafts", "commit_drafts", "null_text", "encode_text", "from_tensors", "load_params",
    "run",
    "FLAGS",
}  # fmt: skip


def public_names(source: str) -> list[str]:
    """Return functions, classes and constants of a module that have no leading underscore."""
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def test_public_names_of_a_module():
    source = (
        "A = 1\nB: int = 2\n_C = 3\ndef f(): ...\nasync def g(): ...\nclass D: ...\ndef _h(): ...\nimport os"
    )
    assert public_names(source) == ["A", "B", "f", "g", "D"]


def test_a_public_name_stands_in_one_module():
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_names(path.read_text(encoding="utf-8")):
            modules[name].append(str(path.relative_to(PACKAGE)))
    shared = {name: files for name, files in modules.items() if len(set(files)) > 1 and name not in PROTOCOL}
    assert len(modules) > 300
    assert not shared, "Rename these, or make them private:\n" + "\n".join(
        f"  {name}: {', '.join(files)}" for name, files in shared.items()
    )
