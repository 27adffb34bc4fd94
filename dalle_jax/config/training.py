"""One training run: optimizer, mesh, processes, and intervals of logging, evaluation and checkpoints."""

from __future__ import annotations

import re
from dataclasses import field
from typing import Literal

from dalle_jax.config.bart import BartConfig
from dalle_jax.config.clip import ClipConfig
from dalle_jax.config.dalle import DalleConfig
from dalle_jax.config.data import DataConfig, TextConfig
from dalle_jax.config.diffusion import DiffusionConfig
from dalle_jax.config.schema import (
    frozen_config,
    require,
    require_above_zero,
    require_at_least,
    require_fraction,
)
from dalle_jax.config.tokenizer import TokenizerConfig

Optimizer = Literal["adamw", "adamw_bf16", "adafactor"]
TransformerConfig = DalleConfig | BartConfig  # text to image tokens
ModelConfig = TokenizerConfig | TransformerConfig | ClipConfig | DiffusionConfig


@frozen_config
class OptimConfig:
    """Optimizer with weight decay on matrices only, clipping, warm-up and a schedule; an EMA of the parameters."""

    # Bytes of state per parameter: adamw 8; adamw_bf16, moments in bfloat16, 4; adafactor, factored and without a first
    # moment, almost none.
    optimizer: Optimizer = "adamw"
    learning_rate: float = 4.5e-4  # after warm-up; B.2
    warmup_steps: int = 5_000  # linear from 0; B.2
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    decay_steps: int | None = None  # updates to the schedule's end; None is `steps`
    final_lr_ratio: float = 1 / 32  # last learning rate over the largest; B.2
    b1: float = 0.9  # decay rate of Adam's first moment, the mean of the gradients
    b2: float = 0.96  # decay rate of Adam's second moment, the mean of the squared gradients; B.2
    eps: float = 1e-8  # added to the root of Adam's second moment
    weight_decay: float = 4.5e-2  # of matrices, times the learning rate; B.2
    clip_norm: float = 4.0  # of the global gradient norm; 0 turns it off; B.2
    grad_accum_steps: int = 1  # microbatches per update; gradients are averaged
    ema_decay: float = 0.99  # of the parameters used for sampling; 0 turns the EMA off; B.2
    ema_every: int = 25  # updates between EMA steps; B.2

    def __post_init__(self):
        require(
            self.optimizer != "adamw_bf16" or max(self.b1, self.b2) <= 0.99,
            f"Expected optim.b1 and optim.b2 of at most 0.99 with adamw_bf16, got {self.b1} and {self.b2}. "
            "bfloat16 rounds the updates of longer averages to zero.",
        )
        require_above_zero(self, "learning_rate")
        require_at_least(self, 0, "warmup_steps")
        require_at_least(self, 1, "grad_accum_steps")
        require_at_least(self, 0, "clip_norm", hint="Use 0 to turn clipping off.")
        require_fraction(self, "ema_decay", below_one=True)
        require_at_least(self, 1, "ema_every")
        require_fraction(self, "final_lr_ratio")


@frozen_config
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1: all remaining devices."""

    # TPU slices, connected by the data center network; -1 is all. The other sizes are within one slice.
    slices: int = -1
    data: int = -1  # batch is split; parameters are replicated
    fsdp: int = 1  # batch is split; parameters and optimizer state are split too
    model: int = 1  # heads and channels are split
    # Without an accelerator: devices to split the CPU into, 0 is one; one per core is faster than one of many cores.
    cpu_devices: int = 0

    def __post_init__(self):
        sizes = (self.data, self.fsdp, self.model)
        require(
            all(s >= 1 or s == -1 for s in sizes) and sizes.count(-1) <= 1,
            "Expected mesh sizes of at least 1, at most one of them -1, "
            f"got data={self.data} fsdp={self.fsdp} model={self.model}.",
        )
        require(
            self.slices >= 1 or self.slices == -1,
            f"Expected mesh.slices -1 or at least 1, got {self.slices}.",
        )
        require(
            0 <= self.cpu_devices <= 1024,
            f"Expected mesh.cpu_devices in [0, 1024], got {self.cpu_devices}. Use about one for each core.",
        )


@frozen_config
class DistributedConfig:
    """The processes of a training run and their timeouts (docs/pods.md).

    On Cloud TPU, GKE, Slurm and Open MPI nothing needs to be set. Elsewhere every process has the same
    coordinator_address and num_processes, and its own process_id. num_processes=1 trains in one process regardless of
    the environment.
    """

    coordinator_address: str | None = None  # HOST:PORT of process 0; None: from the cluster
    num_processes: int | None = None
    process_id: int | None = None  # of this process, from 0
    initialization_timeout_seconds: int = 300  # for all processes to connect
    heartbeat_timeout_seconds: int = 100  # after it a silent process counts as lost, and the others exit
    stall_timeout_seconds: int = (
        1800  # longest step, save or compilation, after which all exit; 0 turns it off
    )

    def __post_init__(self):
        values = (self.coordinator_address, self.num_processes, self.process_id)
        alone = self.num_processes == 1 and self.coordinator_address is None and self.process_id in (None, 0)
        require(
            alone or all(x is None for x in values) or None not in values,
            "Expected all or none of distributed.coordinator_address, num_processes and process_id, "
            f"got {values[0]}, {values[1]} and {values[2]}. Use none where the cluster is detected.",
        )
        if self.coordinator_address is not None:
            port = self.coordinator_address.rpartition(":")[2]
            require(
                ":" in self.coordinator_address and port.isdecimal() and 0 < int(port) < 65536,
                f"Expected distributed.coordinator_address HOST:PORT of process 0, got {self.coordinator_address!r}.",
            )
            count, process = self.num_processes or 0, -1 if self.process_id is None else self.process_id
            require(
                count >= 1 and 0 <= process < count,
                f"Expected distributed.process_id in [0, num_processes {self.num_processes}), got {self.process_id}.",
            )
        require_at_least(self, 1, "initialization_timeout_seconds", "heartbeat_timeout_seconds")
        require_at_least(self, 0, "stall_timeout_seconds", hint="Use 0 to turn the timeout off.")


@frozen_config
class ProfileConfig:
    """Steps that are profiled for XProf or Perfetto, in `profile/` of the run directory."""

    steps: str = ""  # FIRST:LAST, both included, e.g. 10:15; "" is none

    def __post_init__(self):
        if self.steps:
            first, colon, last = self.steps.partition(":")
            require(
                bool(colon) and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last),
                f"Expected profile.steps FIRST:LAST with 1 <= FIRST <= LAST, got {self.steps!r}. Use e.g. 10:15.",
            )

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last profiled step, or None."""
        if not self.steps:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)


