"""Configurations: frozen, keyword-only, hashable dataclasses, validated in their constructors.

A configuration is plain data: numbers, strings, Literals and other configurations. `to_json` and `from_json` convert it
to JSON and back. Derived values are properties, so two fields cannot disagree. Numbers of a paper carry its section; a
bare section is of Ramesh et al. 2021, 2102.12092.
"""

from dalle_jax.config.bart import BartConfig
from dalle_jax.config.clip import ClipConfig, TowerConfig
from dalle_jax.config.dalle import AttentionKind, DalleConfig, Quantization, T5Config
from dalle_jax.config.data import (
    MIXTURE_PERIOD,
    ArraysSource,
    DataConfig,
    FolderSource,
    Language,
    MixtureSource,
    SceneBackground,
    SceneFill,
    SceneSize,
    ScenesSource,
    SourceConfig,
    StoredSource,
    TarSource,
    TextConfig,
    TfdsSource,
)
from dalle_jax.config.diffusion import (
    CodesConfig,
    DiffusionConfig,
    NoiseConfig,
    NoiseKind,
    Prediction,
    SamplerName,
    Spacing,
    TextEncoderConfig,
    Weighting,
)
from dalle_jax.config.serialization import from_json, to_json
from dalle_jax.config.tokenizer import (
    AdversarialConfig,
    Dtype,
    DVAEConfig,
    FiniteScalarQuantizer,
    GumbelQuantizer,
    Quantizer,
    Schedule,
    TokenizerConfig,
    VectorQuantizer,
    VQGANConfig,
)
from dalle_jax.config.training import (
    DistributedConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ProfileConfig,
    TrainConfig,
    TransformerConfig,
)

__all__ = [
    "MIXTURE_PERIOD",
    "AdversarialConfig",
    "ArraysSource",
    "AttentionKind",
    "BartConfig",
    "ClipConfig",
    "CodesConfig",
    "DVAEConfig",
    "DalleConfig",
    "DataConfig",
    "DiffusionConfig",
    "DistributedConfig",
    "Dtype",
    "FiniteScalarQuantizer",
    "FolderSource",
    "GumbelQuantizer",
    "Language",
    "MeshConfig",
    "MixtureSource",
    "ModelConfig",
    "NoiseConfig",
    "NoiseKind",
    "OptimConfig",
    "Prediction",
    "ProfileConfig",
    "Quantization",
    "Quantizer",
    "SamplerName",
    "SceneBackground",
    "SceneFill",
    "SceneSize",
    "ScenesSource",
    "Schedule",
    "SourceConfig",
    "Spacing",
    "StoredSource",
    "T5Config",
    "TarSource",
    "TextConfig",
    "TextEncoderConfig",
    "TfdsSource",
    "TokenizerConfig",
    "TowerConfig",
    "TrainConfig",
    "TransformerConfig",
    "VQGANConfig",
    "VectorQuantizer",
    "Weighting",
    "from_json",
    "to_json",
]
