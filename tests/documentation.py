"""The commands and code of README.md and docs/, and a directory in which they run at tiny sizes.

A command in a `sh` block runs with the changes listed in this file and no others:
`TINY` flags make models and batches small, `WORDS` replaces what a reader fills in, `NOT_RUN` lists the commands
that need hardware, downloads or a cloud. The directory has `configs/`, data and trained runs under the names that
the pages use.
"""

import io
import json
import re
import shlex
import shutil
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from dalle_jax.checkpoint.layout import PARAMS_FILE
from dalle_jax.checkpoint.params_file import write_params
from dalle_jax.cli import main
from dalle_jax.config import TrainConfig, VectorQuantizer, VQGANConfig, to_json
from dalle_jax.config.files import load_config
from dalle_jax.evaluate import classifier, inception
from dalle_jax.models import lpips, tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(r"(?:[A-Z_]+=\S+ )*(?:dalle-jax|python train\.py|train\.py) ")
ENVIRONMENT = re.compile(r"^(?:[A-Z_]+=\S+ )+")

# Commands that are parsed and not run: (pattern, reason).
NOT_RUN = (
    (r"--compile-only (v5|h200)", "needs the TPU or GPU compiler; tests/aot has tests with -m libtpu and -m cuda"),
    (r"info .*--device", "needs the GPU compiler"),
    (r"gs://", "needs a bucket; tests/checkpoint/test_remote_dir.py uses an emulator"),
    (r"--distributed\.|/shared/", "starts one of several processes; tests/parallel starts them all"),
    (r" \.\.\. ", "an outline"),
    (r"configs/dalle_12b", "needs a pod; its shapes are tested"),
)  # fmt: skip

# Flags that are appended to a command: to all trainings, by the kind of model, and by command.
TRAIN = "--steps 2 --eval-every 2 --save-every 2 --sample-every 2 --log-every 1 --eval-rows 8 --data.num-threads 1 "
TRAIN += "--data.batch-size 8 --data.prefetch 1 --optim.warmup-steps 1"
TINY = {
    "DVAEConfig": "--model.width 8 --model.decoder-width 8 --model.blocks 1 --model.dtype float32",
    "VQGANConfig": "--model.image-size 32 --model.width 16 --model.channel-multipliers 1 1 --model.blocks 1 "
    "--model.attention-levels 1 --model.latent-width 16 --model.adversarial.width 8 --model.dtype float32",
    "DalleConfig": "--model.dim 16 --model.layers 1 --model.heads 2 --model.scan-unroll 1 --model.remat none "
    "--model.text-vocab 512 --model.dtype float32 --text.num-train-captions 100",
    "ClipConfig": "--model.vision.dim 16 --model.vision.layers 1 --model.vision.heads 2 --model.text.dim 16 "
    "--model.text.layers 1 --model.text.heads 2 --model.embed-dim 8 --model.scan-unroll 1 "
    "--text.num-train-captions 100",
    "DiffusionConfig": "--model.width 8 --model.channel-multipliers 1 --model.blocks 1 --model.attention-sizes "
    "--model.patch-size 4 --model.dtype float32",
}
FLAGS = {
    "demo": "--out runs/command --tokenizer-steps 2 --transformer-steps 2 --count 2",
    "evaluate": "--count 8",
    "text": "--vocab 300",
}

# Numbers of a command that are made smaller: (pattern, replacement).
SMALLER = (
    (r"--candidates \d+", "--candidates 4"),
    (r"--num-steps \d+", "--num-steps 2"),
    (r"--rows \d+", "--rows 16"),
    (r"--filmstrip \d+", "--filmstrip 2"),
    (r"--bits-per-dim \d+", "--bits-per-dim 2"),
    (r"(--guidance-scale \S+) [\d. ]+(?= |$)", r"\1"),  # one scale of a curve
    (r"--image-size (256|384|512)", "--image-size 64"),
)

# Words that a reader replaces, and the class of an import whose tiny model has few classes.
WORDS = {"PATH": "mine", "RUN": "runs/dalle", "N": "2", "I": "1", "207": "3"}

