"""Processes of a distributed training: initialization, names, and exit after a failure.

Every process runs the same program on its own devices, and a jitted step spans the devices of all processes. All
processes therefore make the same jitted calls in the same order. A process that fails exits at once (`exit_process`),
because the others would wait for it; they detect the lost connection or heartbeat.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time

import jax

from dalle_jax.config import DistributedConfig

PROCESS_LOST = 4  # exit code after the loss of another process or a stall


def initialize_distributed(cfg: DistributedConfig, cpu_devices: int = 0) -> None:
    """Connect the processes of a distributed training; to be called before any device is used.

    The coordinator is that of `cfg`, or that of the cluster as `jax.distributed.initialize` detects it: Cloud TPU, GKE,
    Slurm, Open MPI. Without either, and if the processes are connected already, this does nothing.

    Args:
      cfg: coordinator, number of processes, timeouts.
      cpu_devices: CPU devices of each process, as `mesh.cpu_devices`; 0 keeps jax's setting.

    Raises:
      ValueError: jax cannot determine the processes of the cluster.
      OSError: the processes do not connect within `cfg.initialization_timeout_seconds`.
    """
    if cfg.num_processes == 1 or jax.distributed.is_initialized():
        return
    cluster = None if cfg.coordinator_address else _cluster()
    if not (cfg.coordinator_address or cluster):
        return
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is ours (parallel/preemption.py)
    try:
        jax.distributed.initialize(
            cfg.coordinator_address,
            cfg.num_processes,
            cfg.process_id,
            cluster_detection_method="deactivate" if cfg.coordinator_address else None,
            initialization_timeout=cfg.initialization_timeout_seconds,
            heartbeat_timeout_seconds=cfg.heartbeat_timeout_seconds,
            shutdown_timeout_seconds=cfg.initialization_timeout_seconds,
        )
        if cpu_devices:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        jax.devices()
    except ValueError as error:
        if cluster == "Cloud TPU":  # without a metadata server this host is the only one
            return
        raise ValueError(
            f"Expected to find the processes of {cluster}, got: {error}. Set --distributed.coordinator-address "
            "HOST:PORT --distributed.num-processes N --distributed.process-id I, or --distributed.num-processes 1 to "
            "train on this machine alone."
        ) from error
    except RuntimeError as error:  # includes JaxRuntimeError
        where = cfg.coordinator_address or f"the coordinator of {cluster}"
        raise OSError(
            f"Expected a connection to the other processes ({where}) within {cfg.initialization_timeout_seconds} s, "
            f"got: {first_line(error)}. Check that all processes are started and can reach process 0 on that port."
        ) from error


def _cluster() -> str | None:
    """Return the cluster that started this process and others, by the environment variables that jax reads, or None."""
    env = os.environ
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in slurm):
        return "Slurm" if env["SLURM_NTASKS"] != "1" else None
    if env.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if importlib.util.find_spec("libtpu") is not None:
        hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
        if "," in hosts or env.get("MEGASCALE_NUM_SLICES", "1") != "1":
            return "GKE"
        if "TPU_SKIP_MDS_QUERY" not in env:  # jax sets it on a host without a TPU
            return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    return None


def process_index_and_count() -> tuple[int, int]:
    """Return the index and number of processes, for work that they divide without `initialize_distributed`.

    The values come from Slurm and Open MPI, or else from jax; (0, 1) for a single process.

    Raises:
      ValueError: the cluster does not provide the number of processes.
    """
    env, cluster = os.environ, _cluster()
    match cluster:
        case "Slurm":
            return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        case "Open MPI":
            return int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"])
        case "Kubernetes":
            raise ValueError(
                f"Expected the number of processes, got only index {env['JOB_COMPLETION_INDEX']} from {cluster}. Set "
                "--process and --processes."
            )
    return jax.process_index(), jax.process_count()


def exit_process(code: int) -> None:
    """Exit at once, without jax's shutdown barrier, which would wait for the other processes.

    Process 0 waits 2 seconds: the coordinator ends with it, and the others should print their errors first.

    Args:
      code: exit code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)
    os._exit(code)


def process_name() -> str:
    """Return `process 2 of 4`."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 300 characters, or the name of its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
