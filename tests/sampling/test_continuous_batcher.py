"""Laws of continuous batching: an image equals the one sampled alone, whatever shares the batch, sequential and
speculative;
no program compiles again."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import CAPTIONS, FAMILIES, TINY, captioned_params, family_batch, family_params

from dalle_jax.models import autoregressive, dalle
from dalle_jax.sampling import decode_state
from dalle_jax.sampling.continuous_batcher import ContinuousBatcher, SamplingRequest
from dalle_jax.sampling.generate import generate, row_keys

# A ring buffer; test_kv_cache.py and test_speculative.py have rows at different positions for every kind.
CFG = dataclasses.replace(TINY, grid=5, attention=("row",), layers=1)
N, V = CFG.num_codes, CFG.image_vocab


@pytest.fixture(scope="module")
def params():
    return autoregressive.prepare_for_decode(CFG, captioned_params(CFG))


def requests(count):
    """Mixtures of caption, seed, temperature, top-p, guidance and prefix codes."""
    rng = np.random.default_rng(0)
    texts = [*np.asarray(CAPTIONS), np.asarray(dalle.null_text(CFG))]
    return [
        SamplingRequest(
            texts[i // 2 % 4],
            seed=int(rng.integers(2**32)),
            temperature=[1.0, 0.7, 0.0][i % 3],
            top_p=[1.0, 0.8][i // 2 % 2],
            guidance_scale=[1.0, 3.0, 1.0, 0.5][i % 4],
            prefix_codes=rng.integers(0, V, [0, 0, 11, 0][i % 4]).astype(np.int32),
        )
        for i in range(count)
    ]


def alone(params, request):
    """The same image by `generate`, in a batch of one."""
    prefix = {"prefix_codes": jnp.asarray(request.prefix_codes)[None]} if len(request.prefix_codes) else {}
    return np.asarray(
        generate(
            CFG, params, jnp.asarray(request.text_T)[None], row_keys([request.seed]),
            temperature=jnp.float32(request.temperature), top_p=jnp.float32(request.top_p),
            guidance_scale=jnp.float32(request.guidance_scale), **prefix,
        )
    )[0]  # fmt: skip


COUNT, SLOTS, DRAFT_LEN = 20, 9, 6
sequential_or_speculative = pytest.mark.parametrize("draft_len", [None, DRAFT_LEN])


@pytest.fixture(scope="module")
def wanted(params):
    return [alone(params, request) for request in requests(COUNT)]


@sequential_or_speculative
def test_every_image_equals_the_one_sampled_alone(params, wanted, draft_len):
    """With mixed seeds, guidance, temperature, top-p and prefix lengths; slots finish at different times."""
    batcher = ContinuousBatcher(CFG, params, SLOTS, draft_len=draft_len)
    assert [batcher.submit(request) for request in requests(COUNT)] == list(range(COUNT))
    assert batcher.codes_per_pass is None
    found = dict(batcher.drain())
    assert sorted(found) == list(range(COUNT)) and len(batcher) == 0
    for ticket, want in enumerate(wanted):
        np.testing.assert_array_equal(found[ticket], want, err_msg=str(requests(COUNT)[ticket]))
    assert len(np.unique(wanted, axis=0)) == COUNT
    assert batcher.codes_per_pass == 1 if draft_len is None else 1.2 < batcher.codes_per_pass < DRAFT_LEN


FAMILY_MODELS = {  # with the fewest layers that have all options
    "dalle_mini": dataclasses.replace(FAMILIES["dalle_mini"], encoder_layers=1, layers=1),
    "malevich_v2": dataclasses.replace(FAMILIES["malevich_v2"], attention=("row",), layers=2),
    "llamagen_t2i": dataclasses.replace(
        FAMILIES["llamagen_t2i"],
        layers=1,
        text_encoder=dataclasses.replace(FAMILIES["llamagen_t2i"].text_encoder, layers=1),
    ),
}


@pytest.mark.parametrize("cfg", FAMILY_MODELS.values(), ids=FAMILY_MODELS)
def test_other_families(cfg):
    """Encoder-decoder, shifted masks, toroidal windows, RoPE, padded captions: sequential and speculative decoding, in
    a batch
    and in the batcher, with and without guidance, sample the same images."""
    params = autoregressive.prepare_for_decode(cfg, family_params(cfg))
    text, scales = family_batch(cfg, 2)[0], [1.0, 2.0, 1.0, 0.5]
    options = {"temperature": jnp.float32(0.5), "guidance_scale": jnp.array(scales)}
    want = generate(cfg, params, text, row_keys(range(4)), **options)
    got, passes = generate(
        cfg, params, text, row_keys(range(4)), draft_len=DRAFT_LEN, return_num_passes=True, **options
    )
    np.testing.assert_array_equal(got, want)
    assert (passes < cfg.num_codes - 1).all()
    new_requests = [
        SamplingRequest(
            np.asarray(text)[i // 2],
            seed=i,
            temperature=0.5,
            guidance_scale=scale,
            prefix_codes=want[i, : i % 2 * 2],
        )
        for i, scale in enumerate(scales)
    ]
    for draft_len in (None, DRAFT_LEN):
        batcher, found = ContinuousBatcher(cfg, params, num_slots=3, draft_len=draft_len), {}
        for request in new_requests:  # one by one, so that slots are at different positions
            batcher.submit(request)
            found |= dict(batcher.step(max_passes=3))
        found |= dict(batcher.drain())
        for ticket, codes in found.items():
            np.testing.assert_array_equal(codes, want[ticket], err_msg=f"{ticket}, {draft_len}")
        assert len(found) == 4


@sequential_or_speculative
def test_requests_submitted_during_decoding(params, wanted, draft_len):
    """A new request takes a free slot and changes no other."""
    batcher, found, waiting = ContinuousBatcher(CFG, params, SLOTS, draft_len=draft_len), {}, requests(COUNT)
    while waiting or len(batcher):
        for request in waiting[:2]:
            batcher.submit(request)
        waiting = waiting[2:]
        found |= dict(batcher.step(max_passes=7 if draft_len is None else 2))
    for ticket, want in enumerate(wanted):
        np.testing.assert_array_equal(found[ticket], want)


def test_codes_per_pass_by_hand():
    """With every draft accepted: 24 codes after the first in passes of 6, and the last 14 of 25 in the three passes
    after the
    prefix."""
    batcher = ContinuousBatcher(
        CFG, jax.tree.map(jnp.zeros_like, captioned_params(CFG)), SLOTS, draft_len=DRAFT_LEN
    )
    text = np.asarray(CAPTIONS[0])
    batcher.submit(SamplingRequest(text, seed=0, temperature=0.0))
    batcher.submit(
        SamplingRequest(
            text, seed=0, temperature=0.0, guidance_scale=2.0, prefix_codes=np.zeros(11, np.int32)
        )
    )
    for _, codes in batcher.drain():
        np.testing.assert_array_equal(codes, 0)
    assert batcher.codes_per_pass == (24 + 14) / (4 + 3)


def test_slots_are_refilled_by_eighths(params):
    """While requests wait, speculative decoding continues until two of the nine slots are finished. Afterwards each
    image is
    returned when it is finished."""
    batcher = ContinuousBatcher(CFG, params, SLOTS, draft_len=DRAFT_LEN)
    for request in requests(2 * COUNT):
        if request.guidance_scale == 1:
            batcher.submit(request)
    waited, after = [], []
    while len(batcher):
        (waited if len(batcher) > SLOTS else after).append(len(batcher.step()))
    assert min(waited) >= 2 and min(after) == 1 and sum(waited + after) == COUNT


@sequential_or_speculative
def test_no_program_compiles_again(params, draft_len):
    """After one request, and many with top-p among them, others in other numbers and orders compile nothing."""
    programs = [
        decode_state.decode_slots,
        decode_state.decode_slots_speculatively,
        decode_state.prefill_slots,
    ]
    batcher = ContinuousBatcher(CFG, params, SLOTS, draft_len=draft_len)
    for many in (requests(1), requests(2), requests(COUNT)):
        for request in many:
            batcher.submit(request)
        list(batcher.drain())
    compiled = [program._cache_size() for program in programs]
    for request in reversed(requests(COUNT)):
        batcher.submit(request._replace(guidance_scale=request.guidance_scale * 1.1, temperature=0.3))
        if len(batcher) > 5:
            batcher.step(max_passes=4)
    assert len(dict(batcher.drain())) > 0
    assert [program._cache_size() for program in programs] == compiled


def test_device_memory_does_not_grow(params):
    """Finished images are not kept on the device."""
    batcher = ContinuousBatcher(CFG, params, SLOTS)

    def held(rounds):
        for request in requests(5) * rounds:
            batcher.submit(request)
        list(batcher.drain())
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    assert held(1) == held(4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"text_T": np.zeros(2, np.int32)}, r"Expected text of integers \(3,\), got int32 \(2,\)"),
        ({"text_T": np.zeros(3)}, "got float64"),
        ({"seed": -1}, "Expected seed to be an integer in .*, got -1"),
        ({"temperature": float("nan")}, "Expected temperature to be 0 .* or more, got nan"),
        ({"top_p": 0.0}, "Expected top_p to be a fraction .*, got 0.0"),
        ({"guidance_scale": -1.0}, "Expected guidance_scale to be 0 or more .*, got -1.0"),
        ({"guidance_scale": 2.0}, "Expected at least 2 slots for guidance, got 1"),
        (
            {"prefix_codes": np.zeros(N, np.int32)},
            rf"Expected prefix_codes of fewer than {N} integers, got int32 \({N},\)",
        ),
    ],
)
def test_invalid_requests(params, change, match):
    batcher = ContinuousBatcher(CFG, params, num_slots=1)
    with pytest.raises(ValueError, match=match):
        batcher.submit(requests(1)[0]._replace(**change))
    assert len(batcher) == 0 and batcher.step() == []


def test_invalid_batchers(params):
    with pytest.raises(ValueError, match="Expected num_slots of at least 1, got 0"):
        ContinuousBatcher(CFG, params, num_slots=0)
    with pytest.raises(ValueError, match="Expected top_k of at least 1, got 0"):
        ContinuousBatcher(CFG, params, num_slots=1, top_k=0)
    for draft_len in (1, N + 1):
        with pytest.raises(ValueError, match=f"Expected draft_len from 2 to {N}, got {draft_len}"):
            ContinuousBatcher(CFG, params, num_slots=1, draft_len=draft_len)
