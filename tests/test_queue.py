"""Laws of the queue: a picture is the one sampled alone, whatever shares the batch, and nothing compiles again."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_families
from test_families import FAMILIES
from test_sampling import CAPTIONS, TINY, lively

from dalle_jax import autoregressive, dalle
from dalle_jax.sampling import queue as queues
from dalle_jax.sampling.generate import generate, row_keys
from dalle_jax.sampling.queue import Queue, Request

# A ring and columns; tests/test_cache.py has rows at places of their own for every kind.
CFG = dataclasses.replace(TINY, grid=5, attention=("row", "column"), layers=2)
N, V = CFG.num_codes, CFG.image_vocab


@pytest.fixture(scope="module")
def params():
    return autoregressive.unstack(CFG, lively(CFG))


def requests(count):
    """Mixtures of caption, seed, temperature, top-p, guidance and given codes."""
    rng = np.random.default_rng(0)
    texts = [*np.asarray(CAPTIONS), np.asarray(dalle.null_text(CFG))]
    return [
        Request(
            texts[i // 2 % 4],
            seed=int(rng.integers(2**32)),
            temperature=[1.0, 0.7, 0.0][i % 3],
            top_p=[1.0, 0.8][i // 2 % 2],
            guidance=[1.0, 3.0, 1.0, 0.5][i % 4],
            prime=rng.integers(0, V, [0, 0, 11, 0][i % 4]).astype(np.int32),
        )
        for i in range(count)
    ]


def alone(params, request, top_k=None):
    """The same picture by `generate`, in a batch of one."""
    prime = {"prime_BP": jnp.asarray(request.prime)[None]} if len(request.prime) else {}
    guided = {"guidance": jnp.float32(request.guidance)} if request.guidance != 1 else {}
    return np.asarray(
        generate(
            CFG, params, jnp.asarray(request.text_T)[None], row_keys([request.seed]), top_k=top_k,
            temperature=jnp.float32(request.temperature), top_p=jnp.float32(request.top_p), **prime, **guided,
        )
    )[0]  # fmt: skip


@pytest.fixture(scope="module")
def wanted(params):
    return [alone(params, request) for request in requests(12)]


def test_every_picture_is_the_one_sampled_alone(params, wanted):
    """With seeds, guidance, temperature, top-p and given codes of all lengths mixed; slots end at all times."""
    queue = Queue(CFG, params, slots=3)
    assert [queue.submit(request) for request in requests(12)] == list(range(12))
    found = dict(queue.drain())
    assert sorted(found) == list(range(12)) and len(queue) == 0
    for ticket, want in enumerate(wanted):
        np.testing.assert_array_equal(found[ticket], want, err_msg=str(requests(12)[ticket]))
    assert len(np.unique(wanted, axis=0)) == 12


@pytest.mark.parametrize("name", ["dalle_mini", "malevich_v2", "llamagen_t2i"])
def test_other_families(name):
    """An encoder with a decoder, and text in the raster; more requests than slots, with and without guidance."""
    cfg = FAMILIES[name]
    params = autoregressive.unstack(cfg, test_families.lively(cfg))
    text = np.asarray(test_families.rows(cfg, 3)[0])
    asked = [
        Request(text[i % 3], seed=i, guidance=[1.0, 2.0][i % 2], prime=np.arange(i % 2 * 2, dtype=np.int32))
        for i in range(6)
    ]
    queue = Queue(cfg, params, slots=3)
    for request in asked:
        queue.submit(request)
    for ticket, codes in queue.drain():
        request = asked[ticket]
        want = generate(
            cfg, params, jnp.asarray(request.text_T)[None], row_keys([request.seed]),
            guidance=jnp.float32(request.guidance) if request.guidance != 1 else None,
            prime_BP=jnp.asarray(request.prime)[None] if len(request.prime) else None,
        )  # fmt: skip
        np.testing.assert_array_equal(codes, want[0], err_msg=str(ticket))


def test_requests_that_come_while_others_are_drawn(params, wanted):
    """In the midst of the work a new request takes a slot, and no other moves."""
    queue, found, waiting = Queue(CFG, params, slots=3), {}, requests(12)
    while waiting or len(queue):
        for request in waiting[:2]:
            queue.submit(request)
        waiting = waiting[2:]
        found |= dict(queue.step(most=7))
    for ticket, want in enumerate(wanted):
        np.testing.assert_array_equal(found[ticket], want)


def test_four_programs_are_enough(params):
    """One request, and many with top-p among them; then others, in other numbers and orders, compile nothing more."""
    queue = Queue(CFG, params, slots=3)
    for many in (requests(1), requests(12)):
        for request in many:
            queue.submit(request)
        list(queue.drain())
    programs = queues._steps._cache_size(), queues._admit._cache_size()
    for request in reversed(requests(20)):
        queue.submit(request._replace(guidance=request.guidance * 1.1, temperature=0.3))
        if len(queue) > 5:
            queue.step(most=4)
    assert len(dict(queue.drain())) > 0
    assert (queues._steps._cache_size(), queues._admit._cache_size()) == programs


def test_memory_stays(params):
    """The device holds the slots, not what was drawn."""
    queue = Queue(CFG, params, slots=3)

    def held(rounds):
        for request in requests(5) * rounds:
            queue.submit(request)
        list(queue.drain())
        gc.collect()
        return sum(x.nbytes for x in jax.live_arrays())

    assert held(1) == held(4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"text_T": np.zeros(2, np.int32)}, r"text is int32 \(2,\); want integers \(3,\)"),
        ({"text_T": np.zeros(3)}, "text is float64"),
        ({"seed": -1}, "seed is -1; want an integer in"),
        ({"temperature": float("nan")}, "temperature is nan; want 0"),
        ({"top_p": 0.0}, "top_p is 0.0; want a share"),
        ({"guidance": -1.0}, "guidance is -1.0; want 0 or more"),
        ({"guidance": 2.0}, "guidance takes two slots, this queue has one"),
        ({"prime": np.zeros(N, np.int32)}, rf"prime is int32 \({N},\); want integers, fewer than {N}"),
    ],
)
def test_what_it_cannot_draw(params, change, match):
    queue = Queue(CFG, params, slots=1)
    with pytest.raises(ValueError, match=match):
        queue.submit(requests(1)[0]._replace(**change))
    assert len(queue) == 0 and queue.step() == []


def test_bad_queues(params):
    with pytest.raises(ValueError, match="slots is 0; want at least 1"):
        Queue(CFG, params, slots=0)
    with pytest.raises(ValueError, match="top_k is 0; want at least 1"):
        Queue(CFG, params, slots=1, top_k=0)
