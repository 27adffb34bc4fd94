"""`dalle-jax evaluate`: every measure that applies to a run."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from tyro.conf import Positional

from dalle_jax.checkpoint.load import load_run
from dalle_jax.checkpoint.params_file import fingerprint
from dalle_jax.checkpoint.run_dir import read_config
from dalle_jax.cli.common_args import JsonFlag, RunPath, denoising, refuse_flags
from dalle_jax.config import (
    BartConfig,
    ClipConfig,
    DalleConfig,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    Quantization,
    SamplerName,
    TransformerConfig,
)
from dalle_jax.data.sources import infer_source
from dalle_jax.evaluate import classifier, diffusion, fid, inception, metrics, reranking, retrieval
from dalle_jax.pipelines import (
    ImageTokenizer,
    ProgressPrinter,
    SamplingConfig,
    TextToImage,
    load_text_to_image,
)
from dalle_jax.pipelines.diffusion import DiffusionModel, check_decoder, load_diffusion
from dalle_jax.pipelines.ranking import ClipRanker, load_clip


@dataclass(frozen=True, kw_only=True)
class EvaluateArgs:
    """Measures a run on rows and captions that it was not trained on.

    psnr, mse, codebook_use, codebook_perplexity: of the tokenizer. loss, image_loss, text_loss: of the
    Transformer, nats per token. accuracy_one_object, accuracy_two_objects, accuracy_held_out: share of captions whose
    drawn picture shows what the caption says, read back by image analysis; accuracy_reconstruction: the same of
    true pictures that went through the tokenizer. The right_ figures exist for procedural scenes only. With
    --fid-weights: rfid, distance of a tokenizer's reconstructions from true pictures; fid, of the pictures that a
    Transformer or diffusion model draws. With --classifier: accuracy_class, share of drawn pictures that it puts into the
    class asked for; accuracy_class_true and accuracy_class_reconstruction, of true pictures and of these after the
    tokenizer. Of a Transformer with --clip: clip_score, mean cosine of captions and drawn pictures, clip_score_true of
    true ones; with --candidates also accuracy_KIND_best_of_N, where the best of N pictures by that CLIP is taken, and
    accuracy_KIND_any_of_N.

    Of a CLIP: image_to_text_recall_K and text_to_image_recall_K among the rows measured; zero_shot_top1 and
    zero_shot_top5 where there are classes.

    Of a diffusion model: loss, eps_mse, band_1 (least noise) to band_4, squared errors. One on codes is set beside
    its tokenizer: psnr and accuracy_reconstruction are of what it draws from the codes of true pictures,
    tokenizer_psnr and tokenizer_accuracy_reconstruction of what the tokenizer makes of the same codes; so are, with
    --fid-weights, rfid and tokenizer_rfid."""

    run: Positional[RunPath]
    """directory of a trained tokenizer, Transformer, diffusion model or CLIP"""
    count: int = 256
    """rows, and captions of each kind"""
    seed: int = 0
    """of the drawn pictures"""
    guidance_scale: tuple[float, ...] = (1.0,)
    """scales of classifier-free guidance; several give a curve"""
    temperature: float = 1.0
    """of the drawn pictures"""
    top_k: int | None = None
    """draw among this many most probable codes; None is all"""
    top_p: float | None = None
    """draw among the most probable codes that share this much of the probability; None is all"""
    quantization: Quantization | None = None
    """Transformer: draw with its matrices in 8 bits"""
    num_steps: int | None = None
    """diffusion: steps of the sampler; None is 50"""
    sampler: SamplerName | None = None
    """diffusion: how the noise is taken away; None is dpm++2m"""
    bits_per_dim: int = 0
    """diffusion: also measure bits_per_dim, the likelihood by the ODE, of this many rows; slow"""
    decoder: str | None = None
    """Transformer: run of a diffusion model on its tokenizer's codes; adds accuracy_KIND_decoder, the share of the same
    codes when it draws the pixels"""
    fid_weights: str | None = None
    """npz or pth file of the Inception-v3 of FID; adds rfid or fid, which compare at the same count only, and the
    Inception score where the file holds the classifier"""
    fid_reference: str | None = None
    """statistics of true pictures that --fid-save wrote; without it, the rows measured are the reference"""
    fid_save: str | None = None
    """npz file to write, the statistics of the true pictures of the rows measured"""
    classifier: str | None = None
    """npz file of a classifier of CIFAR-10 that judges what is drawn, for runs on its pictures (docs/evaluation.md)"""
    clip: str | None = None
    """of a Transformer: directory of a trained CLIP that scores what is drawn"""
    candidates: int | None = None
    """with --clip: pictures drawn for each caption, of which the CLIP takes the best of 1, 4, 16, ..."""
    data: str | None = None
    """of a CLIP: captioned or labelled pictures to measure on (folder, tar files, npz file, TFDS directory); None is
    the run's own source"""
    templates: tuple[str, ...] = ()
    """of a CLIP: texts for a class, {} is its name; none are those of the source"""
    json: JsonFlag = False


