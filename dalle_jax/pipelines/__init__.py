"""From a run directory to images, codes and scores: `load` returns the pipeline of any trained model.

    model = load("runs/scenes_dalle")
    for image in model.sample([ImageRequest("a red circle", seed=0)], SamplingConfig(guidance_scale=2.0)):
        save_png("circle.png", image.image)

`TextToImagePipeline` samples with a Transformer over image tokens, `DiffusionPipeline` with a diffusion model.
`TokenizerPipeline` encodes images to codes, decodes and reconstructs. `ClipPipeline` embeds and ranks images and
captions.
"""

from dalle_jax.pipelines.batching import ProgressFn, ProgressPrinter, chunked
from dalle_jax.pipelines.clip import ClipPipeline, sample_and_rerank
from dalle_jax.pipelines.diffusion import DiffusionPipeline, DiffusionSamplingConfig
from dalle_jax.pipelines.encode_dataset import encode_dataset
from dalle_jax.pipelines.loading import load, pipeline_class
from dalle_jax.pipelines.protocol import SAMPLE_BATCH_SIZE, GeneratedImage, ImageRequest, Pipeline, PreviewFn
from dalle_jax.pipelines.text_to_image import SamplingConfig, TextToImagePipeline
from dalle_jax.pipelines.tokenizer import IMAGE_BATCH_SIZE, TokenizerPipeline

__all__ = [
    "IMAGE_BATCH_SIZE",
    "SAMPLE_BATCH_SIZE",
    "ClipPipeline",
    "DiffusionPipeline",
    "DiffusionSamplingConfig",
    "GeneratedImage",
    "ImageRequest",
    "Pipeline",
    "PreviewFn",
    "ProgressFn",
    "ProgressPrinter",
    "SamplingConfig",
    "TextToImagePipeline",
    "TokenizerPipeline",
    "chunked",
    "encode_dataset",
    "load",
    "pipeline_class",
    "sample_and_rerank",
]
