"""Parity tests (`-m parity`) of U-Net and samplers with diffusers on the same random weights and noise.

They need torch and diffusers (last run with 0.42.1); neither is a dependency of the library.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from dalle_jax.config import DiffusionConfig, NoiseConfig  # noqa: E402
from dalle_jax.models.diffusion import sampler, unet  # noqa: E402
from dalle_jax.models.diffusion.schedule import alpha_sigma, beta_schedule, to_x0  # noqa: E402

pytestmark = pytest.mark.parity

DDPM = NoiseConfig(kind="ddpm")


def dense(weight):
    return weight.reshape(weight.shape[0], -1).T


def to_ours(state: dict, levels_: int, attention: list[bool], blocks: int, resample: str) -> dict:
    """Convert the parameters of a diffusers UNet2DModel."""
    remaining = {k: v.detach().numpy() for k, v in state.items()}

    def take(name, conv=False):
        weight, bias = remaining.pop(f"{name}.weight"), remaining.pop(f"{name}.bias")
        if weight.ndim == 1:
            return {"scale": weight, "bias": bias}
        return {"kernel": weight.transpose(2, 3, 1, 0) if conv else dense(weight), "bias": bias}

    def res(name):
        out = {
            "norm1": take(f"{name}.norm1"), "conv1": take(f"{name}.conv1", True), "norm2": take(f"{name}.norm2"),
            "time": take(f"{name}.time_emb_proj"), "conv2": take(f"{name}.conv2", True),
        }  # fmt: skip
        return out | (
            {"shortcut": take(f"{name}.conv_shortcut")} if f"{name}.conv_shortcut.weight" in remaining else {}
        )

    def attn(name):
        names = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"}
        return {ours: take(f"{name}.{theirs}") for ours, theirs in names.items()}

    out = {
        "time_1": take("time_embedding.linear_1"), "time_2": take("time_embedding.linear_2"),
        "conv_in": take("conv_in", True), "conv_out": take("conv_out", True), "norm_out": take("conv_norm_out"),
        "mid_block_1": res("mid_block.resnets.0"), "mid_attn": attn("mid_block.attentions.0"),
        "mid_block_2": res("mid_block.resnets.1"),
    }  # fmt: skip
    for level in range(levels_):
        for way, theirs, count in (("down", f"down_blocks.{level}", blocks),
                                   ("up", f"up_blocks.{levels_ - 1 - level}", blocks + 1)):  # fmt: skip
            for j in range(count):
                out[f"{way}_{level}_block_{j}"] = res(f"{theirs}.resnets.{j}")
                if attention[level]:
                    out[f"{way}_{level}_attn_{j}"] = attn(f"{theirs}.attentions.{j}")
            if (way == "down") == (level == levels_ - 1) and levels_ > 1 and not (way == "up" and level):
                continue
            name = f"{theirs}.{way}samplers.0"
            made = res(name) if resample == "block" else take(f"{name}.conv", True)
            out[f"{way}_{level}_{way}sample"] = made
    assert not remaining, f"not converted: {sorted(remaining)}"
    return {"unet": jax.tree.map(jnp.asarray, out)}


def theirs(cfg: DiffusionConfig):
    """Make a UNet2DModel of the same architecture with random parameters."""
    torch.manual_seed(0)
    last = len(cfg.channel_multipliers) - 1
    attention = [side in cfg.attention_sizes for side in cfg.sizes]
    block = cfg.resample == "block"
    kinds = [("Attn" if a else "") + "{}Block2D" for a in attention]
    model = diffusers.UNet2DModel(
        sample_size=cfg.image_size,
        freq_shift=1,
        flip_sin_to_cos=False,
        down_block_types=tuple(kind.format("Down") for kind in kinds),
        up_block_types=tuple(kind.format("Up") for kind in reversed(kinds)),
        block_out_channels=tuple(cfg.width * m for m in cfg.channel_multipliers),
        layers_per_block=cfg.blocks,
        downsample_padding=0,
        attention_head_dim=cfg.head_dim,
        downsample_type="resnet" if block else "conv",
        upsample_type="resnet" if block else "conv",
        resnet_time_scale_shift="scale_shift" if cfg.scale_shift_norm else "default",
        norm_eps=1e-6,
        attn_norm_num_groups=32,  # otherwise the middle attention has no norm with scale_shift_norm
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                0.2 * torch.randn(p.shape) if p.ndim == 1 else torch.randn(p.shape) / np.sqrt(p[0].numel())
            )
    return model, to_ours(model.state_dict(), last + 1, attention, cfg.blocks, cfg.resample)


@pytest.mark.parametrize(
    "cfg",
    [
        DiffusionConfig(
            image_size=16, width=32, channel_multipliers=(1, 2), blocks=2, attention_sizes=(8,), norm_groups=32,
            noise=DDPM
        ),
        DiffusionConfig(
            image_size=16, width=32, channel_multipliers=(1, 2), blocks=1, attention_sizes=(16, 8), head_dim=16,
            norm_groups=32,
            scale_shift_norm=True, resample="block", noise=DDPM,
        ),
    ],
    ids=["ddpm", "adm"],
)  # fmt: skip
def test_unet(cfg):
    """The networks of 2006.11239 and 2105.05233, attention at one level and at both, agree within 1e-5."""
    model, params = theirs(cfg)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 16, 16, 3)).astype(np.float32)
    steps = np.array([0, 417, 999])  # counted from 0, as in the published network
    with torch.no_grad():
        want = model(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(steps)).sample.numpy()
    t = jnp.asarray((steps + 1) / 1000, jnp.float32)
    at = alpha_sigma(DDPM, t)
    encoded = unet.encode_conditions(cfg, params, unet.Conditions())
    with jax.default_matmul_precision("float32"):
        got = np.asarray(unet.predict(cfg, params, jnp.asarray(x), t, at.alpha, at.sigma, encoded))
    want = want.transpose(0, 2, 3, 1)
    assert np.abs(want).max() > 0.2
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_attention_with_captions():
    """Attention over image and caption together, as in diffusers for GLIDE-like networks."""
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor

    torch.manual_seed(1)
    theirs = Attention(
        query_dim=32, heads=4, dim_head=8, added_kv_proj_dim=12, norm_num_groups=32, bias=True, eps=1e-6,
        residual_connection=True, processor=AttnAddedKVProcessor(),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.4 * torch.randn(p.shape))
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    names = {
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "text_k": "add_k_proj",
        "text_v": "add_v_proj",
        "proj": "to_out.0",
    }
    params = {a: {"kernel": state[f"{b}.weight"].T, "bias": state[f"{b}.bias"]} for a, b in names.items()}
    params["norm"] = {"scale": state["group_norm.weight"], "bias": state["group_norm.bias"]}
    rng = np.random.default_rng(2)
    x, text = (
        rng.normal(size=(2, 4, 4, 32)).astype(np.float32),
        rng.normal(size=(2, 5, 12)).astype(np.float32),
    )
    with torch.no_grad():
        want = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), encoder_hidden_states=torch.tensor(text)).numpy()
    got = unet.UNetAttnBlock(8, 32, jnp.float32).apply({"params": params}, jnp.asarray(x), jnp.asarray(text))
    np.testing.assert_allclose(got, want.transpose(0, 2, 3, 1), atol=1e-5 * np.abs(want).max())


# --- samplers with one network and the same steps -----------------------------------------------------------


def network(x, step):
    """Predict noise by a smooth function instead of a trained network, at a step counted from 0."""
    xp = torch if isinstance(x, torch.Tensor) else jnp
    return 0.8 * x * (0.2 + step / 1500) + 0.3 * xp.sin(3 * x + step / 300)


def denoise(context, x, t, alpha, sigma):
    return to_x0("eps", network(x, t * 1000 - 1), x, alpha, sigma)


def ours(name, grid, monkeypatch, x1, cfg=DDPM, denoise=denoise, noise=None, **options):
    """Run our sampler from x1 at the times `grid`; noise: (keys, index, x) -> noise, zeros by default."""
    zero = lambda keys, index, x: jnp.zeros_like(x)  # noqa: E731
    monkeypatch.setattr(sampler, "time_grid", lambda *_: np.asarray(grid, np.float64))
    monkeypatch.setattr(sampler, "_noise", noise or zero)
    image = jnp.asarray(x1 / float(alpha_sigma(cfg, grid[0]).alpha))  # an image to which no noise is added
    keys = jax.random.split(jax.random.key(0), len(x1))
    run = sampler.sample.__wrapped__
    options |= {
        "sampler": name,
        "num_steps": len(grid),
        "image": image,
        "start_time": min(float(grid[0]), 1 - 1e-12),
    }
    return np.asarray(run(cfg, denoise, None, keys, x1.shape[1:], **options).x)


BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
X1 = np.random.default_rng(5).normal(size=(2, 3, 3, 1)).astype(np.float32)


def run_scheduler(scheduler, steps, x1, **options):
    scheduler.set_timesteps(steps)
    x = torch.tensor(x1, dtype=torch.float64)
    for step in scheduler.timesteps:
        x = scheduler.step(
            network(scheduler.scale_model_input(x, step), step), step, x, **options
        ).prev_sample
    return x.numpy(), (scheduler.timesteps.numpy() + 1) / 1000


def test_betas_and_levels():
    scheduler = diffusers.DDPMScheduler(**BETAS)
    np.testing.assert_allclose(beta_schedule(DDPM), scheduler.betas.numpy(), rtol=1e-5)
    alpha = alpha_sigma(DDPM, np.arange(1, 1001) / 1000).alpha
    np.testing.assert_allclose(alpha**2, scheduler.alphas_cumprod.numpy(), rtol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim(eta, monkeypatch):
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=True)
    z = torch.full((2, 3, 3, 1), 0.5, dtype=torch.float64)
    noise = {"variance_noise": z} if eta else {}
    want, grid = run_scheduler(scheduler, 20, X1, eta=eta, **noise)
    got = ours(
        "ddim", grid, monkeypatch, X1, eta=eta,
        noise=lambda keys, index, x: jnp.where(index == 0, 0.0, 0.5) * jnp.ones_like(x),
    )  # fmt: skip
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_ancestral(monkeypatch):
    """50 of the 1000 steps, the variance of the posterior; both use the same noise."""
    scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample=False, variance_type="fixed_small")
    noises = []

    def recorded(shape, **_):
        noises.append(np.random.default_rng(len(noises)).normal(size=shape))
        return torch.tensor(noises[-1])

    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", recorded)
    want, grid = run_scheduler(scheduler, 50, X1)
    table = jnp.asarray(np.stack([*noises, np.zeros(X1.shape)]), jnp.float32)  # the last step has no noise

    def noise(keys, index, x):
        return jnp.where(index == 0, jnp.zeros_like(x), table[(index - 1) // 2])

    got = ours("ancestral", grid, monkeypatch, X1, noise=noise)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_dpm_solver(monkeypatch):
    """The second-order multistep form; the last step is of first order in both."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    want, grid = run_scheduler(scheduler, 20, X1)
    got = ours("dpm++2m", grid, monkeypatch, X1)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_euler(monkeypatch):
    """Diffusers steps in sigma of x / alpha, like our Euler with sigma linear in t, at the same levels."""
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading")
    x1 = X1 * 30
    want, grid = run_scheduler(scheduler, 20, x1)
    sigmas, steps = scheduler.sigmas.numpy()[:-1].astype(np.float64), grid * 1000 - 1
    cfg = NoiseConfig(kind="edm", rho=1.0, sigma_min=float(sigmas[-1]), sigma_max=float(sigmas[0]))

    def denoise(context, x, t, alpha, sigma):
        step = jnp.interp(sigma, sigmas[::-1].astype(np.float32), steps[::-1].astype(np.float32))
        return x - sigma * network(x / jnp.sqrt(sigma**2 + 1), step)

    times = (sigmas - sigmas[-1]) / (sigmas[0] - sigmas[-1])
    got = ours("euler", times, monkeypatch, x1, cfg=cfg, denoise=denoise)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