# Published files: small files of the same format in tests/golden, made by the reference implementations.
PUBLISHED = {
    "dall-e": "openai_dvae",
    "last.ckpt": "taming_vqgan/model.ckpt",
    "vqgan.gumbelf8-sber.model.ckpt": "taming_gumbel/model.ckpt",
    "pytorch_model_v3.bin": "rudalle/pytorch_model_v3.bin",
    "bpe.model": "rudalle/bpe.model",
    "1.3B": "mindalle",
    "vqgan_imagenet_f16_16384": "flax_vqgan",
    "dalle-mini": "dalle_mini",
    "vq_ds16_c2i.pt": "llamagen_vq/vq.pt",
    "vq_ds16_t2i.pt": "llamagen_vq/vq.pt",
    "c2i_XL_384.pt": "llamagen/c2i_tiny_64.pt",
    "t2i_XL_stage2_512.pt": "llamagen_t2i/t2i_tiny_64.pt",
    "flan-t5-xl": "llamagen_t2i/flan-t5",
}

# The golden tokenizers have other numbers of codes than the golden Transformers, so these runs, once imported,
# are replaced by random tokenizers: (number of codes, side of the grid).
RANDOM_TOKENIZERS = {
    "runs/sber": (12, 12),
    "runs/f16": (20, 16),
    "runs/vq384": (24, 4),
    "runs/vq512": (24, 4),
}


def fences(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in a language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)


def split_lines(script: str) -> list[str]:
    """Return the single commands of shell text, with variables replaced by their values."""
    variables: dict[str, str] = {}
    text = re.sub(r"\s*\\\n\s*", " ", script)
    commands = []
    for line in text.splitlines():
        if match := re.fullmatch(r'\s*(\w+)="([^"]*)"\s*', line):
            variables[match[1]] = match[2]
            continue
        line = re.sub(r"\$(\w+)", lambda m: variables.get(m[1], m[0]), line.strip())
        commands += [part.strip() for part in re.split(r" && | \| | ; ", line)]
    return [command for command in commands if command]


def block_commands(page: Path) -> list[str]:
    """Return the commands of this project in the shell blocks of a page, in order."""
    return [c for block in fences(page, "sh") for c in split_lines(block) if OURS.match(c)]


def inline_commands(page: Path) -> list[str]:
    """Return the inline code that begins with a command of this project."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).replace("\n", " ")
    codes = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
    return [code for code in codes if OURS.match(code)]


def split_words(command: str) -> list[str]:
    """Return the arguments of `dalle-jax` for a command line, `train.py` as its command `train`."""
    command = re.sub(r"^(python )?train\.py", "dalle-jax train", ENVIRONMENT.sub("", command))
    words = shlex.split(re.sub(r"[\[\]]", "", command), comments=True)[1:]
    end = next((i for i, word in enumerate(words) if word in ("&", ";", ">")), len(words))
    return [WORDS.get(word, word) for word in words[:end]]


def reason_not_run(command: str) -> str | None:
    """Return why a command is only parsed, or None if it runs."""
    return next((reason for pattern, reason in NOT_RUN if re.search(pattern, f"{command} ")), None)


def shrink(words: list[str]) -> list[str]:
    """Return the arguments with the changes that make a command small."""
    command, *rest = words
    if command == "import" and rest[0] == "llamagen":
        rest += ["--heads", "2"]  # the golden models have heads of another width than the published ones
    text = shlex.join(rest)
    for pattern, smaller in SMALLER:
        text = re.sub(pattern, smaller, text)
    rest = shlex.split(text)
    rest = [
        name for word in rest for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    if command != "train":
        return [command, *rest, *FLAGS.get(command, "").split()]
    if "--compile-only" in rest:
        return [command, *rest]
    config = load_config(rest[0])
    flags = TRAIN if "--init-from" in rest else f"{TRAIN} {TINY[type(config.model).__name__]}"
    if getattr(config.model, "text", None) is not None and type(config.model).__name__ == "DiffusionConfig":
        flags += (
            " --model.text.dim 8 --model.text.layers 1 --model.text.heads 2 --text.num-train-captions 100"
        )
    if "--init-from" in rest:
        flags += " --data.source.eval-fraction 0.2"
    if config.data.source.kind == "scenes" and "--data.path" not in rest:
        flags += " --data.source.count 64"
    shutil.rmtree(run_of(rest, config), ignore_errors=True)  # a training starts even if the run exists
    return [command, *rest, *flags.split()]


def run_of(words: list[str], config) -> Path:
    """Return the run directory that a training writes."""
    return Path(words[words.index("--run") + 1] if "--run" in words else config.run)


def run_command(words: list[str]) -> str:
    """Run `dalle-jax` in this process and return its output; fails if its exit code is not 0."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main(words)
    assert code == 0, f"dalle-jax {shlex.join(words)}: exit code {code}\n{out.getvalue()[-3000:]}"
    if words[0] == "import" and words[-1] in RANDOM_TOKENIZERS:
        random_tokenizer(Path(words[-1]), *RANDOM_TOKENIZERS[words[-1]])
    return out.getvalue()


