"""`dalle-jax sample` on a tiny Transformer: output files, determinism, resuming, and invalid input."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import GRID, GUIDED, SIZE, VOCAB, json_of, refused, run
from PIL import Image

from dalle_jax.cli import sample_file
from dalle_jax.data import images
from dalle_jax.models import dvae
from dalle_jax.pipelines import ImageRequest, SamplingConfig, TextToImagePipeline, load, loading
from dalle_jax.text.sentencepiece_model import SentencePieceModel

pytestmark = pytest.mark.usefixtures("small_batches")

ENCODE, DECODE = (jax.jit(f, static_argnums=0) for f in (dvae.encode, dvae.decode))


# --- sample -----------------------------------------------------------------------------------------------


def codes_of(out) -> dict:
    with np.load(out / "codes.npz") as file:
        return dict(zip(file["names"].tolist(), file["codes"], strict=True))


def test_sample_writes_each_image_and_a_grid(made, tmp_path):
    result = json_of(
        "sample",
        made.dalle,
        "a red circle",
        "一个红色的圆",
        "--num-images",
        2,
        "--seed",
        5,
        "--out",
        tmp_path,
    )
    assert [(p["caption"], p["seed"]) for p in result["images"]] == [
        ("a red circle", 5), ("a red circle", 6), ("一个红色的圆", 5), ("一个红色的圆", 6),
    ]  # fmt: skip
    assert {p.name for p in tmp_path.iterdir()} == {
        "c000_s0005.png", "c000_s0006.png", "c001_s0005.png", "c001_s0006.png", "grid.png", "codes.npz",
        "manifest.jsonl",
    }  # fmt: skip
    assert Image.open(result["images"][3]["file"]).size == (SIZE, SIZE)
    model = load(made.dalle, TextToImagePipeline)
    codes = codes_of(tmp_path)["c001_s0006.png"]
    want = DECODE(model.tokenizer.config, model.tokenizer.run.params, jnp.asarray(codes)[None])[0]
    np.testing.assert_allclose(
        np.asarray(Image.open(result["images"][3]["file"])) / 255, want, atol=0.51 / 255
    )


def test_an_image_depends_only_on_its_caption_and_seed(made, tmp_path):
    """Sampled alone, and among eleven images of other captions and seeds at another row of another batch."""
    json_of(
        "sample",
        made.dalle,
        "a blue star",
        "--num-images",
        1,
        "--seed",
        2,
        *GUIDED,
        "--out",
        tmp_path / "alone",
    )
    many = ["", "a green heart", "一个红色的圆", "a blue star"]
    json_of("sample", made.dalle, *many, "--num-images", 3, "--seed", 1, *GUIDED, "--out", tmp_path / "many")
    alone, among = codes_of(tmp_path / "alone"), codes_of(tmp_path / "many")
    np.testing.assert_array_equal(alone["c000_s0002.png"], among["c003_s0002.png"])
    assert (tmp_path / "alone" / "c000_s0002.png").read_bytes() == (
        tmp_path / "many" / "c003_s0002.png"
    ).read_bytes()
    assert len({codes.tobytes() for codes in among.values()}) > 4  # 4 captions, 3 seeds


def test_sampling_twice_gives_the_same_files(made, tmp_path):
    for name in ("a", "b"):
        json_of(
            "sample",
            made.dalle,
            "a red cross",
            "--num-images",
            2,
            *GUIDED,
            "--out",
            tmp_path / name,
        )
    for name in ("c000_s0000.png", "c000_s0001.png", "grid.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_previews_do_not_change_the_images(made, tmp_path, monkeypatch):
    """A grid is written after every three rows of codes; its lower part is gray."""
    call = ("sample", made.dalle, "a red cross", "a star", "--num-images", 1, *GUIDED)
    json_of(*call, "--out", tmp_path / "at_once")
    grids, save = [], images.save_png

    def record_grid(path, image):
        if path.name == "grid.png":
            grids.append(np.asarray(image))
        save(path, image)

    monkeypatch.setattr(images, "save_png", record_grid)
    json_of(*call, "--preview-rows", 3, "--out", tmp_path / "previewed")
    for name in ("c000_s0000.png", "c001_s0000.png", "grid.png"):
        assert (tmp_path / "at_once" / name).read_bytes() == (tmp_path / "previewed" / name).read_bytes()
    final = np.asarray(Image.open(tmp_path / "previewed" / "grid.png").convert("RGB"))
    scale, gray = 128 // SIZE, np.array([128, 128, 128])
    assert len(grids) == 4  # after 3 and 6 rows, after all 8, and with the final images
    for grid, rows in zip(grids, (3, 6), strict=False):
        first = grid[grid.shape[0] - final.shape[0] :][4 : 4 + SIZE * scale, 8:100]
        edge = rows * (SIZE // GRID) * scale
        assert (first[edge + 4 :] == gray).all() and (first[: edge - 4] != gray).any()
    np.testing.assert_array_equal(grids[-1], final)
    grids.clear()
    result = json_of(*call, "--preview-rows", 3, "--draft-len", 6, "--out", tmp_path / "faster")
    for name in ("c000_s0000.png", "c001_s0000.png", "grid.png"):
        assert (tmp_path / "at_once" / name).read_bytes() == (tmp_path / "faster" / name).read_bytes()
    assert len(grids) in (3, 4) and 1 <= result["codes_per_pass"] <= 6


def test_drafts_give_equal_codes_and_int8_mostly_equal_codes(made, tmp_path):
    call = ("sample", made.dalle, "a red cross", "--num-images", 2, "--temperature", 0.5, *GUIDED)
    plain = json_of(*call, "--out", tmp_path / "plain")
    faster = json_of(*call, "--draft-len", 6, "--out", tmp_path / "faster")
    assert "codes_per_pass" not in plain and 1 <= faster["codes_per_pass"] <= 6
    want = codes_of(tmp_path / "plain")
    for name, codes in codes_of(tmp_path / "faster").items():
        np.testing.assert_array_equal(codes, want[name])
    json_of(*call, "--draft-len", 6, "--quantization", "int8", "--out", tmp_path / "small")
    small = codes_of(tmp_path / "small")
    same = np.mean([small[name] == want[name] for name in want])
    assert same > 0.5  # 32 codes in the vocabulary: unrelated images agree in a thirtieth


def test_guidance_1_equals_no_guidance_and_top_k_1_is_greedy(made, tmp_path):
    calls = {
        "plain": (), "one": ("--guidance-scale", 1), "two": GUIDED,
        "greedy": ("--temperature", 0), "k": ("--top-k", 1), "p": ("--top-p", 1e-6),
    }  # fmt: skip
    sampled_codes = {}
    for name, flags in calls.items():
        json_of("sample", made.dalle, "a red cross", "--num-images", 1, *flags, "--out", tmp_path / name)
        sampled_codes[name] = codes_of(tmp_path / name)["c000_s0000.png"]
    np.testing.assert_array_equal(sampled_codes["plain"], sampled_codes["one"])
    np.testing.assert_array_equal(sampled_codes["greedy"], sampled_codes["k"])
    np.testing.assert_array_equal(sampled_codes["greedy"], sampled_codes["p"])
    assert (sampled_codes["plain"] != sampled_codes["two"]).any() and (
        sampled_codes["plain"] != sampled_codes["greedy"]
    ).any()


@pytest.mark.parametrize("rows", [None, 3])
def test_images_begin_with_the_prefix_rows(made, image_files, tmp_path, rows):
    flags = () if rows is None else ("--prefix-rows", rows)
    json_of("encode", made.dvae, image_files[0], "--out", tmp_path / "codes.npz")
    want = np.load(tmp_path / "codes.npz")["codes"][0]
    flags = (*GUIDED, "--prefix", image_files[0], *flags)
    json_of("sample", made.dalle, "", "a star", "--num-images", 2, *flags, "--out", tmp_path / "s")
    prefix_len = (rows or GRID // 2) * GRID
    for codes in codes_of(tmp_path / "s").values():
        np.testing.assert_array_equal(codes[:prefix_len], want[:prefix_len])
    assert len({codes[prefix_len:].tobytes() for codes in codes_of(tmp_path / "s").values()}) > 1


def test_captions_come_from_the_command_line_and_a_file(made, tmp_path):
    (tmp_path / "captions.txt").write_text("\ufeffa red circle\n\n  一个蓝色的星 \n", encoding="utf-8")
    result = json_of(
        "sample",
        made.dalle,
        "a cross",
        "--captions-file",
        tmp_path / "captions.txt",
        "--num-images",
        1,
        "--out",
        tmp_path,
    )
    assert [p["caption"] for p in result["images"]] == ["a cross", "a red circle", "一个蓝色的星"]
    json_of("sample", made.dalle, "--unconditional", "--num-images", 1, "--out", tmp_path / "none")
    json_of("sample", made.dalle, "", "--num-images", 1, "--out", tmp_path / "empty")
    np.testing.assert_array_equal(
        codes_of(tmp_path / "none")["c000_s0000.png"], codes_of(tmp_path / "empty")["c000_s0000.png"]
    )


def job_file(path):
    """Write eleven captions, each with its own seed, guidance or temperature."""
    rows = [
        {"caption": f"a {c} {s}"} for c in ("red", "blue") for s in ("star", "ring", "cross", "heart", "disc")
    ]
    rows += [{"caption": "", "guidance_scale": 1}]
    for i, row in enumerate(rows):
        row |= [{"seed": 7}, {"guidance_scale": 90.0, "top_p": 0.9}, {"temperature": 0.5}, {}][i % 4]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path, rows


def test_a_resumed_job_writes_the_same_files(made, tmp_path, monkeypatch):
    """Interrupted within a line of the manifest: no image is sampled twice, none is missing."""
    path, rows = job_file(tmp_path / "captions.jsonl")
    call = ("sample", made.dalle, "--captions-file", path, "--num-images", 2, "--batch-size", 3, *GUIDED)
    whole = json_of(*call, "--out", tmp_path / "whole")
    assert [(p["caption"], p["seed"]) for p in whole["images"]] == [
        (row["caption"], row.get("seed", 0) + i) for row in rows for i in range(2)
    ]
    add, sampled = sample_file.Manifest.add, []

    def count_samples(stream):
        for image in stream:
            sampled.append(image)
            yield image

    def interrupt(self, lines):
        if len(self.done) >= 9:
            self._file.write(b'{"file": "c00' + b"x" * 10_000)  # longer than what the resumed job writes
            self._file.flush()
            raise KeyboardInterrupt
        add(self, lines)

    monkeypatch.setattr(sample_file.Manifest, "add", interrupt)
    assert run(*call, "--out", tmp_path / "s").code == 130
    monkeypatch.setattr(sample_file.Manifest, "add", add)
    done = [
        json.loads(line)["file"] for line in (tmp_path / "s" / "manifest.jsonl").read_text().split("\n")[1:-1]
    ]
    assert 9 <= len(done) < 22
    generate = TextToImagePipeline._generate
    monkeypatch.setattr(
        TextToImagePipeline,
        "_generate",
        lambda self, requests, *rest: count_samples(generate(self, requests, *rest)),
    )
    again = json_of(*call, "--out", tmp_path / "s")
    assert len(sampled) == 22 - len(done) and len(again["images"]) == 22
    for name in [*(Path(p["file"]).name for p in whole["images"]), "grid.png"]:
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name, codes in codes_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(codes_of(tmp_path / "s")[name], codes)
    sampled.clear()
    assert json_of(*call, "--out", tmp_path / "s")["images"] == again["images"] and not sampled
    assert len((tmp_path / "s" / "manifest.jsonl").read_text().splitlines()) == 1 + 22
    other = refused(*call, "--top-k", 3, "--out", tmp_path / "s")
    assert f"got {tmp_path / 's'} of another job (top_k differ). Use --out DIR or --overwrite." in other


def test_a_directory_has_the_images_of_one_job(made, tmp_path, monkeypatch):
    """The same call writes the same files again; another one is refused before it samples, or replaces all."""
    monkeypatch.chdir(tmp_path)
    call = ("sample", made.dalle, "a star", "a ring", "--num-images", 1, *GUIDED)
    first = json_of(*call)["images"]
    files = {p.name: p.read_bytes() for p in Path("samples").iterdir()}
    assert json_of(*call)["images"] == first
    assert {p.name: p.read_bytes() for p in Path("samples").iterdir()} == files
    Path("c.txt").write_text("a heart")
    others = (call[:3] + call[4:], (*call, "--seed", 1), (*call[:2], "--captions-file", "c.txt"))

    def sampled(*_):
        pytest.fail("an image was sampled")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(TextToImagePipeline, "_generate", sampled)
        for other in others:
            message = refused(*other, "--out", "samples")
            assert "of the same job, got samples of another job (captions" in message
            assert "Use --out DIR or --overwrite." in message
    assert {p.name: p.read_bytes() for p in Path("samples").iterdir()} == files
    Path("samples/notes.txt").write_text("kept")
    json_of(*call[:3], *call[4:], "--seed", 3, "--overwrite")
    names = {"c000_s0003.png", "grid.png", "codes.npz", "manifest.jsonl", "notes.txt"}
    assert {p.name for p in Path("samples").iterdir()} == names
    Path("samples/manifest.jsonl").unlink()
    message = refused(*call, "--out", "samples")
    assert "got samples with images such as c000_s0003.png and without manifest" in message


def test_the_default_directory_is_the_first_without_another_job(made, tmp_path, monkeypatch):
    """samples, samples-2, ...: no image is overwritten and none is sampled into another job's directory."""
    monkeypatch.chdir(tmp_path)
    call = ("sample", made.dalle, "a star", "--num-images", 1, *GUIDED)
    for extra, directory in (
        ((), "samples"), (("--seed", 1), "samples-2"), (("--seed", 2), "samples-3"), (("--seed", 1), "samples-2"),
        ((), "samples"), (("--seed", 5, "--overwrite"), "samples"), ((), "samples-4"),
    ):  # fmt: skip
        assert json_of(*call, *extra)["grid"] == f"{directory}/grid.png"


