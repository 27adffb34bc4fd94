"""Every configuration of the library: frozen, keyword-only, hashable, checked when made.

A configuration is plain data: numbers, strings, Literals and other configurations. `to_json` writes one,
`from_json` reads it back and refuses what it does not know. Anything that follows from other fields is a
property, so two fields can never disagree. Numbers of the paper carry their section (Ramesh et al. 2021,
arXiv 2102.12092).
"""

from dalle_jax.config.bart import BartConfig
from dalle_jax.config.clip import ClipConfig, TowerConfig
from dalle_jax.config.dalle import AttentionKind, DalleConfig
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
    TarSource,
    TextConfig,
    TfdsSource,
)
from dalle_jax.config.diffusion import NoiseConfig, NoiseKind, Prediction, Weighting
from dalle_jax.config.json import from_json, to_json
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
    "DVAEConfig",
    "DalleConfig",
    "DataConfig",
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
    "Quantizer",
    "SceneBackground",
    "SceneFill",
    "SceneSize",
    "ScenesSource",
    "Schedule",
    "SourceConfig",
    "TarSource",
    "TextConfig",
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
