"""Tests of benchmarks/sample.py: the table and the ratios of hand-made measurements, and the bound."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sample(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.sample")


JOB = {"dim": 2, "layers": 1, "text_len": 2, "grid": 2, "codes": 6, "batch": 2, "dtype": "float32"}


def test_bytes_per_code_are_weights_and_half_the_image(sample):
    # 12 * 2 * 2 weights of the layer and 2 * 6 of the head; keys and values of 2 + 4 / 2 positions of width 2, per row.
    assert sample.bytes_per_code(JOB) == (4 * (48 + 12) + 4 * 2 * 2 * 2 * 4) / 2
    assert sample.bytes_per_code({**JOB, "dtype": "bfloat16"}) == sample.bytes_per_code(JOB) / 2


def test_rates_are_those_of_the_median_with_and_without_the_prefill(sample):
    result = {"seconds": [9.0, 2.0, 1.0], "prefill": [0.5, 0.5, 0.7], "compile": 3.0}
    row = sample.measured_row("x", JOB, result, 10 * sample.bytes_per_code(JOB))
    assert (row["rate"], row["of_bound"]) == pytest.approx((8 / 2.0, 0.4))
    assert (row["decode_rate"], row["decode_of_bound"]) == pytest.approx((6 / 1.5, 0.4))


def test_table_compares_each_dtype_and_the_best_of_each_side(sample, monkeypatch, capsys):
    seconds = {
        ("torch", "float32"): 4.0, ("torch", "bfloat16"): 2.0, ("llama", "float32"): 1.0,
        ("full", "float32"): 0.5, ("full", "bfloat16"): 4.0,
    }  # fmt: skip
    pythons = []

    def run_job(python, module, job):
        pythons.append((python, module))
        if job["name"] == "bandwidth":
            return {"bandwidth": 1e9, "device": "cpu"}
        if (taken := seconds.get((job["name"], job["dtype"]))) is None:
            return "out of memory"
        return {"seconds": [taken], "prefill": [taken / 2], "compile": 1.0, "version": module}

    monkeypatch.setattr(sample, "run_job", run_job)
    words = [
        "sample",
        "--batch",
        "1",
        "--models",
        "full",
        "--peers",
        "torch",
        "llama",
        "--peer-python",
        "PEER",
        "--grid",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", words)
    sample.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:3] + row[-1:] for row in rows[2:]] == [
        ["torch", "float32", "1.0", ""],
        ["torch", "bfloat16", "2.0", ""],
        ["llama", "float32", "4.0", ""],
        ["llama", "bfloat16", "failed: out of memory", ""],
        ["dalle_jax, full", "float32", "8.0", "2.00"],
        ["dalle_jax, full", "bfloat16", "1.0", "0.50"],
    ]
    assert len({len(row) for row in rows}) == 1
    # The best are 8 codes per second in float32 and, of the peers, 4 in float32.
    assert lines[-3] == (
        "- dalle_jax, full: 2.00 in float32, 0.50 in bfloat16; 2.00 at best (float32 over float32)."
    )
    assert lines[-1] == "benchmarks.peers, benchmarks.sample" and ("PEER", "benchmarks.peers") in pythons


def test_jobs_find_the_repository_and_keep_the_path(sample, monkeypatch, tmp_path):
    report = importlib.import_module("benchmarks.report")
    (tmp_path / "echo_job.py").write_text("import sys, benchmarks\nprint(sys.argv[2])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert report.run_job(sys.executable, "echo_job", {"a": 1}) == {"a": 1}
    (tmp_path / "fails.py").write_text("raise ValueError('a problem')")
    assert report.run_job(sys.executable, "fails", {}) == "ValueError: a problem"
