"""Tiny configurations of every stage for the tests of ahead-of-time compilation."""

from pathlib import Path

from dalle_jax.config import (
    AdversarialConfig,
    BartConfig,
    ClipConfig,
    CodesConfig,
    DalleConfig,
    DataConfig,
    DiffusionConfig,
    DVAEConfig,
    MeshConfig,
    TextEncoderConfig,
    TowerConfig,
    TrainConfig,
    VectorQuantizer,
    VQGANConfig,
)

SMALL_DALLE = DalleConfig(
    text_vocab=20, text_len=4, image_vocab=16, grid=4, dim=16, layers=3, heads=2, conv_kernel=3
)
SMALL_RUN = TrainConfig(model=SMALL_DALLE, data=DataConfig(batch_size=16), mesh=MeshConfig(data=2, fsdp=4))

CONFIG_FILE = """
from dalle_jax.config import *
config = TrainConfig(
    model=DalleConfig(text_vocab=20, text_len=4, image_vocab=16, grid=4, dim=16, layers=3, heads=2, conv_kernel=3),
    data=DataConfig(batch_size=16), mesh=MeshConfig(data=-1),
)
"""

STAGES = {
    "dvae": DVAEConfig(image_size=8, groups=2, blocks=1, width=8, decoder_width=8, vocab=8),
    "vqgan": VQGANConfig(
        image_size=8, width=8, channel_multipliers=(1, 2), blocks=1, attention_levels=(1,), latent_width=8,
        quantizer=VectorQuantizer(vocab=8, dim=4), adversarial=AdversarialConfig(width=4, layers=1),
    ),
    "clip": ClipConfig(
        image_size=8, patch_size=4, vision=TowerConfig(dim=8, layers=2, heads=2), text=TowerConfig(dim=8, layers=2,
        heads=2),
        text_vocab=11, text_len=5, embed_dim=8,
    ),
    "bart": BartConfig(
        text_vocab=9, text_len=5, image_vocab=7, decoder_vocab=9, decoder_start_id=7, grid=4, dim=16,
        encoder_layers=2, layers=2,
        heads=2, mlp_width=16,
    ),
    "diffusion": DiffusionConfig(
        image_size=8, width=8, channel_multipliers=(1,), blocks=1, attention_sizes=(), num_classes=3,
        text=TextEncoderConfig(text_vocab=9, text_len=3, dim=8, layers=1, heads=2), codes=CodesConfig(vocab=5, grid=2),
    ),
}  # fmt: skip


def stage_config(name: str) -> TrainConfig:
    """Return the configuration of a stage, compiled without optimizations: the tests read the program, not its
    speed."""
    return TrainConfig(
        model=STAGES[name], data=DataConfig(batch_size=16), mesh=MeshConfig(data=2, fsdp=4),
        compiler_options=("xla_backend_optimization_level=0",),
    )  # fmt: skip


def write_config(directory: Path) -> str:
    """Write a configuration file for the command line and return its path."""
    path = directory / "config.py"
    path.write_text(CONFIG_FILE)
    return str(path)
