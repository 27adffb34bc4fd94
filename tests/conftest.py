"""Settings of the test suite: 8 CPU devices, strict rank promotion, deprecation warnings of this package are errors, no
network."""

import getpass
import re
import socket
import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs compiled by earlier runs of the suite; the cache key includes jax's version and all compile options.
jax.config.update(
    "jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / f"dalle_jax_tests_{getpass.getuser()}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

pytest_plugins = ("cli_fixtures",)


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", r"error::DeprecationWarning:(dalle_jax|test_|conftest)")
    config.addinivalue_line("filterwarnings", r"error::FutureWarning:(dalle_jax|test_|conftest)")
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):  # `pytest -m gpu`
        jax.config.update("jax_platforms", None)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(self, address, *rest):
        if self.family == socket.AF_UNIX:
            return connect(self, address, *rest)
        raise OSError(f"Expected no network in tests, got a connection to {address}.")

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True, scope="module")
def _clear_programs():
    """Drop the compiled programs of each test file: a process may have 65,530 memory mappings on Linux, and XLA
    aborts when the programs of all files exceed them."""
    yield
    jax.clear_caches()


@pytest.fixture
def fake_models(monkeypatch):
    """`load_run` of runs of a FakeTask, whose parameters are not those of its configuration."""
    monkeypatch.setattr("dalle_jax.checkpoint.load.check_checkpoint_shapes", lambda *_: None)
