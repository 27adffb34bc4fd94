"""Laws of the configurations: JSON and back, clear refusals, and the full-size models by shape alone."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from dalle_jax.config import (
    AdversarialConfig,
    ArraysSource,
    BartConfig,
    ClipConfig,
    CodesConfig,
    DalleConfig,
    DataConfig,
    DiffusionConfig,
    DistributedConfig,
    DVAEConfig,
    FiniteScalarQuantizer,
    FolderSource,
    GumbelQuantizer,
    MeshConfig,
    MixtureSource,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    ProfileConfig,
    ScenesSource,
    Schedule,
    SourceConfig,
    T5Config,
    TarSource,
    TextConfig,
    TextEncoderConfig,
    TfdsSource,
    TokenizerConfig,
    TowerConfig,
    TrainConfig,
    VectorQuantizer,
    VQGANConfig,
    from_json,
    to_json,
)
from dalle_jax.config.files import load_config
from dalle_jax.models import clip, dalle, tokenizer
from dalle_jax.models.diffusion import unet
from dalle_jax.parallel.sharding import PARAM_AXES, param_axes, path_name

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))

# Every class, with no field left at its default.
EVERY = [
    Schedule(start=0.3, end=-1e-7, steps=7),
    DVAEConfig(
        image_size=24, groups=3, blocks=1, width=12, decoder_width=5, vocab=9, dtype="bfloat16",
        tau=Schedule(start=0.9, end=0.1, steps=3), kl_weight=Schedule(start=1.0, end=2.0, steps=4),
        code_usage_weight=Schedule(start=0.5, end=0.0, steps=5), min_scale=0.01,
    ),
    VectorQuantizer(
        vocab=5, dim=3, normalize=True, codebook_weight=0.5, commitment_weight=0.1, dead_code_restart_steps=9
    ),
    GumbelQuantizer(vocab=5, dim=3, tau=Schedule(start=0.9, end=0.1, steps=3), kl_weight=0.1),
    FiniteScalarQuantizer(levels=(5, 3)),
    AdversarialConfig(
        loss="non-saturating", weight=0.5, disc_start_step=7, disc_warmup_steps=3,
        max_adaptive_weight=10.0, r1_weight=0.0, r1_every=2, width=8,
        layers=2, learning_rate=0.1, b1=0.2, b2=0.3,
    ),
    VQGANConfig(
        image_size=24, width=12, channel_multipliers=(1, 3), blocks=1, attention_levels=(), latent_width=5,
        quantizer=FiniteScalarQuantizer(levels=(5, 3)), pixel_range="unit", pixel_weight=0.5, perceptual_weight=0.2,
        lpips="w.npz", adversarial=None, dtype="bfloat16",
    ),
    DalleConfig(
        text_vocab=5, text_len=3, image_vocab=7, grid=2, dim=12, layers=3, heads=3, mlp_ratio=2,
        attention=("conv", "full"), last_attention=None, conv_kernel=3, qk_norm=True, text_loss_weight=0.1,
        cond_drop_prob=0.0, dtype="float32", remat="dots", scan_unroll=2, attention_kernel="dense", loss_vocab_chunk=64,
        mlp_width=20, activation="gelu", norm="rms",
        sandwich_norm=True, biases=False, pos_embed="learned", pad_id=4, second_final_norm=True, head_bias=True,
        shift_masks=True,
    ),
    T5Config(dim=12, layers=3, heads=3, mlp_width=10, num_relative_buckets=8, eos_id=2),
    DalleConfig(text_loss_weight=0.0, text_encoder=T5Config(layers=3)),
    BartConfig(
        text_vocab=9, text_len=5, image_vocab=6, decoder_vocab=8,
        decoder_start_id=7, grid=2, dim=12, encoder_layers=3, layers=4,
        heads=3, mlp_width=10, pad_id=3, bos_id=4, eos_id=5, cond_drop_prob=0.0, dtype="float32", remat="none",
    ),
    TowerConfig(dim=12, layers=3, heads=3, mlp_ratio=2),
    ClipConfig(
        image_size=24, patch_size=6, vision=TowerConfig(dim=24), text=TowerConfig(dim=16), text_vocab=9, text_len=5,
        embed_dim=7, activation="gelu", pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6), logit_scale_init=2.0,
        logit_scale_max=50.0, grad_cache_chunks=2, dtype="float32", remat="full", scan_unroll=3,
    ),
    NoiseConfig(
        kind="cosine", beta_min=0.2, beta_max=15.0, num_timesteps=500, sigma_min=0.02, sigma_max=40.0, rho=5.0,
        zero_terminal_snr=True, shift=2.0, t_min=1e-4,
    ),
    TextEncoderConfig(text_vocab=9, text_len=3, dim=12, layers=2, heads=3, mlp_ratio=2),
    CodesConfig(vocab=7, grid=2, width=5),
    DiffusionConfig(
        image_size=24, patch_size=3, width=12, channel_multipliers=(1, 3), blocks=1, attention_sizes=(4,), head_dim=6,
        norm_groups=3, scale_shift_norm=True, resample="block", dropout=0.0,
        text=TextEncoderConfig(text_vocab=5), num_classes=2,
        codes=CodesConfig(vocab=3, grid=4), low_res_size=12, cond_drop_prob=0.2, noise=NoiseConfig(kind="cosine"),
        prediction="v", weighting="min_snr", dtype="bfloat16", remat=True,
    ),
    ScenesSource(
        count=10, min_objects=2, max_objects=3, sizes=("small",), fills=("dotted", "solid"),
        backgrounds=("plain",), seed=4,
    ),
    FolderSource(
        path="d", train_split="a", eval_split="b", eval_fraction=0.1, captions_field="c", captions_zh_field="d",
        templates=("a {}", "{}"), exclude="x", max_bad_fraction=0.1, min_image_size=5, max_aspect_ratio=3.0,
    ),
    TfdsSource(
        path="cifar10", data_dir="d", train_split="train[5%:]", eval_split="b", image_field="i",
        captions_field="c", captions_zh_field="d", label_field="l", templates=("{}",), exclude="x",
        max_bad_fraction=0.1,
        min_image_size=5, max_aspect_ratio=3.0,
    ),
    ArraysSource(path="a.npz", train_split="a", eval_split="b", exclude="x", templates=("{}",)),
    TarSource(
        path="a.tar,b*.tar", train_split="t", eval_split="e", captions_field="c", captions_zh_field="z",
        exclude="x", max_bad_fraction=0.1, min_image_size=5, max_aspect_ratio=3.0,
    ),
    MixtureSource(
        parts=(TarSource(path="a.tar"), ScenesSource(count=3), FolderSource(path="d"), TfdsSource(path="x"),
               ArraysSource(path="a.npz")),
        weights=(1.0, 2.5, 0.25, 4.0, 1 / 3),
    ),
    DataConfig(
        source=TarSource(path="圖/*.tar"), codes="x.npz", batch_size=8, crop="none", languages=("zh",), seed=3,
        num_threads=1, num_workers=2, prefetch=9,
    ),
    TextConfig(tokenizer_path="m", num_train_captions=5, bpe_dropout=0.0, lowercase=False, nfkc=False),
    OptimConfig(
        optimizer="adafactor",
        learning_rate=1 / 3, warmup_steps=1, schedule="constant", decay_steps=9, final_lr_ratio=0.0, b1=0.1,
        b2=0.2, eps=1e-30, weight_decay=0.0, clip_norm=0.0, grad_accum_steps=2, ema_decay=0.0, ema_every=1,
    ),
    MeshConfig(slices=2, data=2, fsdp=-1, model=4, cpu_devices=8),
    DistributedConfig(
        coordinator_address="host:1234", num_processes=4, process_id=3, initialization_timeout_seconds=5,
        heartbeat_timeout_seconds=6, stall_timeout_seconds=0
    ),
    ProfileConfig(steps="10:15"),
    TrainConfig(
        init_from="runs/a",
        model=DalleConfig(), run="r", data=DataConfig(batch_size=6), text=TextConfig(bpe_dropout=0.5),
        image_tokenizer="t",
        optim=OptimConfig(grad_accum_steps=3), mesh=MeshConfig(model=2), distributed=DistributedConfig(num_processes=1),
        compiler_options=("xla_a=1",),
        profile=ProfileConfig(steps="2:3"), compilation_cache_dir="c", steps=4, seed=5, log_every=6, eval_every=7,
        eval_rows=8, sample_every=9, save_every=10, max_checkpoints=11,
    ),
]  # fmt: skip


@pytest.mark.parametrize("config", EVERY, ids=lambda c: type(c).__name__)
def test_round_trip(config):
    for field in dataclasses.fields(config):  # else the round trip could lose a field and nobody would see
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        values = [getattr(other, field.name) for other in EVERY if type(other) is type(config)]
        if field.name != "kind":  # some fields allow no other value of some others
            assert any(value != default for value in values), f"give {field.name} another value in EVERY"
    again = from_json(type(config), to_json(config))
    assert again == config and type(again) is type(config)
    assert hash(again) == hash(config)


def test_round_trip_covers_every_class():
    from dalle_jax import config as room

    classes = {c for c in vars(room).values() if dataclasses.is_dataclass(c) and isinstance(c, type)}
    assert classes == {type(c) for c in EVERY}


@pytest.mark.parametrize(
    ("union", "config"),
    [
        (ModelConfig, DVAEConfig(vocab=11)),
        (ModelConfig, VQGANConfig(width=64)),
        (ModelConfig, DalleConfig(layers=2)),
        (ModelConfig, ClipConfig(text=TowerConfig(layers=2))),
        (ModelConfig, DiffusionConfig(text=TextEncoderConfig(text_vocab=3), codes=CodesConfig(grid=16))),
        (SourceConfig, ScenesSource(count=3)),
        (SourceConfig, TarSource(path="p")),
        (SourceConfig, MixtureSource(parts=(ScenesSource(), FolderSource(path="f")), weights=(1.0, 2.0))),
    ],
    ids=lambda v: getattr(v, "kind", ""),
)
def test_kind_chooses_the_class(union, config):
    again = from_json(union, to_json(config))
    assert again == config and type(again) is type(config)


def test_fields_left_out_take_their_defaults():
    config = from_json(TrainConfig, '{"model": {"kind": "dvae"}, "optim": {"learning_rate": 1}}')
    assert config == TrainConfig(model=DVAEConfig(), optim=OptimConfig(learning_rate=1.0))
    assert type(config.optim.learning_rate) is float


@pytest.mark.parametrize(
    ("cls", "text", "match"),
    [
        (DVAEConfig, "{", "Expected JSON, got text that does not parse"),
        (DVAEConfig, "[]", r"DVAEConfig to be an object with the fields of DVAEConfig, got \[\]"),
        (DVAEConfig, '{"wdth": 4}', "fields of DVAEConfig, got 'wdth'. Use 'width'"),
        (DVAEConfig, '{"zzz": 4}', "got 'zzz'. Use one of kind, image_size"),
        (DVAEConfig, '{"width": "4"}', r"DVAEConfig\.width of type int.*, got '4'\."),
        (DVAEConfig, '{"width": 4.0}', r"DVAEConfig\.width of type int.*, got 4\.0\."),
        (DVAEConfig, '{"width": true}', r"DVAEConfig\.width of type int.*, got True\."),
        (DVAEConfig, '{"width": null}', r"DVAEConfig\.width of type int, got None"),
        (DVAEConfig, '{"dtype": "float16"}', r"dtype to be one of 'float32', 'bfloat16'.*, got 'float16'"),
        (
            DVAEConfig,
            '{"tau": {"start": true, "end": 1, "steps": 1}}',
            r"tau\.start of type float.*, got True\.",
        ),
        (
            DVAEConfig,
            '{"tau": {"start": 1}}',
            r"DVAEConfig\.tau to have every required field.*missing.*'end' and 'steps'",
        ),
        (DalleConfig, '{"attention": "row"}', r"attention to be a list, got 'row'"),
        (DalleConfig, '{"attention": ["row", "col"]}', r"attention\[1\] to be one of 'full'.*, got 'col'"),
        (DalleConfig, '{"last_attention": 3}', r"last_attention to be one of .*, got 3"),
        (DalleConfig, '{"qk_norm": 1}', r"qk_norm of type bool.*, got 1\."),
        (TrainConfig, "{}", r"TrainConfig to have every required field.*missing.*'model'"),
        (
            TrainConfig,
            '{"model": {}}',
            r"TrainConfig\.model\.kind to be one of 'dvae', 'vqgan', 'dalle'.*, got None",
        ),
        (TrainConfig, '{"model": null}', r"TrainConfig\.model to be an object with a kind, got null"),
        (TrainConfig, '{"model": "dvae"}', r"TrainConfig\.model\.kind to be one of .*, got None"),
        (
            TrainConfig,
            '{"model": {"kind": "dvae"}, "data": {"source": {"kind": "web"}}}',
            r"TrainConfig\.data\.source\.kind to be one of 'scenes', 'tar'.*, got 'web'",
        ),
        (
            TrainConfig,
            '{"model": {"kind": "dvae"}, "optim": {"warmup": 1}}',
            r"\.optim to have fields of OptimConfig, got 'warmup'\. Use 'warmup_steps'",
        ),
        (TrainConfig, '{"model": {"kind": "dvae", "vocab": 0}}', r"DVAEConfig\.vocab of at least 1, got 0"),
        (
            SourceConfig,
            '{"kind": "mixture", "parts": [{"kind": "folder"}, {"kind": "web"}], "weights": [1, 2]}',
            r"parts\[1\]\.kind to be one of 'scenes', 'tar', 'folder', 'tfds', 'arrays'.*, got 'web'",
        ),
        (SourceConfig, '{"kind": "mixture"}', "missing.*'parts' and 'weights'"),
        (ModelConfig, '{"kind": "vq"}', r"config\.kind to be one of .*, got 'vq'"),
    ],
)
def test_from_json_refuses(cls, text, match):
    with pytest.raises(ValueError, match=match):
        from_json(cls, text)


@pytest.mark.parametrize(
    ("make", "values", "match"),
    [
        (Schedule, {"start": 1.0, "end": 0.0, "steps": -1}, "Schedule.steps of at least 0, got -1"),
        (DVAEConfig, {"image_size": 0}, "image_size of at least 1, got 0"),
        (DVAEConfig, {"groups": 0}, "groups of at least 1, got 0"),
        (DVAEConfig, {"blocks": 0}, "blocks of at least 1, got 0"),
        (DVAEConfig, {"width": 0}, "width of at least 1, got 0"),
        (DVAEConfig, {"decoder_width": 0}, "decoder_width of at least 1, got 0"),
        (DVAEConfig, {"vocab": 0}, "vocab of at least 1, got 0"),
        (DVAEConfig, {"image_size": 252}, "image_size divisible by 8 .*, got 252"),
        (DVAEConfig, {"width": 6}, "width to be a multiple of 4, got 6"),
        (DVAEConfig, {"min_scale": -0.1}, "min_scale of at least 0, got -0.1"),
        (
            DVAEConfig,
            {"tau": Schedule(start=1.0, end=0.0, steps=1)},
            "DVAEConfig.tau .* above 0, got 1.0 and 0.0",
        ),
        (
            DVAEConfig,
            {"tau": Schedule(start=-1.0, end=1.0, steps=1)},
            "DVAEConfig.tau .* above 0, got -1.0 and 1.0",
        ),
        (DalleConfig, {"text_vocab": 0}, "text_vocab of at least 1, got 0"),
        (DalleConfig, {"text_len": 0}, "text_len of at least 1, got 0"),
        (DalleConfig, {"image_vocab": 0}, "image_vocab of at least 1, got 0"),
        (DalleConfig, {"grid": 0}, "grid of at least 1, got 0"),
        (DalleConfig, {"dim": 0}, "dim of at least 1, got 0"),
        (DalleConfig, {"layers": 0}, "layers of at least 1, got 0"),
        (DalleConfig, {"heads": 0}, "heads of at least 1, got 0"),
        (DalleConfig, {"mlp_ratio": 0}, "mlp_ratio of at least 1, got 0"),
        (DalleConfig, {"scan_unroll": 0}, "scan_unroll of at least 1, got 0"),
        (DalleConfig, {"heads": 7}, "DalleConfig.dim divisible by heads 7, got 3968. Change dim or heads"),
        (DalleConfig, {"attention": ()}, "at least one kind in DalleConfig.attention, got none"),
        (DalleConfig, {"conv_kernel": 4}, "an odd DalleConfig.conv_kernel of at least 1, got 4"),
        (DalleConfig, {"conv_kernel": -1}, "conv_kernel of at least 1, got -1"),
        (DalleConfig, {"text_loss_weight": 1.0}, r"text_loss_weight in \[0, 1\), got 1.0"),
        (DalleConfig, {"text_loss_weight": -0.1}, r"text_loss_weight in \[0, 1\), got -0.1"),
        (DalleConfig, {"cond_drop_prob": 1.1}, r"cond_drop_prob in \[0, 1\], got 1.1"),
        (DalleConfig, {"cond_drop_prob": -0.1}, r"cond_drop_prob in \[0, 1\], got -0.1"),
        (TowerConfig, {"layers": 0}, "TowerConfig.layers of at least 1, got 0"),
        (TowerConfig, {"heads": 7}, "TowerConfig.dim divisible by heads 7, got 512"),
        (ClipConfig, {"embed_dim": 0}, "ClipConfig.embed_dim of at least 1, got 0"),
        (ClipConfig, {"grad_cache_chunks": 0}, "ClipConfig.grad_cache_chunks of at least 1, got 0"),
        (ClipConfig, {"patch_size": 30}, "image_size divisible by patch_size 30, got 224"),
        (ClipConfig, {"text_vocab": 2}, "text_vocab of at least 3, got 2. Use one or more pieces, a start"),
        (ClipConfig, {"text_len": 2}, "text_len of at least 3, got 2"),
        (ClipConfig, {"pixel_mean": (0.5,)}, r"pixel_mean of three numbers, got \(0.5,\)"),
        (ClipConfig, {"pixel_std": (0.5, 0.0, 1.0)}, "pixel_std of numbers above 0"),
        (
            ClipConfig,
            {"logit_scale_init": 101.0},
            "logit_scale_init above 0 and at most logit_scale_max 100, got 101",
        ),
        (ScenesSource, {"count": 0}, "count of at least 1, got 0"),
        (
            ScenesSource,
            {"min_objects": 0},
            "1 <= min_objects <= max_objects <= 4 in ScenesSource, got 0 and 4",
        ),
        (ScenesSource, {"min_objects": 3, "max_objects": 2}, "got 3 and 2"),
        (ScenesSource, {"max_objects": 5}, "got 1 and 5"),
        (ScenesSource, {"fills": ()}, "one or more sizes, fills and backgrounds"),
        (ScenesSource, {"sizes": ("large",)}, "sizes with small or medium for two objects or more"),
        (TarSource, {"max_bad_fraction": 1.5}, r"max_bad_fraction in \[0, 1\], got 1.5"),
        (FolderSource, {"eval_fraction": 1.0}, r"eval_fraction in \[0, 1\), got 1.0"),
        (TfdsSource, {"max_bad_fraction": -1.0}, r"max_bad_fraction in \[0, 1\], got -1.0"),
        (MixtureSource, {"parts": (), "weights": ()}, "one or more sources in MixtureSource.parts"),
        (
            MixtureSource,
            {"parts": (ScenesSource(),), "weights": (1.0, 2.0)},
            "one weight for each of 1 parts .*, got 2",
        ),
        (
            MixtureSource,
            {"parts": (ScenesSource(),) * 2, "weights": (1.0, 0.0)},
            "weights of finite numbers above 0",
        ),
        (
            MixtureSource,
            {"parts": (ScenesSource(),) * 2, "weights": (1.0, -1.0)},
            "weights of finite numbers above 0",
        ),
        (
            MixtureSource,
            {"parts": (ScenesSource(),), "weights": (float("nan"),)},
            "weights of finite numbers above 0",
        ),
        (MixtureSource, {"parts": (ScenesSource(),) * 2, "weights": (1.0, float("inf"))}, "finite numbers"),
        (
            MixtureSource,
            {"parts": (ScenesSource(),) * 2, "weights": (1.0, 1e-5)},
            r"weights\[1\] of at least 1 / 10000 of their sum, got 1e-05 of 1\.00001",
        ),
        (
            MixtureSource,
            {"parts": (MixtureSource(parts=(ScenesSource(),), weights=(1.0,)),), "weights": (1.0,)},
            r"parts\[0\] of type ScenesSource or TarSource.*, got a MixtureSource\.",
        ),
        (ArraysSource, {"templates": ("a photo",)}, "templates with {} for the name of the class"),
        (DataConfig, {"batch_size": 0}, "data.batch_size of at least 1, got 0"),
        (DataConfig, {"num_threads": 0}, "data.num_threads of at least 1, got 0"),
        (DataConfig, {"prefetch": 0}, "data.prefetch of at least 1, got 0"),
        (DataConfig, {"languages": ()}, r"data.languages of .*, got \(\)"),
        (DataConfig, {"languages": ("en", "en")}, "one or more different languages"),
        (TextConfig, {"bpe_dropout": 1.0}, r"text.bpe_dropout in \[0, 1\), got 1.0"),
        (TextConfig, {"bpe_dropout": -0.1}, r"text.bpe_dropout in \[0, 1\), got -0.1"),
        (TextConfig, {"num_train_captions": 0}, "text.num_train_captions of at least 1, got 0"),
        (OptimConfig, {"learning_rate": 0.0}, "optim.learning_rate above 0, got 0.0"),
        (OptimConfig, {"learning_rate": float("nan")}, "optim.learning_rate above 0, got nan"),
        (OptimConfig, {"warmup_steps": -1}, "optim.warmup_steps of at least 0, got -1"),
        (OptimConfig, {"grad_accum_steps": 0}, "optim.grad_accum_steps of at least 1, got 0"),
        (OptimConfig, {"clip_norm": -1.0}, "optim.clip_norm of at least 0, got -1.0"),
        (OptimConfig, {"ema_decay": 1.0}, r"optim.ema_decay in \[0, 1\), got 1.0"),
        (OptimConfig, {"ema_every": 0}, "optim.ema_every of at least 1, got 0"),
        (OptimConfig, {"final_lr_ratio": 1.5}, r"optim.final_lr_ratio in \[0, 1\], got 1.5"),
        (MeshConfig, {"data": 0}, "mesh sizes of at least 1.* data=0"),
        (DistributedConfig, {"num_processes": 4}, "all or none of .*, got None, 4 and None"),
        (DistributedConfig, {"coordinator_address": "h:1"}, "got h:1, None and None"),
        (DistributedConfig, {"coordinator_address": "h:1", "num_processes": 1}, "got h:1, 1 and None"),
        (
            DistributedConfig,
            {"coordinator_address": "h", "num_processes": 2, "process_id": 0},
            "HOST:PORT of process 0, got 'h'",
        ),
        (
            DistributedConfig,
            {"coordinator_address": "h:99999", "num_processes": 2, "process_id": 0},
            "HOST:PORT of process 0, got 'h:99999'",
        ),
        (
            DistributedConfig,
            {"coordinator_address": "h:1", "num_processes": 2, "process_id": 2},
            r"process_id in \[0, num_processes 2\), got 2",
        ),
        (DistributedConfig, {"stall_timeout_seconds": -1}, "stall_timeout_seconds of at least 0, got -1"),
        (
            DistributedConfig,
            {"heartbeat_timeout_seconds": 0},
            "heartbeat_timeout_seconds of at least 1, got 0",
        ),
        (ProfileConfig, {"steps": "10"}, "FIRST:LAST .*, got '10'"),
        (ProfileConfig, {"steps": "5:4"}, "FIRST:LAST with 1 <= FIRST <= LAST, got '5:4'"),
        (ProfileConfig, {"steps": "0:4"}, "FIRST:LAST .*, got '0:4'"),
        (MeshConfig, {"data": -2}, "got data=-2"),
        (MeshConfig, {"data": -1, "fsdp": -1}, "at most one of them -1"),
        (TrainConfig, {"model": DVAEConfig(), "steps": 0}, "steps of at least 1, got 0"),
        (TrainConfig, {"model": DVAEConfig(), "log_every": 0}, "log_every of at least 1, got 0"),
        (TrainConfig, {"model": DVAEConfig(), "eval_every": 0}, "eval_every of at least 1, got 0"),
        (TrainConfig, {"model": DVAEConfig(), "eval_rows": 0}, "eval_rows of at least 1, got 0"),
        (TrainConfig, {"model": DVAEConfig(), "sample_every": 0}, "sample_every of at least 1, got 0"),
        (TrainConfig, {"model": DVAEConfig(), "save_every": 0}, "save_every of at least 1, got 0"),
        (TrainConfig, {"model": DVAEConfig(), "max_checkpoints": 0}, "max_checkpoints of at least 1, got 0"),
        (
            TrainConfig,
            {
                "model": DVAEConfig(),
                "data": DataConfig(batch_size=9),
                "optim": OptimConfig(grad_accum_steps=2),
            },
            "data.batch_size divisible by optim.grad_accum_steps 2, got 9",
        ),
        (
            TrainConfig,
            {"model": DVAEConfig(), "data": DataConfig(codes="c")},
            "no data.codes for a model of kind dvae, got c",
        ),
        (
            TrainConfig,
            {"model": DVAEConfig(), "image_tokenizer": "runs/x"},
            "no image_tokenizer for a model of kind dvae, got runs/x",
        ),
        (
            TrainConfig,
            {"model": ClipConfig(), "image_tokenizer": "runs/x", "data": DataConfig(batch_size=5)},
            "even data.batch_size for a clip with an image_tokenizer, got 5",
        ),
        (
            TrainConfig,
            {"model": ClipConfig(), "data": DataConfig(codes="c")},
            "no data.codes for a model of kind clip",
        ),
        (
            TrainConfig,
            {"model": ClipConfig(), "data": DataConfig(batch_size=1)},
            "data.batch_size of at least 2 for a clip",
        ),
        (
            TrainConfig,
            {"model": ClipConfig(), "optim": OptimConfig(grad_accum_steps=2)},
            "Set model.grad_cache_chunks instead",
        ),
        (
            TrainConfig,
            {"model": ClipConfig(grad_cache_chunks=3)},
            "data.batch_size divisible by model.grad_cache_chunks 3, got 64. Change one",
        ),
        (
            TrainConfig,
            {"model": DiffusionConfig(), "image_tokenizer": "runs/x"},
            "Set model.codes or remove image_tokenizer",
        ),
        (
            TrainConfig,
            {"model": DiffusionConfig(), "data": DataConfig(codes="x")},
            "no data.codes for a model of kind diffusion",
        ),
        (TextEncoderConfig, {"dim": 10, "heads": 4}, "TextEncoderConfig.dim divisible by heads 4, got 10"),
        (TextEncoderConfig, {"layers": 0}, "TextEncoderConfig.layers of at least 1, got 0"),
        (CodesConfig, {"grid": 0}, "CodesConfig.grid of at least 1, got 0"),
        (DiffusionConfig, {"blocks": 0}, "DiffusionConfig.blocks of at least 1, got 0"),
        (
            DiffusionConfig,
            {"channel_multipliers": ()},
            r"channel_multipliers of one or more numbers of at least 1, got \(\)",
        ),
        (
            DiffusionConfig,
            {"image_size": 36, "patch_size": 3},
            "image_size divisible by 24, patch_size 3 doubled 3 times, got 36",
        ),
        (
            DiffusionConfig,
            {"attention_sizes": (12,)},
            r"attention_sizes out of \(32, 16, 8, 4\), .* got \(12,\)",
        ),
        (DiffusionConfig, {"head_dim": 100}, r"head_dim to divide \[256, 256\], .* got 100"),
        (DiffusionConfig, {"norm_groups": 0}, "DiffusionConfig.norm_groups of at least 1, got 0"),
        (DiffusionConfig, {"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        (DiffusionConfig, {"num_classes": -1}, "num_classes of at least 0, got -1"),
        (
            DiffusionConfig,
            {"low_res_size": 12},
            "low_res_size to be a divisor of image_size 32 below it, got 12",
        ),
        (
            DiffusionConfig,
            {"codes": CodesConfig(grid=5)},
            "codes.grid to divide the 32 positions of a side, got 5",
        ),
        (DiffusionConfig, {"cond_drop_prob": 2.0}, r"cond_drop_prob in \[0, 1\], got 2.0"),
        (
            DiffusionConfig,
            {"noise": NoiseConfig(zero_terminal_snr=True)},
            "prediction v or x0 with zero_terminal_snr, got eps",
        ),
    ],
)
def test_validation(make, values, match):
    with pytest.raises(ValueError, match=match):
        make(**values)


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DalleConfig().dim = 3
    with pytest.raises(TypeError):
        DalleConfig("dalle")


def test_layer_kinds_of_the_paper():
    """2102.12092, B.1: of layers i = 1..64 the last is conv, column where (i-2) mod 4 = 0, else row."""
    kinds = DalleConfig().layer_kinds
    for i in range(1, 65):
        want = "conv" if i == 64 else "column" if (i - 2) % 4 == 0 else "row"
        assert kinds[i - 1] == want, f"layer {i}"
    assert Counter(kinds) == {"row": 47, "column": 16, "conv": 1}
    assert kinds[:4] == ("row", "column", "row", "row")


def test_layer_kinds_without_a_special_last_layer():
    config = DalleConfig(layers=5, attention=("full", "conv"), last_attention=None)
    assert config.layer_kinds == ("full", "conv", "full", "conv", "full")


def test_derived_sizes():
    assert (DVAEConfig().grid, DVAEConfig().num_codes) == (32, 1024)
    assert (DVAEConfig(groups=1).downsample, DVAEConfig(groups=3).downsample) == (1, 4)
    config = DalleConfig()
    assert (config.num_codes, config.seq_len, config.head_dim) == (1024, 1280, 64)


# --- full-size models, by shape alone --------------------------------------------------------------------


def shapes(model):
    init = tokenizer.init if isinstance(model, TokenizerConfig) else dalle.init
    init = clip.init if isinstance(model, ClipConfig) else init
    init = unet.init if isinstance(model, DiffusionConfig) else init
    return jax.eval_shape(lambda key: init(model, key), jax.random.key(0))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def assert_one_rule_each(tree):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(path)
        assert sum(bool(re.fullmatch(pattern, name)) for pattern, _ in PARAM_AXES) == 1, name
        assert len(param_axes(name, leaf.shape)) == leaf.ndim
        assert leaf.dtype == "float32", name


def test_parameters_of_the_published_dvae():
    """The published encoder.pkl and decoder.pkl hold 53,786,240 and 43,829,766 numbers."""
    tree = shapes(DVAEConfig())
    assert count(tree["encoder"]) == 53_786_240
    assert count(tree["decoder"]) == 43_829_766
    assert_one_rule_each(tree)


def test_parameters_of_the_paper_transformer():
    """12 billion: 64 layers, 62 heads of 64; 16,384 + 256 text ids, 8192 codes, 32 rows and columns."""
    d, layers = 62 * 64, 64
    embeddings = (16_384 + 256) * d + 256 * d + 8192 * d + (32 + 32) * d
    qkv, out = d * 3 * d + 3 * d, d * d + d
    up, down = d * 4 * d + 4 * d, 4 * d * d + d
    norms = 2 * (d + d)
    heads = d * (16_384 + 256) + d * 8192
    want = embeddings + layers * (qkv + out + up + down + norms) + (d + d) + heads
    tree = shapes(DalleConfig())
    assert count(tree) == want
    assert abs(want / 12.0e9 - 1) < 0.03
    assert_one_rule_each(tree)


def test_qk_norm_adds_two_gains_per_layer():
    small = DalleConfig(dim=16, heads=2, layers=3, text_len=2, text_vocab=3, image_vocab=4, grid=2)
    normed = dataclasses.replace(small, qk_norm=True)
    assert count(shapes(normed)) - count(shapes(small)) == 3 * 2 * (16 // 2)
    assert_one_rule_each(shapes(normed))


def test_parameters_of_published_diffusion_models():
    """The CIFAR-10 network of 2006.11239 has 35.7 million, in its published form 35,746,307. The 64 x 64 network of
    2105.05233 has 295,904,454 with six output channels and 1000 rows of classes; ours has three and 1001. GLIDE
    (2112.10741, 3): about 2.3 and 1.2 billion; as published filtered, 385 million."""
    assert count(shapes(DiffusionConfig())) == 35_746_307
    adm = {
        "image_size": 64, "width": 192, "channel_multipliers": (1, 2, 3, 4), "blocks": 3,
        "attention_sizes": (32, 16, 8),
        "head_dim": 64, "scale_shift_norm": True, "resample": "block",
    }  # fmt: skip
    last_and_class = 3 * (9 * 192 + 1) - 4 * 192
    tree = shapes(DiffusionConfig(**adm, num_classes=1000))
    assert count(tree) == 295_904_454 - last_and_class
    assert_one_rule_each(tree)
    small = shapes(DiffusionConfig(**adm, text=TextEncoderConfig(text_vocab=50_257, dim=512, layers=16)))
    assert abs(count(small) / 385e6 - 1) < 0.002
    glide = load_config("glide_64").model
    tree = shapes(glide)
    assert abs(count(tree["unet"]) / 2.3e9 - 1) < 0.03
    assert round(count(tree["text_encoder"]) / 1e9, 1) == 1.2


def test_there_are_configs():
    assert CONFIGS, "configs/ holds no Python file"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_files(path):
    """Loads, says what it is, survives JSON, and every parameter of its model has its place."""
    config = load_config(path)
    assert path.read_text(encoding="utf-8").startswith('"""')
    assert json.loads(to_json(config)) and from_json(TrainConfig, to_json(config)) == config
    tree = shapes(config.model)
    assert_one_rule_each(tree)
    if path.stem == "dalle_12b":  # fields that do not change the function may differ
        free = {"remat": "full", "dtype": "bfloat16"}
        assert dataclasses.replace(config.model, **free) == DalleConfig()
    if path.stem == "ddpm_cifar10":
        assert dataclasses.replace(config.model, dtype="float32") == DiffusionConfig()
    if path.stem == "dvae_openai":
        assert dataclasses.replace(config.model, dtype="float32") == DVAEConfig()
        assert (count(tree["encoder"]), count(tree["decoder"])) == (53_786_240, 43_829_766)


