"""`dalle-jax sample`: images for captions, by any model that generates images."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from tyro.conf import Positional, arg

from dalle_jax.cli import output, sample_file
from dalle_jax.cli.common_args import DenoisingArgs, JsonFlag, RunPath
from dalle_jax.cli.sample_file import CaptionLine, print_first_image
from dalle_jax.config import Quantization
from dalle_jax.data import images
from dalle_jax.files.atomic import write_npz
from dalle_jax.pipelines import (
    ClipPipeline,
    DiffusionPipeline,
    DiffusionSamplingConfig,
    GeneratedImage,
    ImageRequest,
    Pipeline,
    ProgressPrinter,
    SamplingConfig,
    TextToImagePipeline,
    load,
    sample_and_rerank,
)

_NO_CAPTION = "(no caption)"
_NUM_IMAGES, _CANDIDATES, _TOP = 4, 64, 4  # of each caption where the flags are not set


class _Subject(NamedTuple):
    """What images are generated of.

    Attributes:
        caption: as `--json` and manifest.jsonl list it.
        label: text under the image in grid.png.
        fields: fields of the ImageRequest.
    """

    caption: str
    label: str
    fields: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SampleArgs:
    """Sample images for captions: one PNG file each, and all of them with their captions in grid.png. The other flags
    depend on the model of RUN: `dalle-jax sample RUN --help` lists them.

    File c000_s0007.png is caption 0 with seed 7; it depends on that caption and seed alone. manifest.jsonl lists
    the finished images; with --captions-file, re-running the command resumes."""

    run: Positional[RunPath]
    """directory of a trained Transformer or diffusion model"""
    captions: Positional[Annotated[tuple[str, ...], arg(metavar="CAPTION ...")]] = ()
    """captions; "" samples without one"""
    out: str | None = None
    """directory for the images; one that has images of another job is refused. None is samples, or the first of
    samples-2, samples-3, ... without images of another job"""
    overwrite: bool = False
    """delete the images in --out, or in samples, first, those of this job too"""
    num_images: int | None = None
    """images per caption, with the seeds SEED, SEED + 1, ...; None is 4"""
    seed: int = 0
    """of the first image of each caption"""
    guidance_scale: float = 1.0
    """scale of classifier-free guidance; 1 turns it off, larger values follow the caption more closely"""
    captions_file: str | None = None
    """more captions, one per line, UTF-8; empty lines are skipped. A file that ends in .jsonl has one object per line:
    caption, and seed, temperature, top_p, guidance_scale where they differ from the flags"""
    unconditional: bool = False
    """sample without a caption"""
    batch_size: int = 8
    """images computed at once"""
    clip: str | None = None
    """directory of a trained CLIP: sample --candidates images of each caption and keep the --top that fit it best, in
    place of --num-images. With --captions-file the job then does not resume"""
    candidates: int | None = None
    """with --clip: images sampled for each caption; None is 64"""
    top: int | None = None
    """with --clip: images kept of each caption, best first; None is 4"""
    json: JsonFlag = False

    progress_name: ClassVar[str] = "images"

    def check(self) -> None:
        """Check the flags by themselves. Raises ValueError for values or combinations that are not allowed."""
        if self.num_images is not None and self.num_images < 1:
            raise ValueError(f"Expected --num-images of at least 1, got {self.num_images}.")
        if self.clip is None and (self.candidates is not None or self.top is not None):
            raise ValueError(
                "Expected --clip with --candidates and --top, got none. Set it to the run of a CLIP, or use "
                "--num-images."
            )
        if self.clip is not None and self.num_images is not None:
            raise ValueError("Expected no --num-images with --clip, got one. Use --top.")
        if self.candidates is not None and self.candidates < 1:
            raise ValueError(f"Expected --candidates of at least 1, got {self.candidates}.")

    def sampling_config(self) -> Any:
        """Return the configuration of the call; None for a model that generates no images."""
        return None

    def load(self) -> Pipeline:
        """Load the model of RUN."""
        return load(self.run)

    def subjects(self, pipeline: Any, lines: list[CaptionLine]) -> list[_Subject]:
        """Return what is sampled. Raises ValueError for no caption."""
        if not lines:
            raise ValueError(
                'Expected one caption or more, got none. Use e.g. "a red circle", or --unconditional to sample without.'
            )
        return [
            _Subject(line.caption, line.caption or _NO_CAPTION, {"prompt": line.caption, **line.settings})
            for line in lines
        ]

    @property
    def shows_previews(self) -> bool:
        """Whether grid.png is updated while images are sampled."""
        return False

    def load_decoder(self, pipeline: Any) -> DiffusionPipeline | None:
        """Load the diffusion model that replaces the pixels; None for none."""
        return None

    def decoder_config(self) -> DiffusionSamplingConfig:
        """Return the configuration of the decoder."""
        return DiffusionSamplingConfig()

    def job(self, pipeline: Any, config: Any, requests: list[ImageRequest]) -> dict[str, Any]:
        """Return the settings that the calls of one job share, beside those of the images."""
        return {}

    def results(self, config: Any, generated: list[GeneratedImage], out: Path) -> dict[str, Any]:
        """Write what else the model gives, and return it for `--json`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class TransformerSampleArgs(SampleArgs, DenoisingArgs):
    """Sample images for captions with a Transformer: one PNG file each, and all of them with their captions in
    grid.png.

    File c000_s0007.png is caption 0 with seed 7; it depends on that caption and seed alone. codes.npz holds the codes
    of all images, for `decode`. manifest.jsonl lists the finished images; with --captions-file, re-running the command
    resumes."""

    temperature: float = 1.0
    """lower values give less varied images; 0 takes the most probable code"""
    top_k: int | None = None
    """sample among this many most probable codes; None is all"""
    top_p: float | None = None
    """sample among the most probable codes with this probability together; None is all"""
    prefix: str | None = None
    """image whose top rows each sampled image starts with; of the model's size"""
    prefix_rows: int | None = None
    """rows of codes taken from --prefix; None is half of them"""
    draft_len: int | None = None
    """speculative decoding: codes per pass of the network. The images are the same, in fewer and larger passes
    (docs/sampling.md); None is one"""
    quantization: Quantization | None = None
    """8-bit matrices: int8 and fp8 store weights in 8 bits, w8a8 also rounds activations"""
    preview_rows: int | None = None
    """update grid.png after every so many rows of codes, gray where nothing is sampled yet; without --captions-file
    and --clip"""
    decoder: str | None = None
    """run of a diffusion model on the tokenizer's codes, which generates the pixels; the flags of its sampler are
    --num-steps, --sampler, --spacing, --eta and --threshold"""

    def check(self) -> None:
        super().check()
        if self.preview_rows is not None and self.preview_rows < 1:
            raise ValueError(f"Expected --preview-rows of at least 1, got {self.preview_rows}.")
        if self.preview_rows is not None and (self.captions_file or self.clip):
            raise ValueError(
                "Expected --preview-rows without --captions-file and --clip, got one of them. Remove it."
            )
        if self.decoder is None and (flags := self.set_denoising_flags()):
            raise ValueError(
                f"Expected --decoder with {', '.join(flags)}, got none. Set --decoder or remove the others."
            )
        if self.decoder is not None and (self.clip is not None or self.captions_file is not None):
            raise ValueError(
                "Expected --decoder without --clip and --captions-file, got one of them. Use captions on the command "
                "line."
            )
        if self.prefix_rows is not None and self.prefix is None:
            raise ValueError("Expected --prefix IMAGE with --prefix-rows, got none. Set it.")

    def sampling_config(self) -> SamplingConfig:
        return SamplingConfig(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            guidance_scale=self.guidance_scale,
            draft_len=self.draft_len,
            quantization=self.quantization,
            preview_rows=self.preview_rows or 1,
        )

    def load(self) -> TextToImagePipeline:
        return load(self.run, TextToImagePipeline, params_on_host=True)

    def subjects(self, pipeline: TextToImagePipeline, lines: list[CaptionLine]) -> list[_Subject]:
        subjects = super().subjects(pipeline, lines)
        prefix = None if self.prefix is None else self._prefix_codes(pipeline)
        return [subject._replace(fields={**subject.fields, "prefix_codes": prefix}) for subject in subjects]

    def _prefix_codes(self, pipeline: TextToImagePipeline) -> np.ndarray:
        """Codes of the top rows of --prefix, int32 (rows * grid,)."""
        assert self.prefix is not None
        grid = pipeline.tokenizer.config.grid
        rows = grid // 2 if self.prefix_rows is None else self.prefix_rows
        if not 1 <= rows < grid:
            raise ValueError(f"Expected --prefix-rows in [1, {grid}), the rows of codes, got {rows}.")
        image = _load_exact(self.prefix, pipeline.image_size, "--prefix")
        return pipeline.tokenizer.encode(image[None])[0, : rows * grid]

    def load_decoder(self, pipeline: TextToImagePipeline) -> DiffusionPipeline | None:
        if self.decoder is None:
            return None
        decoder = load(self.decoder, DiffusionPipeline)
        decoder.check_tokenizer(pipeline.tokenizer)
        return decoder

    def decoder_config(self) -> DiffusionSamplingConfig:
        return self.denoising_config()

    @property
    def shows_previews(self) -> bool:
        return self.preview_rows is not None

    def job(
        self, pipeline: TextToImagePipeline, config: SamplingConfig, requests: list[ImageRequest]
    ) -> dict[str, Any]:
        prefix = requests[0].prefix_codes
        decoder = {} if self.decoder is None else {"decoder": [self.decoder, repr(self.decoder_config())]}
        return {
            **decoder,
            "tokenizer": pipeline.tokenizer.fingerprint,
            "top_k": config.top_k,
            "quantization": config.quantization,
            "prefix": None if prefix is None else hashlib.sha256(prefix.tobytes()).hexdigest(),
        }

    def results(self, config: SamplingConfig, generated: list[GeneratedImage], out: Path) -> dict[str, Any]:
        rate = generated[-1].codes_per_pass if generated else None
        if rate is None:
            return {}
        print(f"{rate:.2f} codes per pass")
        return {"codes_per_pass": rate}