@frozen_config
class TrainConfig:
    """One training run. The type of `model` is the stage."""

    model: ModelConfig
    run: str = ""  # run directory
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)  # stages that read captions
    # Run directory of an image tokenizer: its codes are modeled; with a clip, every second training image is its
    # reconstruction.
    image_tokenizer: str | None = None
    init_from: str | None = None  # run directory whose parameters initialize a new run
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    compilation_cache_dir: str | None = None  # of compiled programs, kept between runs
    # NAME=VALUE each, for the compiler of the training step, over our defaults; NAME= restores the compiler's default.
    compiler_options: tuple[str, ...] = ()
    steps: int = 100_000  # updates
    seed: int = 0  # of the parameters and of the random numbers of each step
    log_every: int = 10  # updates between lines of metrics.jsonl
    eval_every: int = 1_000  # updates between evaluations
    eval_rows: int = 256  # rows per evaluation
    sample_every: int = 5_000  # updates between sample grids
    save_every: int = 1_000  # updates between checkpoints
    max_checkpoints: int = 3  # latest checkpoints to keep, beside the best by the stage's metric

    def __post_init__(self):
        require_at_least(
            self,
            1,
            "steps",
            "log_every",
            "eval_every",
            "eval_rows",
            "sample_every",
            "save_every",
            "max_checkpoints",
        )
        for option in self.compiler_options:
            require(
                re.fullmatch(r"[a-z]\w*=\S*", option) is not None,
                f"Expected NAME=VALUE in compiler_options, got {option!r}. "
                "Use e.g. xla_tpu_scoped_vmem_limit_kib=65536.",
            )
        require(
            self.data.batch_size % self.optim.grad_accum_steps == 0,
            f"Expected data.batch_size divisible by optim.grad_accum_steps {self.optim.grad_accum_steps}, "
            f"got {self.data.batch_size}. Change one of them.",
        )
        require(
            self.data.codes is None or isinstance(self.model, TransformerConfig),
            f"Expected no data.codes for a model of kind {self.model.kind}, got {self.data.codes}. "
            "Only dalle and bart train on codes.",
        )
        if isinstance(self.model, DiffusionConfig):
            require(
                self.model.codes is not None or self.image_tokenizer is None,
                f"Expected no image_tokenizer without model.codes, got {self.image_tokenizer}. "
                "Set model.codes or remove image_tokenizer.",
            )
        elif not isinstance(self.model, (TransformerConfig, ClipConfig)):
            require(
                self.image_tokenizer is None,
                f"Expected no image_tokenizer for a model of kind {self.model.kind}, got {self.image_tokenizer}. "
                "Remove it.",
            )
        if isinstance(self.model, ClipConfig):
            require(
                self.optim.grad_accum_steps == 1,
                "Expected optim.grad_accum_steps 1 for a clip, which compares the rows of a batch, "
                f"got {self.optim.grad_accum_steps}. Set model.grad_cache_chunks instead.",
            )
            require(
                self.data.batch_size % self.model.grad_cache_chunks == 0,
                f"Expected data.batch_size divisible by model.grad_cache_chunks {self.model.grad_cache_chunks}, "
                f"got {self.data.batch_size}. Change one of them.",
            )
            require(
                self.image_tokenizer is None or self.data.batch_size % 2 == 0,
                "Expected an even data.batch_size for a clip with an image_tokenizer, "
                f"got {self.data.batch_size}. Every second image is a reconstruction.",
            )
            require(
                self.data.batch_size >= 2,
                "Expected data.batch_size of at least 2 for a clip, which compares the rows of a batch, "
                f"got {self.data.batch_size}.",
            )
