"""The table of models: what the library does with each class of model configuration.

A new kind of model is one module with its functions, one training task and one row of `MODELS`. Other subpackages
call `model_spec(cfg)` instead of testing the type of a configuration. Tasks and pipelines belong to higher subpackages,
so rows name them as strings, which `load_registry_class` imports on first use.
B batch, H W image, T text positions, N codes, C captions, P prefix codes, Q draft codes, X inserted rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import jax
from jax.sharding import Mesh

from dalle_jax.config import (
    BartConfig,
    ClipConfig,
    DalleConfig,
    DiffusionConfig,
    DVAEConfig,
    ModelConfig,
    VQGANConfig,
)
from dalle_jax.models import bart, clip, dalle, dvae
from dalle_jax.models.dalle import flops as dalle_flops
from dalle_jax.models.diffusion import unet
from dalle_jax.models.vqgan import adversarial, autoencoder
from dalle_jax.typing import Params

# What a model is for: image tokenizers encode and decode images, generators sample images, rankers score images.
Role = Literal["tokenizer", "generator", "ranker"]


class TokenizerFunctions(Protocol):
    """Functions of an image tokenizer, documented in models/tokenizer.py."""

    def init(self, cfg: Any, key: jax.Array) -> Params: ...

    def encode(self, cfg: Any, params: Params, images_BHWC: jax.Array) -> jax.Array: ...

    def decode(self, cfg: Any, params: Params, codes_BN: jax.Array) -> jax.Array: ...


class TransformerFunctions(Protocol):
    """Functions of an autoregressive Transformer, documented in models/dalle/."""

    def init(self, cfg: Any, key: jax.Array) -> Params: ...

    def null_text(self, cfg: Any) -> jax.Array: ...

    def logits(
        self, cfg: Any, params: Params, text_BT: jax.Array, codes_BN: jax.Array
    ) -> tuple[jax.Array | None, jax.Array]: ...

    def loss(
        self, cfg: Any, params: Params, text_BT: jax.Array, codes_BN: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]: ...

    def init_cache(
        self, cfg: Any, captions: int, samples_per_caption: int = 1, *, use_cfg: bool = False
    ) -> Any: ...

    def prefill(
        self,
        cfg: Any,
        params: Params,
        text_CT: jax.Array,
        codes_BP: jax.Array | None = None,
        *,
        samples_per_caption: int = 1,
        use_cfg: bool = False,
    ) -> tuple[jax.Array, Any]: ...

    def resize_cache(self, cfg: Any, cache: Any, size: int) -> Any: ...

    def insert_into_cache(self, cfg: Any, cache: Any, prefilled: Any, rows_X: jax.Array) -> Any: ...

    def decode_step(
        self, cfg: Any, params: Params, cache: Any, code_B: jax.Array, position: jax.Array | int
    ) -> tuple[jax.Array, Any]: ...

    def decode_drafts(
        self, cfg: Any, params: Params, cache: Any, codes_BQ: jax.Array, position_B: jax.Array
    ) -> tuple[jax.Array, Any]: ...

    def commit_drafts(
        self, cfg: Any, cache: Any, draft_kvs: Any, position_B: jax.Array, num_accepted_B: jax.Array
    ) -> Any: ...


@dataclass(frozen=True)
class ModelSpec:
    """One row of the table.

    Attributes:
      config: the class of the configuration.
      kind: the name of the stage, `cfg.kind`.
      role: what the model is for.
      init: `(cfg, key) -> params`, the parameters that the trained model is used with.
      describe: `(cfg) -> {name: value}`, the sizes that `dalle-jax info` prints.
      task: "module:Class" of the training task.
      pipeline: "module:Class" of the pipeline that uses the trained model.
      tokenizer: the functions of an image tokenizer, or None.
      transformer: the functions of an autoregressive Transformer, or None.
      init_training: `(cfg, key) -> params` where training updates more networks than the model; None is `init`.
      model_subtree: the name of the subtree of the training parameters that is the model; None is the whole tree.
      check_mesh: `(cfg, mesh)` raises MeshError for sizes that the mesh does not divide; None checks nothing.
      train_flops: `(cfg, rows) -> float`, model FLOPs of one training step; None counts the traced step.
      sample_flops: `(cfg, rows) -> float`, model FLOPs of sampling one image per row; None counts the traced program.
    """

    config: type
    kind: str
    role: Role
    init: Callable[[Any, jax.Array], Params]
    describe: Callable[[Any], dict[str, Any]]
    task: str
    pipeline: str
    tokenizer: TokenizerFunctions | None = None
    transformer: TransformerFunctions | None = None
    init_training: Callable[[Any, jax.Array], Params] | None = None
    model_subtree: str | None = None
    check_mesh: Callable[[Any, Mesh], None] | None = None
    train_flops: Callable[[Any, int], float] | None = None
    sample_flops: Callable[[Any, int], float] | None = None


def _attributes(names: tuple[str, ...], cfg: Any) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in names}


_TOKENIZER_SIZES = partial(_attributes, ("grid", "num_codes", "image_size", "vocab"))
_TRANSFORMER_SIZES = partial(
    _attributes, ("grid", "num_codes", "text_vocab", "text_len", "image_vocab", "seq_len", "layers")
)
_CLIP_SIZES = partial(_attributes, ("image_size", "patch_size", "text_vocab", "text_len", "embed_dim"))


def _diffusion_sizes(cfg: DiffusionConfig) -> dict[str, Any]:
    conditions = {
        "captions": cfg.text,
        "labels": cfg.num_classes,
        "codes": cfg.codes,
        "low_res": cfg.low_res_size,
    }
    return {
        "image_size": cfg.image_size,
        "sizes": cfg.sizes,
        "prediction": cfg.prediction,
        "noise": cfg.noise.kind,
        "conditions": ", ".join(name for name, value in conditions.items() if value) or "none",
    }


_ROWS = (
    ModelSpec(
        config=DVAEConfig,
        kind="dvae",
        role="tokenizer",
        init=dvae.init,
        describe=_TOKENIZER_SIZES,
        task="dalle_jax.train.tasks.dvae:DVAETask",
        pipeline="dalle_jax.pipelines.tokenizer:TokenizerPipeline",
        tokenizer=dvae,
    ),
    ModelSpec(
        config=VQGANConfig,
        kind="vqgan",
        role="tokenizer",
        init=autoencoder.init,
        describe=_TOKENIZER_SIZES,
        task="dalle_jax.train.tasks.vqgan:VQGANTask",
        pipeline="dalle_jax.pipelines.tokenizer:TokenizerPipeline",
        tokenizer=autoencoder,
        init_training=adversarial.init,
        model_subtree="tokenizer",
    ),
    ModelSpec(
        config=DalleConfig,
        kind="dalle",
        role="generator",
        init=dalle.init,
        describe=_TRANSFORMER_SIZES,
        task="dalle_jax.train.tasks.dalle:DalleTask",
        pipeline="dalle_jax.pipelines.text_to_image:TextToImagePipeline",
        transformer=dalle,
        check_mesh=dalle.check_dalle_mesh,
        train_flops=dalle_flops.dalle_train_flops,
        sample_flops=partial(dalle_flops.dalle_flops, text_head=False),
    ),
    ModelSpec(
        config=BartConfig,
        kind="bart",
        role="generator",
        init=bart.init,
        describe=_TRANSFORMER_SIZES,
        task="dalle_jax.train.tasks.dalle:DalleTask",
        pipeline="dalle_jax.pipelines.text_to_image:TextToImagePipeline",
        transformer=bart,
    ),
    ModelSpec(
        config=ClipConfig,
        kind="clip",
        role="ranker",
        init=clip.init,
        describe=_CLIP_SIZES,
        task="dalle_jax.train.tasks.clip:ClipTask",
        pipeline="dalle_jax.pipelines.clip:ClipPipeline",
    ),
    ModelSpec(
        config=DiffusionConfig,
        kind="diffusion",
        role="generator",
        init=unet.init,
        describe=_diffusion_sizes,
        task="dalle_jax.train.tasks.diffusion:DiffusionTask",
        pipeline="dalle_jax.pipelines.diffusion:DiffusionPipeline",
    ),
)
MODELS: dict[type, ModelSpec] = {row.config: row for row in _ROWS}


def model_spec(cfg: ModelConfig) -> ModelSpec:
    """Return the row of a model configuration.

    Raises:
      ValueError: `cfg` is not the configuration of a model.
    """
    if type(cfg) not in MODELS:
        names = ", ".join(config.__name__ for config in MODELS)
        raise ValueError(f"Expected the configuration of a model ({names}), got {type(cfg).__name__}.")
    return MODELS[type(cfg)]


def init_training(cfg: ModelConfig, key: jax.Array) -> Params:
    """Initialize all parameters that the training of `cfg` updates, float32."""
    spec = model_spec(cfg)
    return (spec.init_training or spec.init)(cfg, key)


def model_params(cfg: ModelConfig, training_params: Params) -> Params:
    """Return the parameters of the model among those that its training updates."""
    subtree = model_spec(cfg).model_subtree
    return training_params if subtree is None else training_params[subtree]


def model_shapes(cfg: ModelConfig) -> Params:
    """Return the shape and dtype of every parameter of the model, a tree of jax.ShapeDtypeStruct."""
    return jax.eval_shape(partial(model_spec(cfg).init, cfg), jax.random.key(0))


def check_model_mesh(cfg: ModelConfig, mesh: Mesh) -> None:
    """Check that `mesh` divides the sizes of the model.

    Raises:
      MeshError: it names the first field that the mesh does not divide.
    """
    check = model_spec(cfg).check_mesh
    if check is not None:
        check(cfg, mesh)


def load_registry_class(path: str) -> Any:
    """Import the class that a row names as "module:Class"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