def random_tokenizer(run: Path, vocab: int, grid: int) -> None:
    """Replace a run by a VQGAN with random weights."""
    levels = 2 if grid > 15 else 3
    config = VQGANConfig(
        image_size=grid * 2 ** (levels - 1), width=4, channel_multipliers=(1,) * levels, blocks=1,
        attention_levels=(), latent_width=4, quantizer=VectorQuantizer(vocab=vocab, dim=2), adversarial=None,
    )  # fmt: skip
    (run / "config.json").write_text(to_json(TrainConfig(model=config)))
    write_params(run / PARAMS_FILE, tokenizer.init(config, jax.random.key(0)), 0)


def save_image(path: Path, seed: int, side: int = 32) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).resize((side, side), Image.Resampling.NEAREST).save(path)


def random_arrays(shapes: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: np.abs(x) + 0.5 if "var" in name else 0.05 * x for name, x in arrays.items()}


def write_data(site: Path) -> None:
    """Write the data, images and weight files that the pages name, all of them generated."""
    (site / "configs").symlink_to(ROOT / "configs")
    for name, golden in PUBLISHED.items():
        (site / name).symlink_to(ROOT / "tests" / "golden" / golden)
    for i in range(16):
        save_image(site / "mine" / f"fox_{i:02}.png", i, 40)
        (site / "mine" / f"fox_{i:02}.txt").write_text(f"a red fox in the snow, number {i}")
    for name, seed, side in (
        ("photo.jpg", 1, 64),
        ("in.png", 2, 32),
        ("mask.png", 3, 32),
        ("small.png", 4, 16),
    ):
        save_image(site / name, seed, side)
    for name in ("emoji-64.tar", "shards/000.tar"):
        (site / name).parent.mkdir(exist_ok=True)
        with tarfile.open(site / name, "w") as tar:
            for i, file in enumerate(sorted((site / "mine").glob("*.png"))):
                tar.add(file, file.name)
                about = {
                    "captions": ["a red fox"],
                    "captions_zh": ["红色的狐狸"],
                    "split": "train" if i % 4 else "val",
                }
                member = tarfile.TarInfo(f"{file.stem}.json")
                member.size = len(data := json.dumps(about).encode())
                tar.addfile(member, io.BytesIO(data))
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 64), ("test", 32)):
        arrays[f"{split}_x"] = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        arrays[f"{split}_y"] = np.arange(count) % 10
    np.savez(site / "cifar10.npz", **arrays)
    np.savez(site / "resnet20_cifar10.npz", **random_arrays(classifier.resnet_param_shapes(3, 16, 10)))
    np.savez(site / "inception.npz", **random_arrays(inception.inception_param_shapes()))
    layers = enumerate(lpips._ALEXNET)
    shapes = {f"AlexNet_0.Conv_{i}.kernel": (k, k, a, b) for i, (k, a, b, *_) in layers}
    shapes |= {name.replace("kernel", "bias"): shape[-1:] for name, shape in shapes.items()}
    shapes |= {
        f"NetLinLayer_{i}.Conv_0.kernel": (1, 1, layer[2], 1) for i, layer in enumerate(lpips._ALEXNET)
    }
    np.savez(site / "lpips_vgg16.npz", **random_arrays(shapes))


def train_runs(site: Path) -> None:
    """Train the runs that several pages use, by the commands of the README with the flags above."""
    for line in (
        "train configs/demo_dvae.py --run runs/demo/dvae",
        "train configs/demo_dalle.py --run runs/demo/dalle --image-tokenizer runs/demo/dvae",
        "train configs/demo_clip.py",
        "train configs/demo_diffusion.py",
    ):
        run_command(shrink(line.split()))
    for name in ("dvae", "dalle"):
        shutil.copytree(site / "runs/demo" / name, site / "runs" / name)
