"""Writes small models of the reference implementations with random weights, in their own formats, and their outputs.

    pip install torch==2.13.0 numpy attrs requests einops transformers
    pip install --no-deps DALL-E==0.1 taming-transformers-rom1504==0.0.6 openai-clip==1.0.1
    git clone https://github.com/FoundationVision/LlamaGen && git -C LlamaGen checkout ce98ec4
    git clone https://github.com/patil-suraj/vqgan-jax && git -C vqgan-jax checkout 10ef240
    export PYTHONPATH=LlamaGen:vqgan-jax
    python tests/golden/reference.py            # writes the directories beside this file again

Each function makes one family: the checkpoint in its own format, and `answers.npz` with inputs and outputs. The tests
check these files; where the packages are installed, `pytest -m parity` makes larger models and checks those.
"""

import sys
from pathlib import Path

import numpy as np

SHAPES = ((16, 16), (40, 40), (24, 40))  # of images; with odd numbers of codes, and not square


def _seeded(seed):
    import torch

    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    return torch


def _random_biases(torch, module):
    """Randomize the biases: they start at zero, which would hide a bias that is not imported."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return module


def openai_dvae(out, *, width=4, blocks=1, vocab=32, decoder_width=8, seed=0, zipped=True):
    """PyPI `DALL-E` 0.1 (openai/DALL-E): encoder.pkl and decoder.pkl, whole modules."""
    import attr
    from dall_e import Decoder, Encoder, map_pixels, unmap_pixels

    torch = _seeded(seed)
    with attr.validators.disabled():  # the package rejects widths below 64
        encoder = Encoder(n_hid=width, n_blk_per_group=blocks, vocab_size=vocab)
        decoder = Decoder(n_hid=width, n_blk_per_group=blocks, vocab_size=vocab, n_init=decoder_width)
    out.mkdir(parents=True, exist_ok=True)
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        _random_biases(torch, module)
        torch.save(module, out / f"{name}.pkl", _use_new_zipfile_serialization=zipped)
    answers = {}
    for i, (height, wide) in enumerate(SHAPES):
        images = torch.rand(1, 3, height, wide)
        logits = encoder(map_pixels(images))
        codes = logits.argmax(dim=1)
        one_hot = torch.nn.functional.one_hot(codes, vocab).permute(0, 3, 1, 2).float()
        pixels = unmap_pixels(torch.sigmoid(decoder(one_hot).float()[:, :3]))
        answers |= {
            f"images_{i}": images.permute(0, 2, 3, 1), f"logits_{i}": logits.permute(0, 2, 3, 1),
            f"codes_{i}": codes, f"pixels_{i}": pixels.permute(0, 2, 3, 1),
        }  # fmt: skip
    np.savez_compressed(out / "answers.npz", **{name: x.numpy() for name, x in answers.items()})


def _small_groups(torch):
    """Use 32 groups in group norms only where they divide the channels; the references need at least 32 channels."""
    import math

    return lambda channels, *_: torch.nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


def _spread(torch, net):
    """Normalize the latents to mean 0 and deviation 1: those of random networks would all have one code."""
    z = net.quant_conv(net.encoder(2 * torch.rand(4, 3, 16, 16) - 1))
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    net.quant_conv.weight.div_(std[:, None, None, None])
    net.quant_conv.bias.sub_(mean).div_(std)


def _answer(torch, out, encode, decode, vocab):
    """encode: images in [0, 1] (B, 3, H, W) to (vectors before the codebook, codes (B, h, w)). decode: back."""
    answers = {}
    for i, (height, wide) in enumerate(SHAPES):
        images = torch.rand(1, 3, height, wide)
        z, codes = encode(images)
        assert len(codes.unique()) > 2, "a codebook of which the reference uses almost nothing tests nothing"
        answers |= {
            f"images_{i}": images.permute(0, 2, 3, 1), f"latents_{i}": z.permute(0, 2, 3, 1), f"codes_{i}": codes,
            f"pixels_{i}": decode(codes).permute(0, 2, 3, 1),
        }  # fmt: skip
    np.savez_compressed(out / "answers.npz", **{name: x.numpy() for name, x in answers.items()})


def taming_vqgan(
    out, *, width=4, multipliers=(1, 2), blocks=1, attention=(8,), latent=6, vocab=32, gumbel=False, seed=0
):
    """PyPI `taming-transformers-rom1504` 0.0.6 (CompVis/taming-transformers): model.ckpt of Lightning."""
    from taming.modules.diffusionmodules import model
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer

    torch = _seeded(seed)
    if width % 32:
        model.Normalize = _small_groups(torch)
    sizes = dict(
        ch=width, out_ch=3, ch_mult=multipliers, num_res_blocks=blocks, attn_resolutions=attention, in_channels=3,
        resolution=16, z_channels=latent, double_z=False,
    )  # fmt: skip

    class VQModel(torch.nn.Module):  # the class of the package needs Lightning and a loss
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = model.Encoder(**sizes), model.Decoder(**sizes)
            self.quantize = (
                GumbelQuantize(latent, latent, vocab) if gumbel else VectorQuantizer(vocab, latent, beta=0.25)
            )
            self.quant_conv, self.post_quant_conv = (
                torch.nn.Conv2d(latent, latent, 1),
                torch.nn.Conv2d(latent, latent, 1),
            )

    net = _random_biases(torch, VQModel()).eval()
    _spread(torch, net)
    if not gumbel:
        net.quantize.embedding.weight.copy_(torch.randn(vocab, latent))
    out.mkdir(parents=True, exist_ok=True)
    state = net.state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(2)}
    torch.save({"epoch": 3, "global_step": 5, "state_dict": state, "lr_schedulers": []}, out / "model.ckpt")

    def encode(images):
        z = net.quant_conv(net.encoder(2 * images - 1))
        if gumbel:  # the most probable code; the package samples one
            return z, net.quantize.proj(z).argmax(dim=1)
        return z, net.quantize(z)[2][2].reshape(len(z), *z.shape[2:])

    def decode(codes):
        b, h, w = codes.shape
        z = net.quantize.get_codebook_entry(codes.reshape(-1), (b, h, w, latent))
        return ((net.decoder(net.post_quant_conv(z)) + 1) / 2).clamp(0, 1)

    _answer(torch, out, encode, decode, vocab)


def taming_gumbel(out, **options):
    taming_vqgan(out, gumbel=True, **options)


def llamagen_vq(out, *, width=4, multipliers=(1, 2), latent=6, vocab=32, seed=0):
    """FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py: vq.pt."""
    from tokenizer.tokenizer_image import vq_model

    torch = _seeded(seed)
    if width % 32:
        vq_model.Normalize = _small_groups(torch)
    net = vq_model.VQModel(
        vq_model.ModelArgs(codebook_size=vocab, z_channels=latent, encoder_ch_mult=[1], decoder_ch_mult=[1])
    )
    net.encoder = vq_model.Encoder(ch=width, ch_mult=multipliers, z_channels=latent)
    net.decoder = vq_model.Decoder(ch=width, ch_mult=multipliers, z_channels=latent)
    net.quantize.embedding.weight.copy_(torch.randn(vocab, 8))  # not of unit length, as after training
    net = _random_biases(torch, net).eval()
    _spread(torch, net)
    out.mkdir(parents=True, exist_ok=True)
    state = net.state_dict()
    state["quantize.codebook_used"] = torch.zeros(
        16
    )  # the published one has 65,536 entries, used only in training
    torch.save({"model": state, "steps": 7}, out / "vq.pt")

    def encode(images):
        z = net.quant_conv(net.encoder(2 * images - 1))
        return z, net.quantize(z)[2][2].reshape(len(z), *z.shape[2:])

    def decode(codes):
        b, h, w = codes.shape
        return ((net.decode_code(codes.reshape(-1), (b, 8, h, w)) + 1) / 2).clamp(0, 1)

    _answer(torch, out, encode, decode, vocab)


def flax_vqgan(out, *, width=4, multipliers=(1, 2), blocks=1, attention=(8,), latent=6, vocab=32, seed=0):
    """patil-suraj/vqgan-jax: flax_model.msgpack. Its base class left transformers in version 5 and is not used here."""
    import types

    import flax.linen as nn
    import flax.serialization
    import jax
    import jax.numpy as jnp

    stub = types.ModuleType("transformers.modeling_flax_utils")
    stub.FlaxPreTrainedModel = object
    sys.modules["transformers.modeling_flax_utils"] = stub
    from vqgan_jax import modeling_flax_vqgan as vj
    from vqgan_jax.configuration_vqgan import VQGANConfig

    if width % 32:
        vj.nn = types.SimpleNamespace(**vars(nn))
        # As _small_groups: these channels are powers of two below 32.
        vj.nn.GroupNorm = lambda num_groups, epsilon: nn.GroupNorm(None, 1, epsilon=epsilon)
    cfg = VQGANConfig(
        ch=width, ch_mult=multipliers, num_res_blocks=blocks, resolution=16, attn_resolutions=attention,
        z_channels=latent, embed_dim=latent, n_embed=vocab,
    )  # fmt: skip
    net, torch = vj.VQModule(cfg), _seeded(seed)
    params = jax.jit(net.init)(jax.random.key(seed), jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: np.asarray(x) + (0.3 * rng.normal(size=x.shape) if x.ndim == 1 else 0), params
    )
    params["quantize"]["embedding"]["embedding"] = rng.normal(size=(vocab, latent))
    z = net.apply(
        {"params": params}, rng.random((4, 16, 16, 3)), method=lambda m, x: m.quant_conv(m.encoder(x))
    )
    before, std = params["quant_conv"], z.std((0, 1, 2))  # as _spread
    params["quant_conv"] = {
        "kernel": before["kernel"] / std,
        "bias": (before["bias"] - z.mean((0, 1, 2))) / std,
    }
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    out.mkdir(parents=True, exist_ok=True)
    (out / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(params))

    def encode(images):
        def both(module, x):
            z = module.quant_conv(module.encoder(x))
            return z, module.quantize(z)[1]

        z, codes = net.apply({"params": params}, jnp.asarray(images.permute(0, 2, 3, 1).numpy()), method=both)
        z = torch.from_numpy(np.array(z)).permute(0, 3, 1, 2)
        return z, torch.from_numpy(np.array(codes)).reshape(len(z), *z.shape[2:])

    def decode(codes):
        def decode_codes(module, codes):
            return module.decode(module.quantize.embedding(codes))

        pixels = net.apply({"params": params}, jnp.asarray(codes.numpy()), method=decode_codes)
        return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).clamp(0, 1)

    _answer(torch, out, encode, decode, vocab)


PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean, deviation


def _clip_answers(torch, out, image_size, text_len, vocab, embed):
    """embed: normalized images (B, 3, S, S) and tokens (B, T) to the two sets of vectors, of length 1."""
    images = torch.rand(3, 3, image_size, image_size)
    tokens = torch.full((3, text_len), vocab - 1)  # end
    tokens[:, 0] = vocab - 2  # start
    for row, length in enumerate((0, 3, text_len - 2)):  # an empty, a short and a full caption
        tokens[row, 1 : 1 + length] = torch.randint(vocab - 2, (length,))
    after = tokens.clone()
    after[0, 2:] = 0  # the tokenizer of OpenAI pads with zeros
    mean, std = (torch.tensor(x)[:, None, None] for x in PIXELS)
    image, text = embed((images - mean) / std, after)
    image, text = (x / x.norm(dim=1, keepdim=True) for x in (image, text))
    answers = {"images_0": images.permute(0, 2, 3, 1), "tokens_0": after, "image_0": image, "text_0": text}
    np.savez_compressed(out / "answers.npz", **{name: x.numpy() for name, x in answers.items()})


def clip_openai(
    out, *, vision=(16, 1), text=(16, 2), patch=4, image_size=12, text_len=7, vocab=40, embed_dim=12, seed=0
):
    """PyPI `openai-clip` 1.0.1 (openai/CLIP): ViT.pt, a TorchScript archive as the published ones are."""
    import importlib.util

    where = Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location("clip_model", where)  # the package imports torchvision
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    torch = _seeded(seed)
    heads = [max(width // 64, 1) for width, _ in (vision, text)]
    net = model.CLIP(
        embed_dim,
        image_size,
        vision[1],
        max(vision[0], 64),
        patch,
        text_len,
        vocab,
        text[0],
        heads[1],
        text[1],
    )
    if vision[0] < 64:  # the class needs heads of width 64
        net.visual = model.VisionTransformer(image_size, patch, vision[0], vision[1], heads[0], embed_dim)
    net = _random_biases(torch, net).eval()
    out.mkdir(parents=True, exist_ok=True)
    one = torch.rand(1, 3, image_size, image_size), torch.arange(text_len)[None]
    torch.jit.trace(net, one, check_trace=False).save(out / "ViT.pt")
    _clip_answers(
        torch, out, image_size, text_len, vocab, lambda x, t: (net.encode_image(x), net.encode_text(t))
    )


def clip_hugging_face(
    out, *, vision=(16, 2, 2), text=(12, 3, 2), patch=4, image_size=12, text_len=7, vocab=40, embed_dim=10,
    activation="quick_gelu", safe=True, seed=0,
):  # fmt: skip
    """PyPI `transformers`: a directory with config.json and model.safetensors or pytorch_model.bin."""
    from transformers import CLIPConfig, CLIPModel

    torch = _seeded(seed)

    def sizes(width, heads, layers):
        return dict(
            hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=4 * width,
            hidden_act=activation,
        )  # fmt: skip

    ends = dict(bos_token_id=vocab - 2, eos_token_id=vocab - 1, pad_token_id=vocab - 1)
    net = CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=vocab, max_position_embeddings=text_len, **ends, **sizes(*text)),
        vision_config=dict(patch_size=patch, image_size=image_size, **sizes(*vision)),
        projection_dim=embed_dim,
    ))  # fmt: skip
    net = _random_biases(torch, net).eval()
    out.mkdir(parents=True, exist_ok=True)
    net.save_pretrained(out)
    if not safe:  # as earlier versions of transformers did
        (out / "model.safetensors").unlink()
        torch.save(net.state_dict(), out / "pytorch_model.bin")

    def embed(pixels, tokens):
        answer = net(pixel_values=pixels, input_ids=tokens)
        return answer.image_embeds, answer.text_embeds

    _clip_answers(torch, out, image_size, text_len, vocab, embed)


def published(out):
    """Write names and shapes of the published models to one file, `{model: {name: shape}}`; no array is allocated."""
    import gzip
    import importlib.util
    import json

    import torch
    from dall_e import Decoder, Encoder
    from taming.modules.diffusionmodules import model
    from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer
    from tokenizer.tokenizer_image import vq_model
    from transformers import CLIPConfig, CLIPModel

    where = Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / "model.py"
    spec = importlib.util.spec_from_file_location("clip_model", where)
    openai = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(openai)

    def taming(multipliers, attention, quantize):
        sizes = dict(
            ch=128, out_ch=3, ch_mult=multipliers, num_res_blocks=2, attn_resolutions=attention, in_channels=3,
            resolution=256, z_channels=256, double_z=False,
        )  # fmt: skip
        return torch.nn.ModuleDict(dict(
            encoder=model.Encoder(**sizes), decoder=model.Decoder(**sizes), quantize=quantize,
            quant_conv=torch.nn.Conv2d(256, 256, 1), post_quant_conv=torch.nn.Conv2d(256, 256, 1),
        ))  # fmt: skip

    with torch.device("meta"):
        f16 = (1, 1, 2, 2, 4), (16,)
        models = {
            "openai-dvae": torch.nn.ModuleDict(
                dict(encoder=Encoder(device="meta"), decoder=Decoder(device="meta"))
            ),
            "taming-f16-1024": taming(*f16, VectorQuantizer(1024, 256, 0.25)),
            "taming-f16-16384": taming(*f16, VectorQuantizer(16384, 256, 0.25)),
            "taming-f8-gumbel": taming((1, 1, 2, 4), (32,), GumbelQuantize(256, 256, 8192)),
            "llamagen-f16": vq_model.VQ_16(),
            "llamagen-f8": vq_model.VQ_8(),
            "clip-openai": openai.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
            "clip-hugging-face": CLIPModel(CLIPConfig()),
        }
    shapes = {name: {k: list(x.shape) for k, x in m.state_dict().items()} for name, m in models.items()}
    data = json.dumps(shapes, separators=(",", ":")).encode()
    out.with_suffix(".json.gz").write_bytes(gzip.compress(data, mtime=0))


FAMILIES = (
    openai_dvae, taming_vqgan, taming_gumbel, llamagen_vq, flax_vqgan, clip_openai, clip_hugging_face,
    published,
)  # fmt: skip
GOLDEN = {family.__name__: family for family in FAMILIES}

if __name__ == "__main__":
    for name in sys.argv[1:] or GOLDEN:
        GOLDEN[name](Path(__file__).parent / name)
