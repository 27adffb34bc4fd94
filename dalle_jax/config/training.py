"""One training run: optimizer, mesh, and how often what is done. The type of `model` is the stage."""

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
TransformerConfig = DalleConfig | BartConfig  # from text to codes
ModelConfig = TokenizerConfig | TransformerConfig | ClipConfig | DiffusionConfig


@frozen_config
class OptimConfig:
    """Optimizer with decay on matrices only, clipping, warm-up and a schedule; averaged parameters."""

    # Bytes of state for each parameter: adamw 8; adamw_bf16, moments in bfloat16, 4; adafactor next to none,
    # without a first moment (train/optim.py).
    optimizer: Optimizer = "adamw"
    learning_rate: float = 4.5e-4  # after warm-up; B.2
    warmup_steps: int = 5_000  # linear from 0; B.2
    schedule: Literal["cosine", "constant"] = "cosine"  # after warm-up
    decay_steps: int | None = None  # updates from the start to the schedule's end; None is all of `steps`
    final_lr_ratio: float = 1 / 32  # last learning rate over the highest; B.2
    b1: float = 0.9
    b2: float = 0.96  # B.2
    eps: float = 1e-8
    weight_decay: float = 4.5e-2  # B.2
    clip_norm: float = 4.0  # of the global gradient norm; 0 turns it off; B.2
    grad_accum_steps: int = 1  # microbatches per update; the gradient is their mean
    ema_decay: float = 0.99  # of the averaged parameters used for sampling; 0 turns averaging off; B.2
    ema_every: int = 25  # updates between averages; B.2

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
    """Devices along each axis of the mesh; one of them may be -1: all devices that are left."""

    # Of TPU, joined by the data centre's network; -1 takes what is there. The other sizes are within one.
    slices: int = -1
    data: int = -1  # batch is split; parameters are copied
    fsdp: int = 1  # batch is split; parameters and optimizer state are split too
    model: int = 1  # heads and channels are split
    # Without an accelerator: devices to split the CPU into, 0 leaves it one; a core each is faster than one device of
    # many cores.
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
    """How the processes of one training find each other, and when they give each other up (docs/pods.md).

    On Cloud TPU, GKE, Slurm and Open MPI nothing is to be set. Elsewhere every process gets the same coordinator
    and processes, and its own process. processes=1 trains alone whatever the surroundings say.
    """

    coordinator_address: str | None = None  # HOST:PORT of process 0; None asks the cluster
    num_processes: int | None = None
    process_id: int | None = None  # number of this process, from 0
    initialization_timeout_seconds: int = 300  # wait for all processes to come up
    heartbeat_timeout_seconds: int = 100  # a process not heard of for so long is lost, and the others end
    stall_timeout_seconds: int = (
        1800  # no step, save or compilation may take longer, or all end; 0 turns it off
    )

    def __post_init__(self):
        given = (self.coordinator_address, self.num_processes, self.process_id)
        alone = self.num_processes == 1 and self.coordinator_address is None and self.process_id in (None, 0)
        require(
            alone or all(x is None for x in given) or None not in given,
            f"distributed coordinator_address={self.coordinator_address} num_processes={self.num_processes} process_id={self.process_id}; "
            "want all three, or none on a cluster that is found by itself",
        )
        if self.coordinator_address is not None:
            port = self.coordinator_address.rpartition(":")[2]
            require(
                ":" in self.coordinator_address and port.isdecimal() and 0 < int(port) < 65536,
                f"distributed.coordinator_address is {self.coordinator_address!r}; want HOST:PORT of process 0",
            )
            require(
                self.num_processes >= 1 and 0 <= self.process_id < self.num_processes,
                f"distributed.process_id is {self.process_id} of {self.num_processes}; want 0 to num_processes - 1",
            )
        for name, least in (
            ("initialization_timeout_seconds", 1),
            ("heartbeat_timeout_seconds", 1),
            ("stall_timeout_seconds", 0),
        ):
            value = getattr(self, name)
            require(value >= least, f"distributed.{name} is {value}; want at least {least}")


@frozen_config
class ProfileConfig:
    """A window of steps recorded for XProf or Perfetto, in `profile/` of the run directory."""

    steps: str = ""  # FIRST:LAST, both recorded, e.g. 10:15; "" records nothing

    def __post_init__(self):
        if self.steps:
            first, colon, last = self.steps.partition(":")
            require(
                bool(colon) and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last),
                f"profile.steps is {self.steps!r}; want FIRST:LAST with 1 <= FIRST <= LAST, as in 10:15",
            )

    @property
    def window(self) -> tuple[int, int] | None:
        """First and last step that are recorded; None where nothing is."""
        if not self.steps:
            return None
        first, last = self.steps.split(":")
        return int(first), int(last)


@frozen_config
class TrainConfig:
    """One training run. The type of `model` is the stage."""

    model: ModelConfig
    run: str = ""  # run directory; everything that a run makes is in it
    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)  # stages that read captions
    # Run directory of a trained tokenizer: whose codes are learned; of a clip, which then sees every second picture as
    # that tokenizer reconstructs it.
    image_tokenizer: str | None = None
    init_from: str | None = None  # run directory whose weights a new run begins with
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    compilation_cache_dir: str | None = None  # directory that keeps compiled programs from run to run
    # NAME=VALUE each, told to the compiler of the training step over what it is told by itself (train/compiler.py);
    # NAME= leaves that option as the compiler has it.
    compiler_options: tuple[str, ...] = ()
    steps: int = 100_000  # updates
    seed: int = 0  # of the parameters and of what is drawn in each step
    log_every: int = 10  # updates between lines of metrics.jsonl
    eval_every: int = 1_000  # updates between measurements on the evaluation split
    eval_rows: int = 256  # rows per measurement
    sample_every: int = 5_000  # updates between PNG grids
    save_every: int = 1_000  # updates between checkpoints
    max_checkpoints: int = 3  # latest checkpoints kept; the best by the stage's measure is kept as well

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
                "tokenizer is for a model that reads image tokens; set model.codes, or leave tokenizer out",
            )
        elif not isinstance(self.model, (TransformerConfig, ClipConfig)):
            require(
                self.image_tokenizer is None,
                f"tokenizer is for dalle, diffusion and clip; remove it from the configuration of a {self.model.kind}",
            )
        if isinstance(self.model, ClipConfig):
            require(
                self.optim.grad_accum_steps == 1,
                f"optim.grad_accum_steps is {self.optim.grad_accum_steps}: a clip would compare the rows of a microbatch only; "
                "set model.grad_cache_chunks to it instead, which saves the memory and compares all rows",
            )
            require(
                self.data.batch_size % self.model.grad_cache_chunks == 0,
                f"data.batch_size {self.data.batch_size} is not divisible by model.grad_cache_chunks {self.model.grad_cache_chunks}; change one",
            )
            require(
                self.image_tokenizer is None or self.data.batch_size % 2 == 0,
                f"data.batch_size is {self.data.batch_size}; with a tokenizer every second picture is its reconstruction: want "
                "an even number",
            )
            require(
                self.data.batch_size >= 2,
                "data.batch_size is 1; a clip compares rows with each other: want 2 or more",
            )