def run(args: EvaluateArgs) -> dict[str, Any]:
    """Measures and prints a table."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; want at least 1 row")
    if not args.guidance_scale:
        raise ValueError(
            "--guidance-scale has no value; want one scale or several, e.g. --guidance-scale 1 2 4"
        )
    if not args.fid_weights and (args.fid_reference or args.fid_save):
        raise ValueError("--fid-reference and --fid-save need --fid-weights, the npz file of Inception-v3")
    if args.fid_reference and args.fid_save:
        raise ValueError("--fid-save writes the statistics of rows, --fid-reference reads a file; want one")
    if args.fid_weights and args.count < 2:
        raise ValueError(f"--count is {args.count}; want at least 2 pictures for a FID")
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "quantization": args.quantization,
    }
    samplings = [SamplingConfig(guidance_scale=scale, **options) for scale in args.guidance_scale]
    model = read_config(args.run).model
    _check_clip(args, model)
    match model:
        case ClipConfig():
            refuse_flags(
                args, ("num_steps", "sampler", "bits_per_dim", "decoder", "quantization"), "models that draw"
            )
            result = _clip(args)
        case DiffusionConfig():
            refuse_flags(args, ("temperature", "top_k", "top_p", "quantization", "decoder"), "a Transformer")
            result = _diffusion(args)
        case DalleConfig() | BartConfig():
            refuse_flags(args, ("bits_per_dim",), "a diffusion model")
            if not args.decoder:
                refuse_flags(args, ("num_steps", "sampler"), "a diffusion model, or for --decoder")
            result = _transformer(args, samplings)
        case _:
            refuse_flags(
                args, ("num_steps", "sampler", "bits_per_dim", "decoder", "quantization"), "models that draw"
            )
            result = _tokenizer(args)
    curve = result.pop("curve", None)
    print(metrics.format_metrics(result))
    if curve:
        print("\n" + _table(curve))
        result["curve"] = curve
    return result


def _check_clip(args: EvaluateArgs, model: ModelConfig) -> None:
    """Flags that are for other stages than that of the run, or for a flag that is missing."""
    if args.clip is None and args.candidates is not None:
        raise ValueError("--candidates needs --clip, the run of the CLIP that takes the best of them")
    if args.candidates is not None and args.candidates < 1:
        raise ValueError(f"--candidates is {args.candidates}; want at least 1 picture per caption")
    if args.clip is not None and not isinstance(model, TransformerConfig):
        raise ValueError(f"--clip scores what a Transformer draws; {args.run} is a run of stage {model.kind}")
    if (args.data is not None or args.templates) and not isinstance(model, ClipConfig):
        raise ValueError(f"--data and --templates are for a CLIP; {args.run} is a run of stage {model.kind}")
    if args.classifier and isinstance(model, ClipConfig):
        raise ValueError("--classifier judges drawn pictures; a CLIP draws none")
    if args.fid_weights and isinstance(model, ClipConfig):
        raise ValueError("--fid-weights compares drawn pictures with true ones; a CLIP draws none")


class _Truth(NamedTuple):
    """What pictures are compared with."""

    network: inception.Inception
    true: fid.FeatureStats


def _truth(
    args: EvaluateArgs, data: DataConfig, image_size: int, languages: tuple[str, ...]
) -> _Truth | None:
    """None without --fid-weights. Before all other work, so that a wrong file is told at once."""
    if not args.fid_weights:
        return None
    network = inception.load_inception(args.fid_weights)
    settings = metrics.fid_settings(network, image_size)
    if args.fid_reference:
        return _Truth(network, fid.load_reference(args.fid_reference, settings))
    progress = ProgressPrinter("features of true pictures")
    true = metrics.reference_stats(
        network, data, image_size, args.count, languages=languages, progress=progress
    )
    if args.fid_save:
        fid.save_reference(args.fid_save, true, settings)
        print(f"{args.fid_save}: statistics of {true.count} true pictures", file=sys.stderr)
    return _Truth(network, true)


def _judge(args: EvaluateArgs, data: DataConfig) -> classifier.Classifier | None:
    """None without --classifier. Before all other work, so that a wrong file is told at once."""
    if not args.classifier:
        return None
    judge = classifier.load_classifier(args.classifier)
    classifier.check_classes(judge, data, args.classifier)
    return judge


def _tokenizer(args: EvaluateArgs) -> dict[str, Any]:
    run = load_run(args.run)
    tokenizer = ImageTokenizer(run.config.model, run.params, fingerprint(run.config.model, run.params))
    truth = _truth(args, run.config.data, run.config.model.image_size, ())
    judge = _judge(args, run.config.data)
    result = {
        "stage": run.config.model.kind,
        "step": run.step,
        "count": args.count,
        **_told(metrics.measure_tokenizer(tokenizer, run.config.data, args.count)),
        **_told(metrics.reconstruction_accuracy(tokenizer, run.config.data, args.count)),
    }
    if truth:
        progress = ProgressPrinter("features of reconstructions")
        rest = (tokenizer, run.config.data, truth.true, args.count)
        result |= _told(metrics.measure_rfid(truth.network, *rest, progress=progress))
    if judge:
        result |= _ceiling(judge, tokenizer, run.config.data, run.config.model.image_size, args.count)
    return result


def _ceiling(judge, tokenizer, data: DataConfig, image_size: int, count: int) -> dict[str, float]:
    progress = ProgressPrinter("classes of true pictures")
    return _told(classifier.measure_true(judge, tokenizer, data, image_size, count, progress=progress))


def _clip(args: EvaluateArgs) -> dict[str, Any]:
    clip = load_clip(args.run)
    data, progress = clip.run.config.data, ProgressPrinter("pictures")
    if args.data is not None:
        data = dataclasses.replace(data, source=infer_source(args.data))
    options = {"templates": args.templates, "progress": progress}
    return {
        "stage": "clip",
        "step": clip.run.step,
        "count": args.count,
        **_told(retrieval.measure_retrieval(clip, data, args.count, progress=progress)),
        **_told(retrieval.measure_zero_shot(clip, data, args.count, **options)),
    }


def _diffusion(args: EvaluateArgs) -> dict[str, Any]:
    hows = [denoising(args, scale) for scale in args.guidance_scale]
    model = load_diffusion(args.run)
    cfg, data = model.config, model.run.config.data
    if args.bits_per_dim < 0:
        raise ValueError(f"--bits-per-dim is {args.bits_per_dim}; want a number of rows, 0 for none")
    truth = _truth(args, data, cfg.image_size, metrics.model_languages(model))
    judge = _judge(args, data)
    result = {
        "stage": cfg.kind,
        "step": model.run.step,
        "count": args.count,
        "sampler": hows[0].sampler,
        "steps": hows[0].num_steps,
        **_told(diffusion.measure_denoising_error(model, args.count)),
    }
    if args.bits_per_dim:
        progress = ProgressPrinter("likelihood of rows")
        result |= _told(diffusion.measure_bits_per_dim(model, args.bits_per_dim, progress=progress))
    if judge:
        result |= _ceiling(judge, None, data, cfg.image_size, args.count)
    if cfg.codes is not None:
        progress = ProgressPrinter("denoising steps")
        rest = (args.count, hows[0])
        result |= _told(diffusion.measure_decoder(model, *rest, seed=args.seed, progress=progress))
        if truth:
            progress = ProgressPrinter("features of what is made of codes")
            rest = (truth.network, model, truth.true, *rest)
            result |= _told(diffusion.measure_decoder_rfid(*rest, seed=args.seed, progress=progress))
        return result
    kinds = metrics.scene_kinds(data, cfg.image_size) if model.text is not None else ()
    if cfg.low_res_size or not (
        kinds or truth or judge
    ):  # one that makes pictures large needs more than a caption
        return result
    return result | _curve(args, model, hows, truth, bool(kinds), judge=judge)


def _curve(
    args, model: TextToImage | DiffusionModel, hows: list, truth, verify: bool, clip=None, judge=None
) -> dict[str, Any]:
    """The figures of drawn pictures at the first guidance scale, and those of all under `curve`."""
    curve = []
    for how in hows:
        progress, found = ProgressPrinter(f"guidance {how.guidance_scale:g}: drawing"), {}
        if verify:
            found = metrics.caption_accuracy(model, args.count, how, seed=args.seed, progress=progress)
        if truth:
            progress = ProgressPrinter(f"guidance {how.guidance_scale:g}: features of drawn pictures")
            rest = (model, truth.true, args.count, how)
            found |= metrics.measure_fid(truth.network, *rest, seed=args.seed, progress=progress)
        if judge is not None:
            progress = ProgressPrinter(f"guidance {how.guidance_scale:g}: classes of drawn pictures")
            rest = {"seed": args.seed, "progress": progress}
            found |= classifier.measure_classes(judge, model, args.count, how, **rest)
        if clip is not None:
            found |= _ranked(args, model, clip, how)
        curve.append({"guidance_scale": how.guidance_scale, **found})
        _told(found)
    return curve[0] | ({"curve": curve} if len(curve) > 1 else {})  # one alone stays flat


def _transformer(args: EvaluateArgs, samplings: list[SamplingConfig]) -> dict[str, Any]:
    model = load_text_to_image(args.run)
    clip = None if args.clip is None else load_clip(args.clip)
    decoder = None if args.decoder is None else load_diffusion(args.decoder)
    if decoder is not None:
        check_decoder(decoder, model.tokenizer)
    data = model.run.config.data
    kinds = metrics.scene_kinds(data, model.tokenizer.config.image_size)
    truth = _truth(args, data, model.tokenizer.config.image_size, data.languages)
    judge = _judge(args, data)
    if not kinds and judge is None:
        print("the source is not of procedural scenes: captions cannot be verified", file=sys.stderr)
    result = {
        "stage": "dalle",
        "step": model.run.step,
        "count": args.count,
        **_told(metrics.measure_nll(model, args.count)),
        **_told(metrics.measure_tokenizer(model.tokenizer, data, args.count)),
        **_told(metrics.reconstruction_accuracy(model.tokenizer, data, args.count)),
    }
    if judge:
        result |= _ceiling(judge, model.tokenizer, data, model.tokenizer.config.image_size, args.count)
    if not (kinds or truth or judge or clip):
        return result
    curve = _curve(args, model, samplings, truth, bool(kinds), clip, judge)
    result |= {"temperature": args.temperature, **curve}
    if decoder is not None:
        progress = ProgressPrinter("denoising steps")
        result |= _told(
            diffusion.measure_decoded(
                model, decoder, args.count, samplings[0], denoising(args), seed=args.seed, progress=progress
            )
        )
    return result


def _ranked(
    args: EvaluateArgs, model: TextToImage, clip: ClipRanker, sampling: SamplingConfig
) -> dict[str, float]:
    progress = ProgressPrinter(f"guidance {sampling.guidance_scale:g}: pictures for the CLIP")
    rest = {"seed": args.seed, "progress": progress}
    found = reranking.measure_clip_score(model, clip, args.count, sampling, **rest)
    if args.candidates is not None:
        found |= reranking.measure_reranking(model, clip, args.count, args.candidates, sampling, **rest)
    return found


def _told(figures: dict[str, float]) -> dict[str, float]:
    """`figures`, also on standard error: the long part of the work is still to come."""
    if figures:
        print(
            "  ".join(f"{name} {value:.4g}" for name, value in figures.items()), file=sys.stderr, flush=True
        )
    return figures


def _table(rows: list[dict[str, float]]) -> str:
    names = list(rows[0])
    lines = ["  ".join(names)]
    lines += ["  ".join(f"{row[name]:>{len(name)}.4g}" for name in names) for row in rows]
    return "\n".join(lines)