def test_an_image_of_a_captions_file_equals_the_one_sampled_alone(made, tmp_path):
    """With one code per pass and with several."""
    path, rows = job_file(tmp_path / "captions.jsonl")
    call = ("sample", made.dalle, "--captions-file", path, "--num-images", 1, *GUIDED, "--batch-size", 4)
    assert "codes_per_pass" not in json_of(*call, "--out", tmp_path / "s")
    faster = json_of(*call, "--draft-len", 6, "--out", tmp_path / "faster")
    assert 1 <= faster["codes_per_pass"] <= 6
    for name, codes in codes_of(tmp_path / "s").items():
        np.testing.assert_array_equal(codes_of(tmp_path / "faster")[name], codes)
    assert "codes_per_pass" not in json_of(
        *call, "--draft-len", 6, "--out", tmp_path / "faster"
    )  # no image is left to sample
    message = refused(*call, "--draft-len", GRID * GRID + 1, "--out", tmp_path / "none")
    assert f"Expected draft_len from 2 to {GRID * GRID}, got" in message and not (tmp_path / "none").exists()
    for j in (0, 1, 2, 10):
        own = {"guidance_scale": 100, **rows[j]}
        flags = [x for k, v in own.items() if k != "caption" for x in ("--" + k.replace("_", "-"), v)]
        json_of("sample", made.dalle, own["caption"], *flags, "--num-images", 1, "--out", tmp_path / str(j))
        (alone,) = codes_of(tmp_path / str(j)).values()
        np.testing.assert_array_equal(list(codes_of(tmp_path / "s").values())[j], alone)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: Expected JSON, got"),
        ('{"text": "a"}', "line 2: Expected an object like"),
        (
            '{"caption": "a", "gidance": 2}',
            "line 2: Expected one of caption, seed, temperature, top_p, guidance_scale, got 'gidance'",
        ),
        ('{"caption": "a", "seed": 0.5}', "line 2: Expected seed to be an integer, got 0.5"),
        ('{"caption": "a", "top_p": 2}', "caption 1 ('a'): Expected top_p in (0, 1], got 2.0"),
        ('{"caption": "a", "seed": -1}', "caption 1 ('a'): Expected an integer seed in [0, 2**32), got -1"),
    ],
)
def test_invalid_lines_of_a_captions_file_are_rejected(made, tmp_path, line, expected):
    (tmp_path / "c.jsonl").write_text('{"caption": "b"}\n' + line)
    message = refused("sample", made.dalle, "--captions-file", tmp_path / "c.jsonl", "--out", tmp_path / "s")
    assert expected in message and not (tmp_path / "s").exists()


