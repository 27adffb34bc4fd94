"""`dalle-jax evaluate`: every metric that applies to a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from tyro.conf import Positional

from dalle_jax.cli.common_args import JsonFlag, RunPath, SamplerArgs
from dalle_jax.config import DataConfig, Quantization
from dalle_jax.data.sources import infer_source
from dalle_jax.evaluate import classifier as classifiers
from dalle_jax.evaluate import diffusion, fid, inception, metrics, reranking, retrieval
from dalle_jax.pipelines import (
    ClipPipeline,
    DiffusionPipeline,
    DiffusionSamplingConfig,
    Pipeline,
    ProgressPrinter,
    SamplingConfig,
    TextToImagePipeline,
    TokenizerPipeline,
    load,
)


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Evaluate a run on rows and captions that it was not trained on. The other flags and the metrics depend on the
    model of RUN: `dalle-jax evaluate RUN --help` lists them."""

    run: Positional[RunPath]
    """directory of a trained tokenizer, Transformer, diffusion model or CLIP"""
    count: int = 256
    """rows, and captions of each kind"""
    json: JsonFlag = False

    def check(self) -> None:
        """Check the flags by themselves. Raises ValueError for values or combinations that are not allowed."""
        if self.count < 1:
            raise ValueError(f"Expected --count of at least 1, got {self.count}.")

    def evaluate(self) -> dict[str, Any]:
        """Compute the metrics, each also printed to standard error as soon as it is known."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _ImageEvaluateArgs(EvaluateArgs):
    """Flags of models that make images."""

    fid_weights: str | None = None
    """npz or pth file of the Inception-v3 of FID; adds rfid or fid, which compare at the same count only, and the
    Inception score where the file has the classifier"""
    fid_reference: str | None = None
    """statistics of true images that --fid-save wrote; None computes those of the rows"""
    fid_save: str | None = None
    """npz file to write, the statistics of the true images of the rows"""
    classifier: str | None = None
    """npz file of a CIFAR-10 classifier, for runs on its images (docs/evaluation.md)"""

    def check(self) -> None:
        super().check()
        if not self.fid_weights and (self.fid_reference or self.fid_save):
            raise ValueError(
                "Expected --fid-weights with --fid-reference and --fid-save, got none. Set it to the npz file of "
                "Inception-v3."
            )
        if self.fid_reference and self.fid_save:
            raise ValueError(
                "Expected --fid-save or --fid-reference, got both. Use --fid-save to write the statistics of rows, or "
                "--fid-reference to read them."
            )
        if self.fid_weights and self.count < 2:
            raise ValueError(f"Expected --count of at least 2 with --fid-weights, got {self.count}.")

    def load_reference(
        self, data: DataConfig, image_size: int, languages: tuple[str, ...]
    ) -> _Reference | None:
        """Load or compute what FID compares with; None without --fid-weights."""
        if not self.fid_weights:
            return None
        network = inception.load_inception(self.fid_weights)
        settings = metrics.fid_settings(network, image_size)
        if self.fid_reference:
            return _Reference(network, fid.load_fid_reference(self.fid_reference, settings))
        progress = ProgressPrinter("features of true images")
        stats = metrics.reference_stats(
            network, data, image_size, self.count, languages=languages, progress=progress
        )
        if self.fid_save:
            fid.save_fid_reference(self.fid_save, stats, settings)
            print(f"{self.fid_save}: statistics of {stats.count} true images", file=sys.stderr)
        return _Reference(network, stats)

    def load_classifier(self, data: DataConfig) -> classifiers.Classifier | None:
        """Load the classifier; None without --classifier."""
        if not self.classifier:
            return None
        network = classifiers.load_classifier(self.classifier)
        classifiers.check_classifier_classes(network, data, self.classifier)
        return network

    def true_class_accuracy(
        self,
        network: classifiers.Classifier,
        tokenizer: TokenizerPipeline | None,
        data: DataConfig,
        image_size: int,
    ) -> metrics.Metrics:
        """Classify true images and their reconstructions."""
        progress = ProgressPrinter("classes of true images")
        return _print(
            classifiers.measure_class_accuracy_bound(
                network, tokenizer, data, image_size, self.count, progress=progress
            )
        )


class _Reference(NamedTuple):
    """The network of FID and the statistics of true images."""

    network: inception.Inception
    stats: fid.FeatureStats


@dataclass(frozen=True, kw_only=True)
class TokenizerEvaluateArgs(_ImageEvaluateArgs):
    """Evaluate an image tokenizer on rows that it was not trained on.

    psnr, mse, codebook_use and codebook_perplexity of reconstructions; for procedural scenes accuracy_reconstruction,
    the fraction of reconstructed images that image analysis finds to agree with their caption; with --fid-weights rfid;
    with --classifier accuracy_class_true and accuracy_class_reconstruction."""

    def evaluate(self) -> dict[str, Any]:
        tokenizer = load(self.run, TokenizerPipeline)
        data, size = tokenizer.run.config.data, tokenizer.image_size
        reference = self.load_reference(data, size, ())
        network = self.load_classifier(data)
        result = {
            **_header(tokenizer, self.count),
            **_print(metrics.measure_tokenizer(tokenizer, data, self.count)),
            **_print(metrics.reconstruction_accuracy(tokenizer, data, self.count)),
        }
        if reference:
            progress = ProgressPrinter("features of reconstructions")
            arguments = (reference.network, tokenizer, data, reference.stats, self.count)
            result |= _print(metrics.measure_rfid(*arguments, progress=progress))
        if network:
            result |= self.true_class_accuracy(network, tokenizer, data, size)
        return result


@dataclass(frozen=True, kw_only=True)
class _GeneratorEvaluateArgs(_ImageEvaluateArgs):
    """Flags of models that generate images."""

    seed: int = 0
    """of the first generated image"""
    guidance_scale: tuple[float, ...] = (1.0,)
    """scales of classifier-free guidance; several give a curve"""

    def check(self) -> None:
        super().check()
        if not self.guidance_scale:
            raise ValueError(
                "Expected one --guidance-scale or more, got none. Use e.g. --guidance-scale 1 2 4."
            )

    def curve(
        self,
        model: Pipeline,
        configs: list[Any],
        reference: _Reference | None,
        network: classifiers.Classifier | None,
        extra: Callable[[Any], metrics.Metrics] | None = None,
    ) -> dict[str, Any]:
        """Metrics of generated images at the first guidance scale, and those of several scales under `curve`.

        extra: more metrics of a sampling configuration.
        """
        verifiable = bool(model.languages) and bool(
            metrics.scene_kinds(model.run.config.data, model.image_size)
        )
        rows = []
        for config in configs:
            name, row = f"guidance {config.guidance_scale:g}", {}
            if verifiable:
                row |= metrics.caption_accuracy(
                    model, self.count, config, seed=self.seed, progress=ProgressPrinter(f"{name}: sampling")
                )
            if reference:
                progress = ProgressPrinter(f"{name}: features of generated images")
                arguments = (reference.network, model, reference.stats, self.count, config)
                row |= metrics.measure_fid(*arguments, seed=self.seed, progress=progress)
            if network is not None:
                progress = ProgressPrinter(f"{name}: classes of generated images")
                arguments = (network, model, self.count, config)
                row |= classifiers.measure_class_accuracy(*arguments, seed=self.seed, progress=progress)
            if extra is not None:
                row |= extra(config)
            rows.append({"guidance_scale": config.guidance_scale, **row})
            _print(row)
        return rows[0] | ({"curve": rows} if len(rows) > 1 else {})


@dataclass(frozen=True, kw_only=True)
class TransformerEvaluateArgs(_GeneratorEvaluateArgs, SamplerArgs):
    """Evaluate a Transformer on rows and captions that it was not trained on.

    loss, image_loss and text_loss, nats per token; the metrics of its tokenizer. For procedural scenes
    accuracy_one_object, accuracy_two_objects and accuracy_held_out: the fraction of captions whose generated image
    agrees with them, by image analysis; accuracy_reconstruction, the same of true images after the tokenizer. With
    --fid-weights fid; with --classifier accuracy_class, the fraction of generated images of the class asked for; with
    --clip clip_score and clip_score_true, mean cosine similarities of captions with generated and true images; with
    --candidates accuracy_KIND_best_of_N and accuracy_KIND_any_of_N."""

    temperature: float = 1.0
    """of the generated images"""
    top_k: int | None = None
    """sample among this many most probable codes; None is all"""
    top_p: float | None = None
    """sample among the most probable codes with this probability together; None is all"""
    quantization: Quantization | None = None
    """sample with 8-bit matrices"""
    decoder: str | None = None
    """run of a diffusion model on the tokenizer's codes; adds accuracy_KIND_decoder, of the pixels that it generates
    from the same codes"""
    clip: str | None = None
    """directory of a trained CLIP that scores generated images"""
    candidates: int | None = None
    """with --clip: images generated for each caption, of which the CLIP takes the best of 1, 4, 16, ..."""

    def check(self) -> None:
        super().check()
        if self.clip is None and self.candidates is not None:
            raise ValueError("Expected --clip with --candidates, got none. Set it to the run of a CLIP.")
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"Expected --candidates of at least 1, got {self.candidates}.")
        if not self.decoder and (self.num_steps is not None or self.sampler is not None):
            raise ValueError(
                "Expected --num-steps and --sampler with --decoder, got none. Remove them or set --decoder."
            )
        self._configs()

    def _configs(self) -> list[SamplingConfig]:
        return [
            SamplingConfig(
                guidance_scale=scale,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                quantization=self.quantization,
            )
            for scale in self.guidance_scale
        ]

    def evaluate(self) -> dict[str, Any]:
        model = load(self.run, TextToImagePipeline)
        clip = None if self.clip is None else load(self.clip, ClipPipeline)
        decoder = None if self.decoder is None else load(self.decoder, DiffusionPipeline)
        if decoder is not None:
            decoder.check_tokenizer(model.tokenizer)
        data, size = model.run.config.data, model.image_size
        reference = self.load_reference(data, size, model.languages)
        network = self.load_classifier(data)
        kinds = metrics.scene_kinds(data, size)
        if not kinds and network is None:
            print("the source is not of procedural scenes: captions are not verified", file=sys.stderr)
        result = {
            **_header(model, self.count),
            **_print(metrics.measure_nll(model, self.count)),
            **_print(metrics.measure_tokenizer(model.tokenizer, data, self.count)),
            **_print(metrics.reconstruction_accuracy(model.tokenizer, data, self.count)),
        }
        if network:
            result |= self.true_class_accuracy(network, model.tokenizer, data, size)
        if not (kinds or reference or network or clip):
            return result
        configs = self._configs()
        extra = None if clip is None else partial(self._clip_metrics, model, clip)
        result |= {"temperature": self.temperature, **self.curve(model, configs, reference, network, extra)}
        if decoder is not None:
            arguments = (model, decoder, self.count, configs[0], self.denoising_config())
            progress = ProgressPrinter("denoising steps")
            result |= _print(
                diffusion.measure_decoder_accuracy(*arguments, seed=self.seed, progress=progress)
            )
        return result

    def _clip_metrics(
        self, model: TextToImagePipeline, clip: ClipPipeline, config: SamplingConfig
    ) -> metrics.Metrics:
        progress = ProgressPrinter(f"guidance {config.guidance_scale:g}: images for the CLIP")
        result = reranking.measure_clip_score(
            model, clip, self.count, config, seed=self.seed, progress=progress
        )
        if self.candidates is not None:
            arguments = (model, clip, self.count, self.candidates, config)
            result |= reranking.measure_reranking(*arguments, seed=self.seed, progress=progress)
        return result


@dataclass(frozen=True, kw_only=True)
class DiffusionEvaluateArgs(_GeneratorEvaluateArgs, SamplerArgs):
    """Evaluate a diffusion model on rows and captions that it was not trained on.

    loss, eps_mse, and squared errors by noise level, band_1 (least noise) to band_4. For captions of procedural scenes
    accuracy_one_object and accuracy_held_out: the fraction of captions whose generated image agrees with them, by image
    analysis. With --fid-weights fid; with --classifier accuracy_class and accuracy_class_true.

    A model on codes is compared with its tokenizer: psnr, accuracy_reconstruction and rfid are of what it generates
    from the codes of true images, tokenizer_psnr, tokenizer_accuracy_reconstruction and tokenizer_rfid of what the
    tokenizer decodes."""

    bits_per_dim: int = 0
    """also measure bits_per_dim, the likelihood by the ODE, of this many rows; slow"""

    def check(self) -> None:
        super().check()
        if self.bits_per_dim < 0:
            raise ValueError(
                f"Expected --bits-per-dim of at least 0, got {self.bits_per_dim}. Use 0 for none."
            )
        self._configs()

    def _configs(self) -> list[DiffusionSamplingConfig]:
        return [self.denoising_config(guidance_scale=scale) for scale in self.guidance_scale]

    def evaluate(self) -> dict[str, Any]:
        configs = self._configs()
        model = load(self.run, DiffusionPipeline)
        data, size = model.run.config.data, model.image_size
        reference = self.load_reference(data, size, model.languages)
        network = self.load_classifier(data)
        result = {
            **_header(model, self.count),
            "sampler": configs[0].sampler,
            "steps": configs[0].num_steps,
            **_print(diffusion.measure_denoising_error(model, self.count)),
        }
        if self.bits_per_dim:
            progress = ProgressPrinter("likelihood of rows")
            result |= _print(diffusion.measure_bits_per_dim(model, self.bits_per_dim, progress=progress))
        if network:
            result |= self.true_class_accuracy(network, None, data, size)
        if model.config.codes is not None:
            return result | self._decoder_metrics(model, configs[0], reference)
        kinds = metrics.scene_kinds(data, size) if model.languages else ()
        # A model that enlarges a small image needs more than a caption.
        if model.config.low_res_size or not (kinds or reference or network):
            return result
        return result | self.curve(model, configs, reference, network)

    def _decoder_metrics(
        self, model: DiffusionPipeline, config: DiffusionSamplingConfig, reference: _Reference | None
    ) -> metrics.Metrics:
        progress = ProgressPrinter("denoising steps")
        arguments = (model, self.count, config)
        result = _print(diffusion.measure_decoder(*arguments, seed=self.seed, progress=progress))
        if reference:
            progress = ProgressPrinter("features of decoded images")
            arguments = (reference.network, model, reference.stats, self.count, config)
            result |= _print(diffusion.measure_decoder_rfid(*arguments, seed=self.seed, progress=progress))
        return result


@dataclass(frozen=True, kw_only=True)
class ClipEvaluateArgs(EvaluateArgs):
    """Evaluate a CLIP on rows that it was not trained on: image_to_text_recall_K and text_to_image_recall_K among the
    rows, and zero_shot_top1 and zero_shot_top5 where there are classes."""

    data: str | None = None
    """captioned or labeled images (folder, tar files, npz file, TFDS directory); None is the run's own source"""
    templates: tuple[str, ...] = ()
    """texts for a class, {} stands for its name; none are those of the source"""

    def evaluate(self) -> dict[str, Any]:
        clip = load(self.run, ClipPipeline)
        data, progress = clip.run.config.data, ProgressPrinter("images")
        if self.data is not None:
            data = dataclasses.replace(data, source=infer_source(self.data))
        zero_shot = {"templates": self.templates, "progress": progress}
        return {
            **_header(clip, self.count),
            **_print(retrieval.measure_retrieval(clip, data, self.count, progress=progress)),
            **_print(retrieval.measure_zero_shot(clip, data, self.count, **zero_shot)),
        }


EVALUATE_FLAGS = {
    "tokenizer": TokenizerEvaluateArgs,
    "text-to-image": TransformerEvaluateArgs,
    "diffusion": DiffusionEvaluateArgs,
    "clip": ClipEvaluateArgs,
}


def run(args: EvaluateArgs) -> dict[str, Any]:
    """Compute the metrics and print a table."""
    args.check()
    result = args.evaluate()
    curve = result.pop("curve", None)
    print(metrics.format_metrics(result))
    if curve:
        print("\n" + _table(curve))
        result["curve"] = curve
    return result


def _header(model: Pipeline, count: int) -> dict[str, Any]:
    return {"stage": model.config.kind, "step": model.run.step, "count": count}


def _print(values: metrics.Metrics) -> metrics.Metrics:
    """Print metrics to standard error and return them."""
    if values:
        line = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(line, file=sys.stderr, flush=True)
    return values


def _table(rows: list[dict[str, float]]) -> str:
    names = list(rows[0])
    lines = ["  ".join(names)]
    lines += ["  ".join(f"{row[name]:>{len(name)}.4g}" for name in names) for row in rows]
    return "\n".join(lines)
