"""Fine-tuning of any trained Transformer on your own images: a folder, tar files, an npz file or a TFDS data set.

Paper: the one of the run that is fine-tuned: model, text tokenizer and image tokenizer are those of RUN. A small
learning rate with a short warm-up preserves what it learned.
Hardware: that of the run. Time: depends on the model. Score: docs/finetune.md shows the steps from a folder to
samples.

    dalle-jax train finetune --init-from RUN --data.path FOLDER --run runs/mine
    dalle-jax sample runs/mine "a caption" --num-images 4 --out samples
"""

from dalle_jax.config import DalleConfig, DataConfig, FolderSource, OptimConfig, TextConfig, TrainConfig

config = TrainConfig(
    run="runs/finetune",
    model=DalleConfig(),  # replaced by the model of --init-from
    data=DataConfig(source=FolderSource(), batch_size=32, crop="narrow"),
    text=TextConfig(bpe_dropout=0.1),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=50, clip_norm=1.0, ema_decay=0.99, ema_every=1),
    steps=1_000,
    eval_every=100,
    save_every=100,
    sample_every=250,
    eval_rows=128,
)