def test_a_long_caption_is_truncated_with_a_warning(made, tmp_path, monkeypatch):
    """Each caption passes the vocabulary once."""
    encode, encoded = SentencePieceModel.encode, []

    def record(self, caption, **options):
        encoded.append(caption)
        return encode(self, caption, **options)

    monkeypatch.setattr(SentencePieceModel, "encode", record)
    captions = ("short", "word " * 200)
    result = run("sample", made.dalle, *captions, "--num-images", 2, "--out", tmp_path, "--json")
    cut = [p["tokens_cut"] for p in json.loads(result.out)["images"]]
    assert result.code == 0 and cut[0] == 0 and cut[2] == cut[3] > 100
    assert f"warning: caption 1 is too long for the model: its last {cut[2]} tokens are dropped" in result.err
    assert encoded == list(captions)


def test_unknown_characters_are_accepted(made, tmp_path):
    json_of("sample", made.dalle, "🦩\x00\ud800 ſ", "--num-images", 1, "--out", tmp_path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--temperature", -1), "Expected temperature of at least 0, got -1.0"),
        (("--temperature", "nan"), "Expected temperature of at least 0, got nan"),
        (("--top-k", 0), "Expected top_k of at least 1, got 0"),
        (("--top-p", 0), "Expected top_p in (0, 1], got 0.0"),
        (("--top-p", 1.5), "Expected top_p in (0, 1], got 1.5"),
        (("--guidance-scale", -2), "Expected guidance_scale of at least 0, got -2.0"),
        (("--num-images", 0), "Expected --num-images of at least 1, got 0"),
        (("--batch-size", 0), "Expected batch_size of at least 1, got 0"),
        (("--seed", -1), "Expected an integer seed in [0, 2**32)"),
        (("--seed", 2**32), "Expected an integer seed in [0, 2**32)"),
        (("--unconditional",), "Expected captions or --unconditional, got both"),
        (("--prefix-rows", 2), "Expected --prefix IMAGE with --prefix-rows, got none"),
        (("--preview-rows", 0), "Expected --preview-rows of at least 1, got 0"),
        (("--draft-len", 1), "Expected draft_len of at least 2, got 1"),
        (
            ("--draft-len", GRID * GRID + 1),
            f"Expected draft_len from 2 to {GRID * GRID}, got {GRID * GRID + 1}",
        ),
        (
            ("--captions-file", "missing.txt"),
            "Expected a readable --captions-file, got missing.txt: No such file",
        ),
        (("--prefix", "missing.png"), "Cannot read the image missing.png"),
    ],
)
def test_invalid_sampling_flags_are_rejected(made, tmp_path, flags, expected):
    message = refused("sample", made.dalle, "a", "--out", tmp_path / "s", *flags)
    assert message.startswith("dalle-jax sample: error: ") and expected in message
    assert not list((tmp_path / "s").glob("*")) if (tmp_path / "s").exists() else True