@dataclass(frozen=True, kw_only=True)
class DiffusionSampleArgs(SampleArgs, DenoisingArgs):
    """Sample images with a diffusion model, for captions, classes, from a small image, from an image or from noise: one
    PNG file each, and all of them with their captions in grid.png.

    File c000_s0007.png is caption 0 with seed 7; it depends on that caption and seed alone. manifest.jsonl lists
    the finished images; with --captions-file, re-running the command resumes."""

    guidance_interval: tuple[float, float] | None = None
    """guidance applies only between these two times; 1 is noise, 0 is the image"""
    image: str | None = None
    """image to start from, with --strength or --mask; of the model's size"""
    strength: float | None = None
    """amount of noise added to --image before denoising, in (0, 1]"""
    mask: str | None = None
    """image of --image's size: white is sampled, black is kept"""
    label: tuple[int, ...] = ()
    """numbers of the classes to sample, for a model of classes"""
    low_res: str | None = None
    """small image, for a model that enlarges one"""
    filmstrip: int | None = None
    """also write filmstrip.png, with this many denoised images of each image on its way; without --captions-file"""

    progress_name: ClassVar[str] = "denoising steps"

    def check(self) -> None:
        super().check()
        if self.filmstrip is not None and self.captions_file is not None and self.clip is None:
            raise ValueError(
                f"Expected --filmstrip without --captions-file, got --filmstrip {self.filmstrip}. "
                "Use captions on the command line."
            )
        if self.label and self.unconditional:
            raise ValueError("Expected --label or --unconditional, got both. Use one of them.")

    def sampling_config(self) -> DiffusionSamplingConfig:
        options: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        if self.guidance_interval is not None:
            options["guidance_interval"] = self.guidance_interval
        config = self.denoising_config(**options)
        if self.filmstrip is None:
            return config
        if not 1 <= self.filmstrip <= config.num_steps:
            raise ValueError(
                f"Expected --filmstrip in [1, {config.num_steps}], the number of steps, got {self.filmstrip}."
            )
        return dataclasses.replace(config, num_frames=self.filmstrip)

    def load(self) -> DiffusionPipeline:
        return load(self.run, DiffusionPipeline)

    def subjects(self, pipeline: DiffusionPipeline, lines: list[CaptionLine]) -> list[_Subject]:
        cfg = pipeline.config
        if cfg.codes is not None:
            raise ValueError(
                f"Expected a diffusion model that samples without codes, got {self.run}, which generates the pixels of "
                f"codes. Use `dalle-jax decode {self.run} CODES.npz`, or `dalle-jax sample RUN_OF_A_TRANSFORMER ... "
                f"--decoder {self.run}`."
            )
        if self.label and not cfg.num_classes:
            raise ValueError("Expected no --label for a model without classes, got one. Remove it.")
        if cfg.text is None and any(line.caption for line in lines):
            hint = "Use --label instead." if cfg.num_classes else "Remove them."
            raise ValueError(f"Expected no captions for {self.run}, a model without text, got some. {hint}")
        fields = self._image_fields(pipeline)
        if cfg.text is not None:
            subjects = super().subjects(pipeline, lines)
            if cfg.num_classes:
                labels = self._labels(cfg.num_classes)
                if len(labels) not in (1, len(lines)):
                    raise ValueError(
                        f"Expected one label, or one for each of {len(lines)} captions, got {len(labels)}."
                    )
                labels = labels * len(lines) if len(labels) == 1 else labels
                subjects = [
                    subject._replace(fields={**subject.fields, "label": label})
                    for subject, label in zip(subjects, labels, strict=True)
                ]
        elif cfg.num_classes:
            names = {
                label: "(no class)" if label is None else f"class {label}"
                for label in self._labels(cfg.num_classes)
            }
            subjects = [_Subject(names[i], names[i], {"label": i}) for i in self._labels(cfg.num_classes)]
        else:
            subjects = [_Subject("", "", {})]
        return [subject._replace(fields={**subject.fields, **fields}) for subject in subjects]

    def _labels(self, num_classes: int) -> list[int | None]:
        labels: list[int | None] = list(self.label) or ([None] if self.unconditional else [])
        if not labels:
            raise ValueError(
                f"Expected --label in [0, {num_classes}), got none. Set it, or use --unconditional to sample without."
            )
        return labels

    def _image_fields(self, pipeline: DiffusionPipeline) -> dict[str, Any]:
        """The fields of all requests that are read from image files."""
        fields: dict[str, Any] = {"strength": self.strength}
        size, low_res_size = pipeline.image_size, pipeline.config.low_res_size
        if self.low_res is not None and not low_res_size:
            raise ValueError(
                "Expected no --low-res for a model that enlarges no small image, got one. Remove it."
            )
        if self.low_res is None and low_res_size:
            raise ValueError(
                f"Expected --low-res for a model that enlarges an image of {low_res_size} x {low_res_size}, got none. "
                "Use --low-res IMAGE."
            )
        if self.low_res is not None:
            fields["low_res"] = images.load_image(self.low_res, low_res_size)
        if self.image is not None:
            fields["image"] = _load_exact(self.image, size, "--image")
        if self.mask is not None:
            kept = _load_exact(self.mask, size, "--mask").mean(axis=2) < 128  # white is sampled
            if kept.all() or not kept.any():
                color = "black" if kept.all() else "white"
                raise ValueError(
                    f"Expected --mask with white, which is sampled, and black, which is kept, got {self.mask}, all "
                    f"{color}."
                )
            fields["mask"] = kept
        return fields

    def job(
        self, pipeline: DiffusionPipeline, config: DiffusionSamplingConfig, requests: list[ImageRequest]
    ) -> dict[str, Any]:
        digest = hashlib.sha256(repr((self.strength, self.label)).encode())
        for array in (requests[0].image, requests[0].mask, requests[0].low_res):
            digest.update(b"" if array is None else array.tobytes())
        return {"denoising": dataclasses.asdict(config), "inputs": digest.hexdigest()}

    def results(
        self, config: DiffusionSamplingConfig, generated: list[GeneratedImage], out: Path
    ) -> dict[str, Any]:
        results: dict[str, Any] = {"denoising": dataclasses.asdict(config)}
        frames = [image.frames for image in generated if image.frames is not None]
        if frames:
            film = np.concatenate(frames)
            grid = images.image_grid(film, config.num_frames, scale=max(1, 64 // film.shape[1]))
            images.save_png(out / "filmstrip.png", grid)
            results["filmstrip"] = str(out / "filmstrip.png")
        return results


SAMPLE_FLAGS = {"text-to-image": TransformerSampleArgs, "diffusion": DiffusionSampleArgs}


def run(args: SampleArgs) -> dict[str, Any]:
    """Sample, write and list the images."""
    with contextlib.ExitStack() as stack:
        return _sample(args, stack)


def _sample(args: SampleArgs, stack: contextlib.ExitStack) -> dict[str, Any]:
    args.check()
    lines = _read_lines(args)
    config = args.sampling_config()
    pipeline = args.load()
    ranker = None if args.clip is None else load(args.clip, ClipPipeline)
    decoder = args.load_decoder(pipeline)
    subjects = args.subjects(pipeline, lines)
    num_images = 1 if ranker is not None else args.num_images or _NUM_IMAGES
    items = _requests(args.seed, subjects, num_images)
    dropped = [_warn_truncated(pipeline, i, subject) for i, subject in enumerate(subjects)]
    if ranker is not None:
        for i, subject in enumerate(subjects):
            _warn_truncated(ranker, i, subject, reader="the CLIP")
    requests = [request for _, request in items]
    job_images = [
        sample_file.JobImage(
            _file_name(i, request), subjects[i].caption, subjects[i].label, dropped[i], request
        )
        for i, request in items
    ]
    candidates = _CANDIDATES if args.candidates is None else args.candidates
    top = min(_TOP, candidates) if args.top is None else args.top
    settings = args.job(pipeline, config, requests)
    if ranker is not None:
        settings |= {"clip": args.clip, "clip_step": ranker.run.step, "candidates": candidates, "top": top}
    job = sample_file.describe_job(args.run, pipeline, job_images, config, settings)
    if args.captions_file is not None and ranker is None:
        return sample_file.run_job(
            pipeline,
            job_images,
            config,
            args.out,
            job,
            overwrite=args.overwrite,
            batch_size=args.batch_size,
            columns=num_images if num_images > 1 else 8,
            list_images=args.json,
        )

    finished: list[tuple[int, GeneratedImage]] = []  # with the number of the subject

    def show_preview(unfinished: np.ndarray) -> None:
        pixels = [image.image for _, image in finished] + list(unfinished)
        grid.save(pixels, [subjects[i].label for i, _ in items[: len(pixels)]])

    options = {"batch_size": args.batch_size, "progress": ProgressPrinter(args.progress_name)}
    results: dict[str, Any] = {}
    if ranker is None:
        columns = num_images if len(subjects) > 1 else min(num_images, 8)
        on_preview = show_preview if args.shows_previews else None
        generated = pipeline.sample(requests, config, on_preview=on_preview, **options)
        stream = ((i, image) for (i, _), image in zip(items, generated, strict=True))
    else:
        columns = min(top, 8)
        ranked = sample_and_rerank(pipeline, ranker, requests, candidates, top, config, **options)
        stream = ((i, image) for i, best in enumerate(ranked) for image in best)
        results = {"clip": str(ranker.run.path), "candidates": candidates}
    # After the checks of the requests, before anything is computed.
    manifest = sample_file.open_manifest(args.out, job, overwrite=args.overwrite, resume=False)
    stack.callback(manifest.close)
    out = manifest.path.parent
    grid = output.LabeledGrid(out / "grid.png", columns)
    for i, image in stream:
        if not finished:
            print_first_image()
        if decoder is None:
            images.save_png(out / _file_name(i, image.request), image.image)
        finished.append((i, image))
    if decoder is not None:
        finished = _decode(args, decoder, finished)
        for i, image in finished:
            images.save_png(out / _file_name(i, image.request), image.image)
    names = [_file_name(i, image.request) for i, image in finished]
    labels = [
        subjects[i].label if image.score is None else f"{image.score:.3f} {subjects[i].label}"
        for i, image in finished
    ]
    grid.save([image.image for _, image in finished], labels)
    results = {"run": str(pipeline.run.path), "step": pipeline.run.step, "grid": str(grid.path)} | results
    codes = [image.codes for _, image in finished if image.codes is not None]
    if codes and pipeline.tokenizer is not None:
        fingerprint = np.array(pipeline.tokenizer.fingerprint)
        write_npz(out / "codes.npz", codes=np.stack(codes), names=np.array(names), tokenizer=fingerprint)
        results["codes"] = str(out / "codes.npz")
    print(f"{len(names)} images in {out}, all with their captions in {grid.path}")
    results |= args.results(config, [image for _, image in finished], out)
    rows: list[dict[str, Any]] = []
    for name, (i, image) in zip(names, finished, strict=True):
        row = {"file": name, "caption": subjects[i].caption, "seed": image.request.seed}
        score = {} if image.score is None else {"score": image.score}
        settings = sample_file.image_settings(image.request, config)
        rows.append({**row, **score, **settings, "tokens_cut": dropped[i]})
    manifest.add(rows)
    return {**results, "images": [{**row, "file": str(out / row["file"])} for row in rows]}


def _read_lines(args: SampleArgs) -> list[CaptionLine]:
    lines = [CaptionLine(caption, {}) for caption in args.captions]
    if args.captions_file is not None:
        lines += sample_file.read_captions_file(args.captions_file)
    if args.unconditional and lines:
        raise ValueError("Expected captions or --unconditional, got both. Use one of them.")
    return [CaptionLine("", {})] if args.unconditional else lines


def _requests(seed: int, subjects: list[_Subject], count: int) -> list[tuple[int, ImageRequest]]:
    """`count` requests of each subject, with its number."""
    requests = []
    for i, subject in enumerate(subjects):
        first = subject.fields.get("seed", seed)
        try:
            requests += [(i, ImageRequest(**{**subject.fields, "seed": first + k})) for k in range(count)]
        except ValueError as error:
            raise ValueError(f"caption {i} ({subject.caption!r:.60}): {error}") from None
    return requests


def _file_name(number: int, request: ImageRequest) -> str:
    return f"c{number:03d}_s{request.seed:04d}.png"


def _decode(
    args: SampleArgs, decoder: DiffusionPipeline, finished: list[tuple[int, GeneratedImage]]
) -> list[tuple[int, GeneratedImage]]:
    """The same codes with the pixels of a diffusion model."""
    requests = [ImageRequest(seed=image.request.seed, codes=image.codes) for _, image in finished]
    decoded = decoder.sample(
        requests,
        args.decoder_config(),
        batch_size=args.batch_size,
        progress=ProgressPrinter("denoising steps"),
    )
    return [
        (i, image._replace(image=pixels.image)) for (i, image), pixels in zip(finished, decoded, strict=True)
    ]


def _warn_truncated(pipeline: Pipeline, number: int, subject: _Subject, reader: str = "the model") -> int:
    """Tokens of a caption that the model does not read; more than 0 are reported on standard error."""
    dropped = pipeline.num_dropped_tokens(subject.fields.get("prompt", ""))
    if dropped:
        print(
            f"warning: caption {number} is too long for {reader}: its last {dropped} tokens are dropped "
            f"({subject.caption!r:.60})",
            file=sys.stderr,
        )
    return dropped


def _load_exact(path: str, size: int, flag: str) -> np.ndarray:
    """The image in a file, uint8 (size, size, 3). Raises ValueError for another size."""
    image = images.load_image(path, size)
    with Image.open(path) as header:
        width, height = header.size
    if (width, height) != (size, size):
        raise ValueError(
            f"Expected {flag} of {size} x {size} pixels, as this model's images, got {path} of {width} x {height}. "
            "Crop and resize it."
        )
    return image
