"""Transformer of the paper at full size: 64 layers, width 3968, 12 billion parameters, 256 text and 1024 image tokens.

Paper: Ramesh et al. 2021, arXiv 2102.12092, 2.2 to 2.4 and B; trained there on 1024 V100, batch 1024, for 430,000
steps.
Hardware: a TPU pod; parameters are sharded over `fsdp`, as the paper sharded them over the GPUs of a machine. Time:
not trained. Score: shapes and parameter count are tested; estimated mfu 60.3% on 64 v5p (docs/scale.md).

    dalle-jax train dalle_12b --image-tokenizer runs/dvae_openai --data.source.path "shards/*.tar"
"""

from dalle_jax.config import (
    DalleConfig,
    DataConfig,
    MeshConfig,
    OptimConfig,
    TarSource,
    TextConfig,
    TrainConfig,
)

config = TrainConfig(
    run="runs/dalle_12b",
    image_tokenizer="runs/dvae_openai",
    # The defaults are the paper's sizes; cond_drop_prob is ours, for guidance. remat mlp is for 64 chips or GPUs of 80
    # GB and more; with less memory take full (docs/pods.md).
    model=DalleConfig(remat="mlp"),
    data=DataConfig(
        source=TarSource(path=""),
        batch_size=1024,
        crop="narrow",
        languages=("en",),
        num_threads=16,
        prefetch=8,
    ),
    text=TextConfig(num_train_captions=2_000_000, bpe_dropout=0.1),
    optim=OptimConfig(),  # AdamW of B.2; the paper halved the rate on plateaus, ours follows a cosine to 1/32
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=430_000,
    log_every=100,
    eval_every=5_000,
    save_every=2_000,
    sample_every=10_000,
    eval_rows=4096,
)
