"""Training steps of PyTorch for benchmarks/train.py; needs torch, and diffusers for the U-Net.

`python -m benchmarks.train_peer --job JOB` with a JSON object of `benchmarks.train.peer_job` times the networks of our
configurations: the DALL-E Transformer, the discrete VAE and the U-Net of diffusers. torch.compile compiles forward pass
and loss, bfloat16 is by autocast, AdamW is fused, and there are gradient clipping and averaged parameters where the
configuration has them. Convolutions have the layout channels last. The script prints one JSON object.

Where a step differs from ours, it does less work: it has no metrics besides the loss, and recomputes no activations.
Autocast computes the logits of the VAE in bfloat16, where ours are float32. Row, column and convolutional layers of the
Transformer have full causal attention, which `F.scaled_dot_product_attention(is_causal=True)` computes.
B batch, T text positions, N codes, S stream positions, D width, K width of a head, C channels, h w code grid, V
codebook, H heads, or with W the sides of an image.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
from typing import Any

# Without this variable, idle compiler processes stay beside the timed steps.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        d, self.heads, self.qk_norm = cfg["dim"], cfg["heads"], cfg["qk_norm"]
        self.approximate = "tanh" if cfg["activation"] == "gelu-tanh" else "none"
        self.norm_attn, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, cfg["mlp_dim"]), nn.Linear(cfg["mlp_dim"], d)
        if self.qk_norm:
            self.q_scale, self.k_scale = (nn.Parameter(torch.ones(d // self.heads)) for _ in range(2))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        b, s, d = x_BSD.shape
        qkv = self.qkv(self.norm_attn(x_BSD)).view(b, s, 3, self.heads, -1)
        q_BHSK, k_BHSK, v_BHSK = qkv.permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q_BHSK = F.rms_norm(q_BHSK.float(), q_BHSK.shape[-1:], self.q_scale, 1e-6).to(v_BHSK.dtype)
            k_BHSK = F.rms_norm(k_BHSK.float(), k_BHSK.shape[-1:], self.k_scale, 1e-6).to(v_BHSK.dtype)
        y_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True)
        x_BSD = x_BSD + self.out(y_BHSK.transpose(1, 2).reshape(b, s, d))
        return x_BSD + self.down(F.gelu(self.up(self.norm_mlp(x_BSD)), approximate=self.approximate))


class Dalle(nn.Module):
    """The loss of the Transformer over text and image tokens."""

    def __init__(self, cfg: dict[str, Any], dtype: torch.dtype):
        super().__init__()
        self.cfg, self.dtype, d = cfg, dtype, cfg["dim"]

        def embedding(rows: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(rows, d))

        self.text_embed, self.image_embed = embedding(cfg["num_text_ids"]), embedding(cfg["image_vocab"])
        self.text_pos = embedding(cfg["text_len"])
        if cfg["pos_embed"] == "axial":
            self.image_row, self.image_col = embedding(cfg["grid"]), embedding(cfg["grid"])
        else:
            self.image_pos = embedding(cfg["grid"] ** 2)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg["layers"]))
        self.norm_out = nn.LayerNorm(d)
        self.image_head = nn.Linear(d, cfg["image_vocab"], bias=cfg["head_bias"])
        if cfg["text_loss_weight"] > 0:
            self.text_head = nn.Linear(d, cfg["num_text_ids"], bias=cfg["head_bias"])

    def forward(self, text_BT: torch.Tensor, codes_BN: torch.Tensor) -> torch.Tensor:
        cfg, t = self.cfg, self.cfg["text_len"]
        drop_B1 = torch.rand(len(text_BT), 1, device=text_BT.device) < cfg["cond_drop_prob"]
        if cfg["pad_id"] is None:
            null_T = cfg["text_vocab"] + torch.arange(t, device=text_BT.device)
        else:
            null_T = torch.full((t,), cfg["pad_id"], device=text_BT.device)
        text_BT = torch.where(drop_B1, null_T, text_BT)
        if cfg["pos_embed"] == "axial":
            image_pos = (self.image_row[:, None] + self.image_col).flatten(0, 1)
        else:
            image_pos = self.image_pos
        text_BTD = F.embedding(text_BT, self.text_embed) + self.text_pos
        image_BND = F.embedding(codes_BN, self.image_embed) + image_pos
        x_BSD = torch.cat([text_BTD, image_BND], 1).to(self.dtype)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        x_BSD = self.norm_out(x_BSD)
        image_logits = self.image_head(x_BSD[:, t - 1 : -1]).float()
        loss = (1 - cfg["text_loss_weight"]) * F.cross_entropy(image_logits.flatten(0, 1), codes_BN.flatten())
        if cfg["text_loss_weight"] > 0 and t > 1:
            text_logits = self.text_head(x_BSD[:, : t - 1]).float()
            text_loss = F.cross_entropy(text_logits.flatten(0, 1), text_BT[:, 1:].flatten())
            loss = loss + cfg["text_loss_weight"] * text_loss
        return loss


class Residual(nn.Module):
    """A shortcut plus `gain` times four convolutions, each after a ReLU."""

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)
        widths = [inputs, *[width // 4] * 3, width]
        self.convs = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], kernel, padding="same") for i, kernel in enumerate(kernels)
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        y = x_BCHW
        for conv in self.convs:
            y = conv(F.relu(y))
        return self.id_path(x_BCHW) + self.gain * y


def residual_stack(
    inputs: int, widths: list[int], blocks: int, kernels: tuple[int, ...], between: nn.Module
) -> list[nn.Module]:
    """Return groups of residual blocks, with the module `between` between groups."""
    layers, gain = [], 1.0 / (len(widths) * blocks) ** 2
    for group, width in enumerate(widths):
        if group:
            layers.append(between)
        for _ in range(blocks):
            layers.append(Residual(inputs, width, kernels, gain))
            inputs = width
    return layers


class DVAE(nn.Module):
    """The negative evidence lower bound of the discrete VAE, with the values that schedules have at their end."""

    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        self.cfg = cfg
        widths = [cfg["width"] * 2**group for group in range(cfg["groups"])]
        self.encoder = nn.Sequential(
            nn.Conv2d(3, cfg["width"], 7, padding="same"),
            *residual_stack(cfg["width"], widths, cfg["blocks"], (3, 3, 3, 1), nn.MaxPool2d(2)),
            nn.ReLU(),
            nn.Conv2d(widths[-1], cfg["vocab"], 1),
        )
        double = nn.Upsample(scale_factor=2, mode="nearest")
        self.decoder = nn.Sequential(
            nn.Conv2d(cfg["vocab"], cfg["decoder_width"], 1),
            *residual_stack(cfg["decoder_width"], widths[::-1], cfg["blocks"], (1, 3, 3, 3), double),
            nn.ReLU(),
            nn.Conv2d(cfg["width"], 6, 1),
        )

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        cfg = self.cfg
        x_BCHW = 0.8 * (images_BCHW.float() / 255) + 0.1
        logits_BVhw = self.encoder(x_BCHW).float()
        gumbel = -torch.log(-torch.log(torch.rand_like(logits_BVhw).clamp(1e-20, 1 - 1e-7)))
        soft_BVhw = torch.softmax((logits_BVhw + gumbel) / cfg["tau"]["end"], 1)
        mu_BCHW, log_b_BCHW = self.decoder(soft_BVhw).float().chunk(2, 1)
        if cfg["min_scale"] > 0:
            log_b_BCHW = torch.logaddexp(log_b_BCHW, torch.full_like(log_b_BCHW, math.log(cfg["min_scale"])))
        error_BCHW = (torch.logit(x_BCHW) - mu_BCHW).abs() * torch.exp(-log_b_BCHW)
        reconstruction = (math.log(2) + log_b_BCHW + torch.log(x_BCHW * (1 - x_BCHW)) + error_BCHW).mean()
        log_p_BVhw = torch.log_softmax(logits_BVhw, 1)
        kl = math.log(cfg["vocab"]) + (log_p_BVhw.exp() * log_p_BVhw).sum(1).mean()
        codes, values = logits_BVhw[0, 0].numel(), images_BCHW[0].numel()
        loss = reconstruction + cfg["kl_weight"]["end"] * kl * codes / values
        if cfg["code_usage_weight"]["end"]:
            p_V = log_p_BVhw.exp().mean((0, 2, 3))
            imbalance = math.log(cfg["vocab"]) + (p_V * p_V.clamp(min=1e-20).log()).sum()
            loss = loss + cfg["code_usage_weight"]["end"] * imbalance
        return loss


class Diffusion(nn.Module):
    """The squared error of the noise that the U-Net of diffusers predicts."""

    def __init__(self, cfg: dict[str, Any]):
        super().__init__()
        import diffusers

        multipliers, size = cfg["channel_multipliers"], cfg["image_size"]
        attention = [size // 2**level in cfg["attention_sizes"] for level in range(len(multipliers))]
        down = [("Attn" if attends else "") + "DownBlock2D" for attends in attention]
        self.unet = diffusers.UNet2DModel(
            sample_size=size,
            block_out_channels=[cfg["width"] * multiplier for multiplier in multipliers],
            layers_per_block=cfg["blocks"],
            down_block_types=down,
            up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
            attention_head_dim=None,
            norm_num_groups=cfg["norm_groups"] or 32,
            dropout=cfg["dropout"],
        )
        self.register_buffer("alpha_T", torch.linspace(1.0 - 1e-4, 1.0 - 2e-2, 1000).cumprod(0))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BCHW = images_BCHW.float() / 127.5 - 1
        t_B = torch.randint(0, 1000, (len(x_BCHW),), device=x_BCHW.device)
        noise_BCHW, alpha_B111 = torch.randn_like(x_BCHW), self.alpha_T[t_B][:, None, None, None]
        noisy_BCHW = alpha_B111.sqrt() * x_BCHW + (1 - alpha_B111).sqrt() * noise_BCHW
        return ((self.unet(noisy_BCHW, t_B).sample.float() - noise_BCHW) ** 2).mean()


def make_peer(job: dict[str, Any], device: str) -> tuple[nn.Module, list[torch.Tensor]]:
    """Return the network of a job, whose output is the loss, and a random batch."""
    cfg, dtype = job["model"], getattr(torch, job["dtype"])
    if cfg["kind"] == "dalle":
        lengths = (cfg["text_len"], cfg["grid"] ** 2)
        batch = [torch.randint(0, 8, (job["batch"], length), device=device) for length in lengths]
        return Dalle(cfg, dtype).to(device), batch
    shape = (job["batch"], 3, cfg["image_size"], cfg["image_size"])
    images_BCHW = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    model = DVAE(cfg) if cfg["kind"] == "dvae" else Diffusion(cfg)
    model = model.to(device, memory_format=torch.channels_last)
    return model, [images_BCHW.contiguous(memory_format=torch.channels_last)]


def check_parameters(peer: int, ours: int) -> None:
    """Exit unless both networks have the same number of parameters, up to one percent."""
    if abs(peer - ours) > 0.01 * ours:
        sys.exit(f"Expected about {ours:,} parameters as in dalle_jax, got {peer:,}. The networks differ.")


def time_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Time the training steps of a job and return the report."""
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cuda, optim = torch.cuda.is_available(), job["optim"]
    device = "cuda" if cuda else "cpu"
    model, batch = make_peer(job, device)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    check_parameters(count, job["parameters"])
    kernels = {module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    groups = [
        {"params": list(kernels), "weight_decay": optim["weight_decay"]},
        {"params": [parameter for parameter in parameters if parameter not in kernels], "weight_decay": 0.0},
    ]
    # Random rows need no schedule; the rate is small, so that the loss stays finite.
    optimizer = torch.optim.AdamW(
        groups, lr=1e-5, betas=(optim["b1"], optim["b2"]), eps=optim["eps"], fused=True
    )
    ema = [parameter.detach().clone() for parameter in parameters] if optim["ema_decay"] else []
    loss_fn = torch.compile(model)

    def step(number: int) -> float:
        begin = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            loss = loss_fn(*batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if optim["clip_norm"]:
            torch.nn.utils.clip_grad_norm_(parameters, optim["clip_norm"])
        optimizer.step()
        if ema and number % optim["ema_every"] == 0:
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1 - optim["ema_decay"])
        value = loss.item()  # waits
        seconds = time.perf_counter() - begin
        if not math.isfinite(value):
            sys.exit(f"Expected a finite loss, got {value}.")
        return seconds

    warmup = [step(number) for number in range(1, job["warmup_steps"] + 1)]
    seconds = [step(len(warmup) + number) for number in range(1, job["steps"] + 1)]
    version = f"torch {torch.__version__}"
    if job["model"]["kind"] == "diffusion":
        version += f", diffusers {sys.modules['diffusers'].__version__}"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "version": version,
        "parameters": count,
        "seconds": seconds,
        "compile_seconds": max(0.0, warmup[0] - min(seconds)),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True, help="JSON from benchmarks/train.py")
    job = json.loads(parser.parse_args().job)
    with contextlib.redirect_stdout(sys.stderr):
        report = time_steps(job)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
