"""Tests of benchmarks/train.py: our timed step, the peer's job, and the table of a hand-made report."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from dalle_jax.cli.train import parse_train_args

ROOT = Path(__file__).resolve().parent.parent
TINY_DALLE = (
    "demo_dalle", "--model.dim", "16", "--model.heads", "2", "--model.layers", "1", "--model.grid", "2",
    "--model.text-vocab", "20", "--model.text-len", "3", "--model.image-vocab", "10",
    "--data.batch-size", "8", "--model.scan-unroll", "1",
)  # fmt: skip


@pytest.fixture
def train(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.train")


def config_of(*words):
    return parse_train_args(words, "benchmarks.train").config


def test_our_step_is_timed_without_an_image_tokenizer(train):
    result = train.time_steps(config_of(*TINY_DALLE), 3, None)
    assert len(result["seconds"]) == 3 and min(result["seconds"]) > 0
    assert result["flops_per_step"] > 0 and result["tokens_per_row"] == 3 + 2 * 2
    # Embeddings of ids, codes, text positions, rows and columns; a block with QK-norm of 8 channels; a norm; two heads.
    embeddings = 16 * (23 + 10 + 3 + 2 + 2)
    block = 2 * 2 * 16 + 4 * (16 * 16 + 16) + 2 * 8 + (16 * 64 + 64) + (64 * 16 + 16)
    assert result["parameters"] == embeddings + block + 2 * 16 + 16 * (23 + 10)


def test_job_of_the_peer_has_the_network_and_the_optimizer(train):
    config = config_of(*TINY_DALLE, "--model.dtype", "bfloat16")
    job = json.loads(json.dumps(train.peer_job(config, 4)))
    assert (job["dtype"], job["batch"], job["steps"]) == ("bfloat16", 8, 4)
    assert (job["model"]["mlp_dim"], job["model"]["num_text_ids"]) == (64, 23)
    assert job["optim"]["clip_norm"] == 1.0 and job["optim"]["ema_decay"] == 0.995


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("demo_dalle", "--model.norm", "rms"), "Expected model.norm layer for --peer-python, got rms"),
        (("demo_dalle", "--optim.optimizer", "adafactor"), "Expected optim.optimizer adamw .* got adafactor"),
        (("demo_diffusion",), "Expected model.text None"),
        (("demo_vqgan",), "Expected a model of dalle, dvae, diffusion .* got vqgan"),
    ],
)
def test_a_network_that_the_peer_does_not_have_raises(train, words, message):
    with pytest.raises(ValueError, match=message):
        train.peer_job(config_of(*words), 1)


def result(seconds, version, **values):
    defaults = {"device": "cpu", "devices": 1, "parameters": 1200, "flops_per_step": 4e9, "peak_gib": None}
    return {**defaults, "seconds": seconds, "version": version, "tokens_per_row": None, **values}


def hand_made_rows(train):
    ours, bf16 = result([0.5, 0.25, 1.0], "jax 1"), result([0.2], "jax 1")
    return [
        train.report_row("dalle_jax", "float32", 8, ours, ours),
        train.report_row("torch", "float32", 8, result([1.0], "torch 2"), ours),
        train.report_row("dalle_jax", "bfloat16", 8, bf16, bf16),
        train.report_row("torch", "bfloat16", 8, result([0.1], "torch 2"), bf16),
    ]


def report(rows, ratios):
    return {
        "machine": "EPYC with avx512f; 2 cores", "versions": ["jax 1", "torch 2"], "config": "x.py --steps 1",
        "kind": "dvae", "batch": 8, "parameters": {"dalle_jax": 1200, "torch": 1201}, "rows": rows, "ratios": ratios,
    }  # fmt: skip


def test_table_has_times_rates_and_ratios(train):
    rows = hand_made_rows(train)
    ratios = train.speed_ratios(train.rates_of(rows, "dalle_jax"), train.rates_of(rows, "torch"))
    # 0.5 s against 1 s, 0.2 s against 0.1 s; the best are 0.2 s and 0.1 s.
    assert ratios == pytest.approx({"float32": 2.0, "bfloat16": 0.5, "best": 0.5})
    assert train.format_report(report(rows, ratios)).splitlines() == [
        "EPYC with avx512f; 2 cores; jax 1, torch 2",
        "",
        "`x.py --steps 1`: dvae, batch 8; parameters: dalle_jax 1,200, torch 1,201",
        "",
        "|  | dtype | s/step, median | min | rows/s | model TFLOP/s |",
        "| --- | --- | --- | --- | --- | --- |",
        "| dalle_jax | float32 | 0.5000 | 0.2500 | 16.00 | 0.008 |",
        "| torch | float32 | 1.0000 | 1.0000 | 8.00 | 0.004 |",
        "| dalle_jax | bfloat16 | 0.2000 | 0.2000 | 40.00 | 0.02 |",
        "| torch | bfloat16 | 0.1000 | 0.1000 | 80.00 | 0.04 |",
        "",
        "Rows per second of dalle_jax over torch: 2.00 in float32, 0.50 in bfloat16; "
        "0.50 at best (bfloat16 over bfloat16).",
    ]


def test_failed_peer_has_a_row_and_no_ratio(train):
    rows = hand_made_rows(train)[:1]
    rows.append(train.report_row("torch", "float32", 8, "out of memory", rows[0]))
    lines = train.format_report(report(rows, {})).splitlines()
    assert lines[-1] == "| torch | float32 | failed: out of memory |  |  |  |"


def test_mfu_of_known_accelerators(train):
    ours = result([2.0], "jax 1", device="NVIDIA H100 PCIe", devices=2, flops_per_step=756e12, peak_gib=3.0)
    row = train.report_row("dalle_jax", "bfloat16", 8, ours, ours)
    assert row["mfu"] == pytest.approx(0.25)  # half of the FLOP/s of one of two devices
    assert "| 25.0% | 3.00 |" in train.format_report(report([row], {}))


def test_flags_of_the_cpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    describe_cpu = importlib.import_module("benchmarks.report").describe_cpu
    cpuinfo = "processor\t: 0\nmodel name\t: Xeon 8\nflags\t\t: fpu avx512f amx_tile\n\nprocessor\t: 1\n"
    assert describe_cpu(cpuinfo, 4) == ("Xeon 8 with avx512f amx_tile, without avx512_bf16 amx_bf16; 4 cores")
    assert describe_cpu("", 1) == "unknown CPU with no AVX-512; 1 cores"


def test_both_sides_run_in_processes_of_their_own(train, monkeypatch, capsys):
    jobs = []

    def run_job(python, module, job):
        jobs.append((python, module, job))
        return result([0.5], "jax 1") if module == "benchmarks.train" else result([1.0], "torch 2")

    monkeypatch.setattr(train, "run_job", run_job)
    words = ["demo_dvae", "--data.batch-size", "8"]
    assert train.main([*words, "--dtypes", "float32", "--peer-python", "PEER", "--json", "--steps", "2"]) == 0
    (ours, module, job), (peer, peer_module, peer_job) = jobs
    assert (ours, module, peer, peer_module) == (
        sys.executable, "benchmarks.train", "PEER", "benchmarks.train_peer",
    )  # fmt: skip
    assert job == {"words": [*words, "--model.dtype", "float32"], "steps": 2, "trace": None}
    assert (peer_job["parameters"], peer_job["batch"], peer_job["steps"]) == (1200, 8, 2)
    assert json.loads(capsys.readouterr().out)["ratios"] == {"float32": 2.0, "best": 2.0}


def test_no_configuration_is_an_error(train, capsys):
    with pytest.raises(SystemExit):
        train.main(["--steps", "2"])
    assert "the first argument is a configuration" in capsys.readouterr().err
