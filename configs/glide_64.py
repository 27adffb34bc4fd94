"""Base model of GLIDE at full size, 64 x 64 pixels: a U-Net of 2.2 and a text encoder of 1.2 billion parameters.

Paper: Nichol et al. 2021, arXiv 2112.10741, 3: width 512, 24 text layers of width 2048, cosine schedule. Keys and
values of captions are appended to those of images; the mean of the caption's states is added to the time embedding
(in the paper that of its last token).
Hardware: a TPU pod. Time: not trained. Score: shapes are tested.

    dalle-jax train glide_64 --data.path captioned --compile-only v5p:4x4x4
"""

from dalle_jax.config import (
    DataConfig,
    DiffusionConfig,
    FolderSource,
    MeshConfig,
    NoiseConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
)

config = TrainConfig(
    run="runs/glide_64",
    model=DiffusionConfig(
        image_size=64,
        width=512,
        channel_multipliers=(1, 2, 3, 4),
        blocks=3,
        attention_sizes=(32, 16, 8),
        head_dim=64,
        scale_shift_norm=True,
        resample="block",
        text=TextEncoderConfig(text_vocab=16_384, text_len=128, dim=2048, layers=24, heads=32),
        cond_drop_prob=0.2,
        noise=NoiseConfig(kind="cosine"),
        dtype="bfloat16",
        remat=True,
    ),
    data=DataConfig(source=FolderSource(path="captioned"), batch_size=2048, num_threads=16, prefetch=16),
    optim=OptimConfig(
        learning_rate=1e-4, warmup_steps=2_000, schedule="constant", b2=0.999, weight_decay=0.0, clip_norm=1.0,
        ema_decay=0.9999, ema_every=1,
    ),
    mesh=MeshConfig(fsdp=-1, data=1),
    steps=2_500_000,
)  # fmt: skip
