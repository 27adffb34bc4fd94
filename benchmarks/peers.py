"""Samplers of other libraries for benchmarks/sample.py; needs torch, and transformers for `llama` and `gpt2`.

torch: a decoder with a static cache under torch.compile, in the manner of gpt-fast, with the layers of our Transformer.
llama, gpt2: `generate` of transformers with a static cache; `llama-compiled` compiles its forward pass. llamagen: the
model and `generate` of the LlamaGen checkout at $LLAMAGEN, which samples at least two codes.
B batch, T text positions, S positions, H heads, K top-k.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.sample import time_interleaved


def sample_top_k(logits_BV: torch.Tensor, k: int) -> torch.Tensor:
    """Sample codes (B, 1) among the k most probable, without waiting for the device."""
    values_BK, indices_BK = torch.topk(logits_BV, k)
    probs_BK = torch.softmax(values_BK.float(), -1)
    noise_BK = torch.empty_like(probs_BK).exponential_(1)
    return indices_BK.gather(1, torch.argmax(probs_BK / noise_BK, -1, keepdim=True))


class Layer(nn.Module):
    def __init__(self, job: dict[str, Any]):
        super().__init__()
        d, self.heads = job["dim"], job["heads"]
        self.norm_attn, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        length = job["text_len"] + job["grid"] ** 2
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(job["batch"], self.heads, length, d // self.heads))

    def forward(self, x_BTD, positions_T, mask_TS):
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(self.norm_attn(x_BTD)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        self.k[:, :, positions_T], self.v[:, :, positions_T] = k, v
        y = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask_TS[None, None])
        x_BTD = x_BTD + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x_BTD + self.down(F.gelu(self.up(self.norm_mlp(x_BTD)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, job: dict[str, Any]):
        super().__init__()
        d, self.length = job["dim"], job["text_len"] + job["grid"] ** 2
        self.embed = nn.Embedding(job["text_len"] + job["codes"], d)
        self.pos_embed = nn.Embedding(self.length, d)
        self.layers = nn.ModuleList(Layer(job) for _ in range(job["layers"]))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, job["codes"], bias=False)

    def forward(self, ids_BT, positions_T):
        mask_TS = torch.arange(self.length, device=ids_BT.device)[None] <= positions_T[:, None]
        x_BTD = self.embed(ids_BT) + self.pos_embed(positions_T)
        for layer in self.layers:
            x_BTD = layer(x_BTD, positions_T, mask_TS)
        return self.head(self.norm(x_BTD[:, -1])).float()


def torch_compiled(job: dict[str, Any], device: str, dtype: torch.dtype):
    model = Decoder(job).to(device, dtype).eval()

    def step(ids, position):
        return sample_top_k(model(ids, position), job["top_k"])

    compiled = torch.compile(step, mode="reduce-overhead" if device == "cuda" else None, fullgraph=True)
    text, n = job["text_len"], job["grid"] ** 2
    positions = torch.arange(text + n, device=device)  # created once: a copy to the device would wait for it

    def call(seed, count=n):
        torch.manual_seed(seed)
        ids = torch.zeros(job["batch"], text, dtype=torch.long, device=device)
        code = step(ids, positions[:text])
        codes = [code]
        for i in range(count - 1):
            position = positions[text + i : text + i + 1]
            code = compiled(code + text, position).clone()
            codes.append(code)
        return torch.cat(codes, 1)

    return call


def transformers_model(job: dict[str, Any], device: str, dtype: torch.dtype):
    import transformers

    length, vocab = job["text_len"] + job["grid"] ** 2, job["codes"]
    if job["name"] == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocab,
            n_positions=length,
            n_embd=job["dim"],
            n_layer=job["layers"],
            n_head=job["heads"],
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        # An MLP of three matrices with 8/3 of the width is as large as one of two with 4.
        config = transformers.LlamaConfig(
            vocab_size=vocab, hidden_size=job["dim"], intermediate_size=job["dim"] * 8 // 3,
            num_hidden_layers=job["layers"], num_attention_heads=job["heads"], max_position_embeddings=length,
            tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    model = model.to(device, dtype).eval()
    compiled = job["name"] == "llama-compiled"
    forward = torch.compile(model.forward, fullgraph=False) if compiled else model.forward
    text, n = job["text_len"], job["grid"] ** 2
    positions = torch.arange(text + n, device=device)  # created once: a copy to the device would wait for it

    def call(seed, count=n):
        torch.manual_seed(seed)
        cache = transformers.StaticCache(config=config, max_cache_len=length)
        ids = torch.zeros(job["batch"], text, dtype=torch.long, device=device)
        out = model.forward(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1,
            cache_position=positions[:text],
        )  # fmt: skip
        code = sample_top_k(out.logits[:, -1], job["top_k"])
        for i in range(count - 1):
            position = positions[text + i : text + i + 1]
            out = forward(input_ids=code, past_key_values=cache, use_cache=True, cache_position=position,
                          position_ids=position[None].expand(job["batch"], 1))  # fmt: skip
            code = sample_top_k(out.logits[:, -1], job["top_k"])
        return code

    return call


def llamagen(job: dict[str, Any], device: str, dtype: torch.dtype):
    sys.path.insert(0, os.environ["LLAMAGEN"])
    from autoregressive.models.generate import generate
    from autoregressive.models.gpt import ModelArgs, Transformer

    if job["grid"] ** 2 != 16 * 16 and job["grid"] ** 2 != 32 * 32:
        raise ValueError(f"Expected grid 16 or 32, got {job['grid']}.")
    args = ModelArgs(
        dim=job["dim"], n_layer=job["layers"], n_head=job["heads"], vocab_size=job["codes"], model_type="t2i",
        cls_token_num=job["text_len"], block_size=job["grid"] ** 2, caption_dim=job["dim"],
    )  # fmt: skip
    model = Transformer(args).to(device, dtype).eval()
    n = job["grid"] ** 2
    caption = torch.zeros(job["batch"], job["text_len"], job["dim"], device=device, dtype=dtype)

    def call(seed, count=n):
        torch.manual_seed(seed)
        return generate(
            model, caption, max(2, count), cfg_scale=1.0, temperature=1.0, top_k=job["top_k"], top_p=1.0
        )

    return call


PEERS = {
    "torch": torch_compiled, "llama": transformers_model, "llama-compiled": transformers_model,
    "gpt2": transformers_model, "llamagen": llamagen,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", required=True, help="workload as JSON, from benchmarks/sample.py")
    job = json.loads(parser.parse_args().job)
    if job["name"] not in PEERS:
        raise SystemExit(f"There is no peer {job['name']!r}. Use one of {', '.join(PEERS)}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
        call = PEERS[job["name"]](job, device, getattr(torch, job["dtype"]))

        def synchronized(seed, **count):
            call(seed, **count)
            if device == "cuda":
                torch.cuda.synchronize()

        begin = time.perf_counter()
        synchronized(0)
        first = time.perf_counter() - begin
        seconds, prefill = time_interleaved(
            [synchronized, lambda seed: synchronized(seed, count=1)], job["repeats"]
        )
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(json.dumps({
        "seconds": seconds, "prefill": prefill, "compile": max(0.0, first - min(seconds)),
        "version": f"torch {torch.__version__}", "device": name,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
