"""The flags of every verb, as dataclasses that tyro reads; their docstrings are the help. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from dalle_jax.config import Quantization, SamplerName, Spacing
from dalle_jax.importers.families import FAMILIES

Runs = Annotated[str, arg(metavar="RUN")]
_FAMILIES = "; ".join(f"{name}: {about}" for name, (_, about) in FAMILIES.items())
Json = Annotated[bool, arg(help="print one JSON object to standard output, all else to standard error")]


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Trains a tokenizer and a Transformer on procedural scenes, draws pictures for captions, of pairs of
    colour and shape that training showed and that it never did, and measures how many are right. The same
    command again goes on where it stopped."""

    out: str = "runs/demo"
    """directory for the two runs, the pictures and results.json"""
    seed: int = 0
    """of the data's order, the parameters and the samples"""
    count: int = 200
    """captions of each kind that are drawn and verified"""
    tokenizer_steps: int | None = None
    """updates of the tokenizer; None is the demo's own number"""
    transformer_steps: int | None = None
    """updates of the Transformer; None is the demo's own number"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Data:
    """Tells what a folder of pictures, tar files, an npz file or a TFDS directory holds: rows of each split,
    captions, classes, and records that cannot be used, by cause. Every picture is decoded. Of a configuration or a
    run it is the data that it trains on, mixtures too.

    With --convert-to tfds it also builds a TFDS data set in array_record format, the same rows in the same order,
    without what cannot be used; no network and no TensorFlow."""

    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """folder, tar files (commas, globs), npz file, TFDS directory or name; or a configuration file or run"""
    convert_to: Literal["tfds"] | None = None
    """format to build"""
    out: str | None = None
    """directory of the data set that is built, new or empty"""
    size: int | None = None
    """with --convert-to: store squares of this side, cropped to the centre; None stores the files as they are"""
    duplicates: str | None = None
    """look for evaluation pictures that training has too; directory for duplicates.jsonl and a grid of pairs"""
    max_bad_fraction: float = 1.0
    """share of unusable records above which to stop"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Text:
    """Trains a byte-pair vocabulary on the captions of a data set, for --text.tokenizer-path of a Transformer.

    Prints tokens per caption and per character in each language, on captions of the evaluation split where
    there is one, and how many captions are longer than --text-len."""

    action: Positional[Annotated[Literal["train"], arg(metavar="train")]]
    """what to do"""
    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """folder, tar files (commas, globs), npz file, TFDS directory or name; or a configuration file or run"""
    out: str
    """file to write"""
    vocab: int = 16_384
    """most pieces, among them 256 bytes"""
    captions: int = 200_000
    """captions to read, from rows spread evenly over the data set"""
    text_len: int = 256
    """tokens that the Transformer will read of a caption"""
    case: bool = False
    """keep upper case"""
    nfkc: bool = True
    """fold compatible forms of a character into one"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draws pictures for captions: one PNG file each, and all of them with their captions in grid.png. RUN is a
    Transformer or a diffusion model; flags that the other one has are refused.

    File c000_s0007.png is caption 0 with seed 7: it depends on that caption and that seed alone, whatever
    else is drawn with it. codes.npz holds the codes of all pictures, for `decode`.

    With --captions-file the pictures go through a queue that keeps all of --batch-size busy, and manifest.jsonl lists
    those that are done: the same command again, after it was killed, draws the rest."""

    run: Positional[Runs]
    """directory of a trained Transformer or diffusion model"""
    captions: Positional[Annotated[tuple[str, ...], arg(metavar="CAPTION ...")]] = ()
    """what to draw; "" draws without a caption"""
    out: str = "samples"
    """directory for the pictures"""
    num_images: int = 4
    """pictures per caption, with the seeds SEED, SEED + 1, ..."""
    seed: int = 0
    """of the first picture of each caption"""
    temperature: float = 1.0
    """lower is safer and less varied; 0 takes the most probable code every time"""
    top_k: int | None = None
    """draw among this many most probable codes; None is all"""
    top_p: float | None = None
    """draw among the most probable codes that share this much of the probability; None is all"""
    guidance_scale: float = 1.0
    """scale of classifier-free guidance: above 1 the caption counts for more; 1 is none"""
    prefix: str | None = None
    """picture whose top rows every drawn picture begins with; of the model's size"""
    prefix_rows: int | None = None
    """rows of codes taken from --prefix; None is half of them"""
    captions_file: str | None = None
    """more captions, one a line, UTF-8; empty lines are skipped. A file that ends in .jsonl has an object a line:
    caption, and where it differs from the flags seed, temperature, top_p, guidance"""
    unconditional: bool = False
    """draw without a caption"""
    batch_size: int = 8
    """pictures drawn at once"""
    draft_len: int | None = None
    """draw this many codes per pass of the network, as far as they turn out right: the same pictures in fewer passes,
    each of more work (docs/sampling.md); None is one"""
    quantization: Quantization | None = None
    """matrices in 8 bits: int8 or fp8 stores weights so, w8a8 also rounds what they are multiplied with"""
    preview_rows: int | None = None
    """write grid.png anew after every so many rows of codes, grey where nothing is drawn yet; neither with a captions
    file nor with --clip"""
    clip: str | None = None
    """directory of a trained CLIP: draw --candidates pictures of each caption and keep the --top that fit it best,
    in place of --num-images"""
    candidates: int | None = None
    """with --clip: pictures drawn for each caption; None is 64"""
    top: int | None = None
    """with --clip: pictures kept of each caption, best first; None is 4"""
    num_steps: int | None = None
    """diffusion: evaluations of the network (heun and pc take two a step); None is 50"""
    sampler: SamplerName | None = None
    """diffusion: how the noise is taken away; None is dpm++2m"""
    spacing: Spacing | None = None
    """diffusion: of the times between noise and picture; None is uniform"""
    eta: float | None = None
    """diffusion, ddim: noise put back in each step; 0 is none, 1 as much as the ancestral sampler"""
    threshold: float | None = None
    """diffusion: quantile that clean pictures are held in on the way, e.g. 0.995; None clips them"""
    guidance_interval: tuple[float, float] | None = None
    """diffusion: guidance only where the time, 1 for noise and 0 for the picture, lies between these two"""
    image: str | None = None
    """diffusion: picture to begin from, with --strength or --mask; of the model's size"""
    strength: float | None = None
    """diffusion: share of the way from --image to pure noise that is gone back before drawing, (0, 1]"""
    mask: str | None = None
    """diffusion: picture of --image's size; what is white is drawn anew, what is black is kept"""
    label: tuple[int, ...] = ()
    """diffusion on classes: numbers of the classes to draw"""
    low_res: str | None = None
    """diffusion on small pictures: the one to make large"""
    filmstrip: int | None = None
    """diffusion: also write filmstrip.png, this many looks of each picture on its way"""
    decoder: str | None = None
    """Transformer: run of a diffusion model on its tokenizer's codes, which draws the pixels"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Rerank:
    """Ranks pictures by how well they fit a caption, best first: the cosine of the vectors that a CLIP gives the
    two. Pictures are cropped to their middle square and resized."""

    run: Positional[Annotated[str, arg(metavar="CLIP_RUN")]]
    """directory of a trained CLIP"""
    caption: Positional[Annotated[str, arg(metavar="CAPTION")]]
    """what the pictures should show"""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...")]]
    """picture files"""
    top: int | None = None
    """list only the best; None lists all"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Encode:
    """Turns pictures into codes: `codes` int32 (pictures, codes) and `names` in one npz file. Pictures are
    cropped to their middle square and resized.

    With --data it encodes a training set with its captions into a directory of array_record shards, for
    `--data.codes` of train.py. The same command again goes on where it stopped. Several
    processes, each with its own --process, share the work."""

    run: Positional[Runs]
    """directory of a trained tokenizer, or of a Transformer, which keeps its own"""
    images: Positional[Annotated[tuple[str, ...], arg(metavar="IMAGE ...")]] = ()
    """picture files"""
    out: str
    """npz file to write; with --data a directory"""
    data: str | None = None
    """configuration file, run, folder, tar files, npz file, TFDS directory or name: its training set is encoded"""
    rows: int | None = None
    """with --data: only the first rows"""
    eval_rows: int = 1024
    """with --data: also the first rows of the evaluation split, so that a run measures itself without pictures; 0 is
    none"""
    shard_rows: int = 16_384
    """with --data: rows of a shard, of which an interruption costs at most one"""
    process: int | None = None
    """with --data: number of this process, from 0; None is its number in a step of Slurm, under Open MPI or on a
    Cloud TPU slice"""
    processes: int | None = None
    """with --data: processes that encode, on one machine or several; process p makes the shards p, p + P, ..."""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Turns codes into pictures: `images` float32 (pictures, height, width, 3) in [0, 1] in an npz file, or a
    directory of PNG files."""

    run: Positional[Runs]
    """directory of a trained tokenizer, of a Transformer, which keeps its own, or of a diffusion model on codes,
    which draws them: picture i with seed SEED + i"""
    codes: Positional[Annotated[str, arg(metavar="CODES.npz")]]
    """npz file with an array `codes`, as `encode` and `sample` write it"""
    out: str
    """where to write: a file that ends in .npz, or else a directory"""
    seed: int = 0
    """diffusion: of the first picture"""
    num_steps: int | None = None
    """diffusion: steps of the sampler; None is 50"""
    sampler: SamplerName | None = None
    """diffusion: how the noise is taken away; None is dpm++2m"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Evaluate:
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

    run: Positional[Runs]
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
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Export:
    """Writes the model of a run as model.safetensors beside its config.json, without the optimizer's state. Every
    verb takes the directory like a run, and so does --init-from; the arrays have the names that `info` lists, with
    dots."""

    run: Positional[Runs]
    """directory of a trained model"""
    out: str
    """directory to write, new or empty"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Import:
    """Makes a run directory of a public checkpoint that is on this disk: `sample`, `encode`, `decode`, `info`,
    `export` and --init-from take it like a run that was trained here. Files are read without torch, and nothing in
    them is run; tensors are checked by name and shape, and nothing is written unless all of them fit."""

    family: Positional[Annotated[str, arg(metavar="FAMILY", help="what the checkpoint is of. " + _FAMILIES)]]
    path: Positional[Annotated[str, arg(metavar="PATH")]]
    """file or directory of the checkpoint, as it was published (docs/import.md)"""
    out: str
    """directory to write, new or empty"""
    image_size: int | None = None
    """side of the pictures of a tokenizer that can take any; None is the published one"""
    pixels: Literal["symmetric", "unit"] | None = None
    """of a VQGAN: what its networks see, [-1, 1] or [0, 1]; None is what the family's own code feeds them"""
    tokenizer: str | None = None
    """run of the image tokenizer that a Transformer was trained on, imported before; where its files hold none"""
    text: str | None = None
    """file of its vocabulary, where that is apart from the checkpoint: bpe.model of rudalle; names of the classes of
    llamagen, one a line; bpe_simple_vocab_16e6.txt.gz of OpenAI's clip"""
    version: Literal["v2", "v3"] | None = None
    """of rudalle, where the file's name does not tell"""
    t5: str | None = None
    """of llamagen's t2i_*.pt: directory of google/flan-t5-xl, whose encoder becomes a part of the model"""
    heads: int | None = None
    """heads of attention, which no tensor tells; None is the published number for the width"""
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Info:
    """Tells the size of a model, without allocating it: parameters in all and by part, their shapes, and the
    memory that training and drawing need for them."""

    target: Positional[Annotated[str, arg(metavar="RUN_OR_CONFIG")]]
    """run directory or configuration file"""
    shapes: bool = False
    """list the shape of every parameter (--json always does)"""
    batch_size: int | None = None
    """pictures drawn at once: adds what that takes, by the compiler, and the largest batch that fits the device"""
    use_cfg: bool = False
    """with --batch-size: drawn with classifier-free guidance"""
    quantization: Quantization | None = None
    """with --batch-size: drawn with the matrices in 8 bits"""
    device: str | None = None
    """with --batch-size: on a device that is not here, named as for train.py --compile-only: h200, v5e:1x1"""
    json: Json = False
