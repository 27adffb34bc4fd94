"""Many processes, one training: how they find each other, which rows each reads, and how one that fails ends all.

Every process runs the same program on its own devices, and a jitted step spans all of them. So whatever leads to
a jitted call must be the same everywhere, and a process that leaves early would keep the others waiting for ever:
one that fails leaves at once (`leave`), and the others learn of it from the lost connection or heartbeat.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from dalle_jax.config import DistributedConfig

LOST = 4  # exit code where another process was lost, or nothing moved any more


def initialize_distributed(cfg: DistributedConfig, cpu_devices: int = 0) -> None:
    """Joins the processes of one training, if there are several; before any device is used.

    cpu_devices: as `mesh.cpu_devices`, here of each process; joining makes the devices known to all.

    The coordinator is that of `cfg`, or else the cluster's: Cloud TPU, GKE, Slurm, Open MPI, as
    `jax.distributed.initialize` finds them. Does nothing on a machine that is alone, or where the processes are
    joined already. Raises ValueError for a cluster that jax cannot make out, OSError where the processes do not
    find each other in `cfg.initialization_timeout_seconds`.
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
        if cluster == "Cloud TPU":  # a TPU that no metadata server describes: this host is all there is
            return
        raise ValueError(
            f"this looks like one of several processes of {cluster}, but they cannot be found: {error}. Give "
            "--distributed.coordinator-address HOST:PORT --distributed.num-processes N --distributed.process-id I, or "
            "--distributed.num-processes 1 to train alone"
        ) from error
    except RuntimeError as error:  # jax's own errors of this kind among them
        where = cfg.coordinator_address or f"what {cluster} names"
        raise OSError(
            f"no connection to the other processes ({where}) in {cfg.initialization_timeout_seconds} s: {first_line(error)}. "
            "Look whether all are started, and whether they reach process 0 on that port"
        ) from error


def _cluster() -> str | None:
    """The cluster that has started this process beside others, by the marks that jax reads; None if none has."""
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
        if "TPU_SKIP_MDS_QUERY" not in env:  # jax sets it where it sees no TPU
            return "Cloud TPU"
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return "Kubernetes"
    return None


def process_share() -> tuple[int, int]:
    """(p, P): number p of P processes started side by side, for work that they share without joining; (0, 1) alone.

    By the marks of Slurm and Open MPI; on a Cloud TPU what jax knows. Raises ValueError where a cluster does not
    say how many there are.
    """
    env, cluster = os.environ, _cluster()
    match cluster:
        case "Slurm":
            return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
        case "Open MPI":
            return int(env["OMPI_COMM_WORLD_RANK"]), int(env["OMPI_COMM_WORLD_SIZE"])
        case "Kubernetes":
            raise ValueError(
                f"this is process {env['JOB_COMPLETION_INDEX']} of a job of {cluster}, which does not say of how many; "
                "give --process and --processes"
            )
    return jax.process_index(), jax.process_count()


def exit_process(code: int) -> None:
    """Ends this process at once, without the farewell that would wait for the others.

    Process 0 stays for a moment: with it goes the coordinator, and the others should have told what they know.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)
    os._exit(code)


def process_name() -> str:
    """`process 2 of 4`."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def local_rows(sharding: NamedSharding, count: int) -> np.ndarray:
    """The rows of a batch of `count` that the devices of this process hold, ascending: those it has to read.

    Processes that hold parts of the same rows (a mesh axis other than the batch's runs across them) read them
    both.
    """
    held = np.zeros(count, bool)
    for (index,) in sharding.addressable_devices_indices_map((count,)).values():
        held[index] = True
    return np.flatnonzero(held)


def make_global_batch(x: np.ndarray, rows: np.ndarray, count: int, sharding: NamedSharding) -> jax.Array:
    """The batch of `count` rows of which `x` holds `rows` here, over all devices of all processes."""

    def piece(index):
        start, stop, _ = index[0].indices(count)
        first = np.searchsorted(rows, start)
        return x[first : first + stop - start]

    return jax.make_array_from_callback((count, *x.shape[1:]), sharding, piece)


def device_put_global(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, laid out by `shardings` over all devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, shardings)


def gather_to_host(x: jax.Array) -> np.ndarray:
    """`x` whole on the host, also where other processes hold parts of it; all of them must call."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def first_line(error: BaseException) -> str:
    """The first line of an error, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
