"""Training step of a U-Net with PyTorch and diffusers, for benchmarks/step.py; needs torch and diffusers.

`python -m benchmarks.step_peer JOB` with a JSON object of `benchmarks.step.peer_job`: network, batch and dtype. As in
our step there are AdamW (fused), gradient clipping and averaged parameters; bfloat16 is by autocast, the layout is
channels last, and torch.compile compiles the network. Prints one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import diffusers
import torch


def main(job: dict) -> None:
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    sides = [job["image_size"] // 2**level for level in range(len(job["channel_multipliers"]))]
    down = [("Attn" if side in job["attention_sizes"] else "") + "DownBlock2D" for side in sides]
    model = diffusers.UNet2DModel(
        sample_size=job["image_size"],
        block_out_channels=[job["width"] * m for m in job["channel_multipliers"]],
        layers_per_block=job["blocks"],
        down_block_types=down,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(down)],
        attention_head_dim=None,
        norm_num_groups=job["groups"],
        dropout=job["dropout"],
    ).to(device, memory_format=torch.channels_last)
    ema = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0, fused=cuda)
    forward = torch.compile(model)
    alpha_T = torch.linspace(1.0 - 1e-4, 1.0 - 2e-2, 1000, device=device).cumprod(0)
    clean = torch.rand(job["batch"], 3, job["image_size"], job["image_size"], device=device) * 2 - 1
    clean = clean.contiguous(memory_format=torch.channels_last)

    def step() -> float:
        begin = time.perf_counter()
        t_B = torch.randint(0, 1000, (job["batch"],), device=device)
        noise = torch.randn_like(clean)
        alpha = alpha_T[t_B][:, None, None, None]
        with torch.autocast(device, torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
            prediction = forward(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t_B).sample
        loss = ((prediction.float() - noise) ** 2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(model.parameters()), 1e-4)
        loss.item()  # waits
        return time.perf_counter() - begin

    for _ in range(job["warmup_steps"]):
        step()
    seconds = statistics.median(step() for _ in range(job["steps"]))
    print(
        json.dumps(
            {
                "peer": f"diffusers {diffusers.__version__}, torch {torch.__version__}",
                "device": torch.cuda.get_device_name() if cuda else "cpu",
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds_per_step": seconds,
                "rows_per_second": job["batch"] / seconds,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
