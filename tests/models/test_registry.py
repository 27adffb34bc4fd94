"""Tests of the table of models (models/registry.py): completeness, and agreement with configurations, tasks and
parameters."""

import dataclasses
import re
from typing import get_args

import jax
import pytest

from dalle_jax.config import BartConfig, DalleConfig, ModelConfig, TrainConfig, VectorQuantizer, VQGANConfig
from dalle_jax.models import autoregressive, tokenizer
from dalle_jax.models.registry import (
    MODELS,
    init_training,
    load_registry_class,
    model_params,
    model_shapes,
    model_spec,
)

ROWS = pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.kind)


def test_every_model_configuration_has_one_row():
    assert set(MODELS) == set(get_args(ModelConfig))
    assert len({spec.kind for spec in MODELS.values()}) == len(MODELS)


@ROWS
def test_kind_is_the_kind_of_the_configuration(spec):
    (field,) = (field for field in dataclasses.fields(spec.config) if field.name == "kind")
    assert field.default == spec.kind


@ROWS
def test_task_and_pipeline_exist(spec):
    for path in filter(None, (spec.task, spec.pipeline)):
        assert isinstance(load_registry_class(path), type), path


@ROWS
def test_training_parameters_contain_the_model(spec):
    cfg = spec.config()
    shapes = jax.eval_shape(lambda key: init_training(cfg, key), jax.random.key(0))
    assert model_params(cfg, shapes) == model_shapes(cfg)


def test_vqgan_trains_a_discriminator_too():
    cfg = VQGANConfig(image_size=64, quantizer=VectorQuantizer(vocab=8))
    shapes = jax.eval_shape(lambda key: init_training(cfg, key), jax.random.key(0))
    assert shapes.keys() == {"tokenizer", "discriminator"}


@ROWS
def test_descriptions_are_printable(spec):
    about = spec.describe(spec.config())
    assert about and all(re.fullmatch(r"[a-z_]+", name) for name in about)


def test_other_configurations_raise():
    with pytest.raises(ValueError, match=r"of a model \(DVAEConfig, .*\), got TrainConfig"):
        model_spec(TrainConfig(model=DalleConfig()))
    with pytest.raises(ValueError, match="of an image tokenizer, got BartConfig"):
        tokenizer.init(BartConfig(), jax.random.key(0))
    with pytest.raises(ValueError, match="of a Transformer, got VQGANConfig"):
        autoregressive.init(VQGANConfig(), jax.random.key(0))