@pytest.mark.parametrize(
    ("make", "values", "match"),
    [
        (DalleConfig, {"dim": "64"}, r"DalleConfig\.dim of type int.*, got '64'\."),
        (DalleConfig, {"dim": 64.0}, r"DalleConfig\.dim of type int.*, got 64\.0\."),
        (DalleConfig, {"layers": True}, r"DalleConfig\.layers of type int.*, got True\."),
        (DalleConfig, {"dtype": "float64"}, r"DalleConfig\.dtype to be one of 'float32', 'bfloat16'.*, got 'float64'"),
        (DalleConfig, {"dtype": jax.numpy.float32}, r"DalleConfig\.dtype to be one of 'float32', .*got <class"),
        (DalleConfig, {"remat": "all"}, r"DalleConfig\.remat to be one of 'none', 'full'.*, got 'all'"),
        (DalleConfig, {"attention": "full"}, r"DalleConfig\.attention to be a list, got 'full'"),
        (DalleConfig, {"attention": ("foo",)}, r"DalleConfig\.attention\[0\] to be one of 'full', 'row'.*, got 'foo'"),
        (DVAEConfig, {"tau": 1.0}, r"DVAEConfig\.tau of type Schedule.*, got 1\.0\."),
        (TrainConfig, {"model": None}, r"TrainConfig\.model of type DVAEConfig or VQGANConfig.*, got None\."),
        (TrainConfig, {"model": DVAEConfig(), "steps": "3"}, r"TrainConfig\.steps of type int.*, got '3'\."),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused_when_made(make, values, match):
    with pytest.raises(ValueError, match=match):
        make(**values)


def test_lists_and_numbers_of_numpy_are_taken():
    config = DalleConfig(
        layers=np.int64(2), attention=["full"], last_attention=None, cond_drop_prob=np.float32(0.5)
    )
    same = DalleConfig(layers=2, attention=("full",), last_attention=None, cond_drop_prob=0.5)
    assert config == same and hash(config) == hash(same)
    assert to_json(config) == to_json(same)
    assert to_json(OptimConfig(learning_rate=1)) == to_json(OptimConfig(learning_rate=1.0))