def test_sample_without_a_caption_is_an_error(made):
    assert "or --unconditional to sample without" in refused("sample", made.dalle)


def test_invalid_prefix_images_are_rejected(made, image_files, tmp_path):
    images.save_png(tmp_path / "big.png", np.zeros((64, 48, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes(image_files[0].read_bytes()[:60])
    (tmp_path / "text.png").write_text("not an image")
    for name, message in (
        ("big.png", "big.png of 48 x 64. Crop and resize it"),
        ("broken.png", "broken.png: The image does not decode"),
        ("text.png", "text.png: Expected an image of a known format"),
    ):
        assert message in refused(
            "sample", made.dalle, "a", "--prefix", tmp_path / name, "--out", tmp_path / "s"
        )
    for rows in (0, GRID):
        message = refused("sample", made.dalle, "a", "--prefix", image_files[0], "--prefix-rows", rows)
        assert f"Expected --prefix-rows in [1, {GRID}), the rows of codes, got {rows}." in message


def test_invalid_captions_files_are_rejected(made, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "Expected UTF-8 in --captions-file" in refused(
        "sample", made.dalle, "--captions-file", tmp_path / "latin.txt"
    )
    assert "Expected one caption per line in --captions-file" in refused(
        "sample", made.dalle, "--captions-file", tmp_path / "empty.txt"
    )


def test_guidance_requires_a_model_trained_with_null_captions(made, tmp_path):
    copy = tmp_path / "dalle"
    shutil.copytree(made.dalle, copy)
    text = (copy / "config.json").read_text().replace('"cond_drop_prob": 0.1', '"cond_drop_prob": 0.0')
    (copy / "config.json").write_text(text)
    assert "for a model trained with cond_drop_prob 0, got guidance_scale 2." in refused(
        "sample", copy, "a", "--guidance-scale", 2, "--out", tmp_path / "s"
    )
    assert "cond_drop_prob 0, got an empty caption." in refused("sample", copy, "", "--out", tmp_path / "s")
    json_of("sample", copy, "a", "--guidance-scale", 1, "--num-images", 1, "--out", tmp_path / "s")


def test_parameters_loaded_on_the_host_give_equal_codes(made, monkeypatch):
    """Another device replaces the host; the parameters for decoding are made there and move to the first device."""
    host, first = jax.devices()[3], jax.devices()[0]
    monkeypatch.setattr(loading, "host_device", lambda: host)
    here, there = (
        load(made.dalle, TextToImagePipeline),
        load(made.dalle, TextToImagePipeline, params_on_host=True),
    )
    for model, device in ((here, first), (there, host)):
        assert {d for x in jax.tree.leaves(model.run.params) for d in x.devices()} == {device}
        ready = model._decode_params(None)
        assert {d for x in jax.tree.leaves(ready) for d in x.devices()} == {first}
    want, got = (
        next(model.sample([ImageRequest("a red disc", 5)], SamplingConfig(guidance_scale=2.0))).codes
        for model in (here, there)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("field", "other"), [("dim", 32), ("layers", 2), ("image_vocab", VOCAB * 2)])
def test_a_checkpoint_that_does_not_fit_the_configuration_is_rejected(made, tmp_path, field, other):
    """As after an edit of config.json. Without the check, fewer layers or codes would sample without an error."""
    path = shutil.copytree(made.dalle, tmp_path / "run")
    config = json.loads((path / "config.json").read_text())
    assert config["model"][field] != other
    config["model"][field] = other
    (path / "config.json").write_text(json.dumps(config))
    assert "does not fit the model" in refused("sample", path, "a", "--out", tmp_path / "out")


def test_help_lists_the_flags_of_the_model(made, tmp_path):
    """Without RUN the help lists the flags that all models share; a flag of another model is an error."""
    own, common = run("sample", made.dalle, "--help"), run("sample", "--help")
    assert own.code == common.code == 0
    assert "--temperature" in own.out and "--draft-len" in own.out and "--mask" not in own.out
    assert "--num-images" in common.out and "`dalle-jax sample RUN --help`" in common.out
    assert "--temperature" not in common.out and "--mask" not in common.out
    assert "--mask" in refused("sample", made.dalle, "a", "--mask", "m.png", code=2)
    assert "--temperature" in refused("sample", made.dalle, "a", "--temprature", 1, code=2)
    assert "run dalle-jax sample RUN --help" in refused("sample", made.dalle, "a", "--temprature", 1, code=2)
    assert "many" in refused("sample", made.dalle, "a", "--num-images", "many", code=2)
    flags_first = ("sample", "--num-images", 1, "--json", made.dalle, "a", "--temperature", 0.5)
    assert run(*flags_first, "--out", tmp_path).code == 0
