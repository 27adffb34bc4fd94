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
from dalle_jax.config.schema import frozen_config, require
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
    b1: float = 0.9
    b2: float = 0.96  # B.2
    eps: float = 1e-8
    weight_decay: float = 4.5e-2  # B.2
    clip_norm: float = 4.0  # of the global gradient norm; 0 turns it off; B.2
    grad_accum_steps: int = 1  # microbatches per update; gradients are averaged
    ema_decay: float = 0.99  # of the parameters used for sampling; 0 turns the EMA off; B.2
    ema_every: int = 25  # updates between EMA steps; B.2

    def __post_init__(self):
        require(
            self.optimizer != "adamw_bf16" or max(self.b1, self.b2) <= 0.99,
            f"optim.b1 {self.b1} and b2 {self.b2} with adamw_bf16; want at most 0.99: bfloat16 rounds smaller "
            "steps of a mean away",
        )
        require(self.learning_rate > 0, f"optim.learning_rate is {self.learning_rate}; want more than 0")
        require(self.warmup_steps >= 0, f"optim.warmup_steps is {self.warmup_steps}; want 0 or more")
        require(
            self.grad_accum_steps >= 1, f"optim.grad_accum_steps is {self.grad_accum_steps}; want at least 1"
        )
        require(self.clip_norm >= 0, f"optim.clip_norm is {self.clip_norm}; want 0 (off) or more")
        require(0 <= self.ema_decay < 1, f"optim.ema_decay is {self.ema_decay}; want [0, 1)")
        require(self.ema_every >= 1, f"optim.ema_every is {self.ema_every}; want at least 1")
        require(0 <= self.final_lr_ratio <= 1, f"optim.final_lr_ratio is {self.final_lr_ratio}; want [0, 1]")


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
            f"mesh data={self.data} fsdp={self.fsdp} model={self.model}; want sizes of at least 1, at most one -1",
        )
        require(self.slices >= 1 or self.slices == -1, f"mesh.slices is {self.slices}; want -1 or at least 1")
        require(
            0 <= self.cpu_devices <= 1024,
            f"mesh.cpu_devices is {self.cpu_devices}; want 0 to 1024, about one for each core",
        )


@frozen_config
class DistributedConfig:
    """The processes of a training run and their timeouts (docs/pods.md).

    On Cloud TPU, GKE, Slurm and Open MPI nothing needs to be set. Elsewhere every process has the same coordinator_address
    and num_processes, and its own process_id. num_processes=1 trains in one process regardless of the environment.
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
            f"distributed coordinator_address={self.coordinator_address} num_processes={self.num_processes} process_id={self.process_id}; "
            "want all three, or none on a cluster that is detected",
        )
        if self.coordinator_address is not None:
            port = self.coordinator_address.rpartition(":")[2]
            require(
                ":" in self.coordinator_address and port.isdecimal() and 0 < int(port) < 65536,
                f"distributed.coordinator_address is {self.coordinator_address!r}; want HOST:PORT of process 0",
            )
            count, process = self.num_processes or 0, -1 if self.process_id is None else self.process_id
            require(
                count >= 1 and 0 <= process < count,
                f"distributed.process_id is {self.process_id} of {self.num_processes}; want 0 to num_processes - 1",
            )
        for name, minimum in (
            ("initialization_timeout_seconds", 1),
            ("heartbeat_timeout_seconds", 1),
            ("stall_timeout_seconds", 0),
        ):
            value = getattr(self, name)
            require(value >= minimum, f"distributed.{name} is {value}; want at least {minimum}")


@frozen_config
class ProfileConfig:
    """Steps that are profiled for XProf or Perfetto, in `profile/` of the run directory."""

    steps: str = ""  # FIRST:LAST, both included, e.g. 10:15; "" is none

    def __post_init__(self):
        if self.steps:
            first, colon, last = self.steps.partition(":")
            require(
                bool(colon) and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last),
                f"profile.steps is {self.steps!r}; want FIRST:LAST with 1 <= FIRST <= LAST, as in 10:15",
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
        require(self.steps >= 1, f"steps is {self.steps}; want at least 1")
        for name in ("log_every", "eval_every", "eval_rows", "sample_every", "save_every", "max_checkpoints"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; want at least 1")
        for option in self.compiler_options:
            require(
                re.fullmatch(r"[a-z]\w*=\S*", option) is not None,
                f"compiler_options has {option!r}; want NAME=VALUE, as xla_tpu_scoped_vmem_limit_kib=65536",
            )
        require(
            self.data.batch_size % self.optim.grad_accum_steps == 0,
            f"data.batch_size {self.data.batch_size} is not divisible by optim.grad_accum_steps {self.optim.grad_accum_steps}; change one",
        )
        require(
            self.data.codes is None or isinstance(self.model, TransformerConfig),
            f"data.codes is for the stage dalle; a {self.model.kind} trains on pixels",
        )
        if isinstance(self.model, DiffusionConfig):
            require(
                self.model.codes is not None or self.image_tokenizer is None,
                "image_tokenizer is for a model conditioned on image tokens; set model.codes, or leave image_tokenizer out",
            )
        elif not isinstance(self.model, (TransformerConfig, ClipConfig)):
            require(
                self.image_tokenizer is None,
                f"image_tokenizer is for dalle, diffusion and clip; remove it from the configuration of a {self.model.kind}",
            )
        if isinstance(self.model, ClipConfig):
            require(
                self.optim.grad_accum_steps == 1,
                f"optim.grad_accum_steps is {self.optim.grad_accum_steps}: a clip would compare only the rows of a microbatch; "
                "set model.grad_cache_chunks to it instead, which saves the memory and compares all rows",
            )
            require(
                self.data.batch_size % self.model.grad_cache_chunks == 0,
                f"data.batch_size {self.data.batch_size} is not divisible by model.grad_cache_chunks {self.model.grad_cache_chunks}; change one",
            )
            require(
                self.image_tokenizer is None or self.data.batch_size % 2 == 0,
                f"data.batch_size is {self.data.batch_size}; with an image_tokenizer every second image is its reconstruction: want "
                "an even number",
            )
            require(
                self.data.batch_size >= 2,
                "data.batch_size is 1; a clip compares rows with each other: want 2 or more",
            )
