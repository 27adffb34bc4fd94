"""A queue of pictures to draw that keeps a batch of fixed shape busy (continuous batching, Yu et al. 2022, Orca).

    queue = Queue(cfg, params, slots=8)
    queue.submit(Request(text_T, seed=0, guidance=2.0))
    for ticket, codes_N in queue.drain(): ...

Each slot of the batch is at its own place of its own picture. When one is finished, its slot takes the next
request at once: its caption is run by itself and put where the old one was, while the other slots keep their
caches. A guided request takes two slots, the second on the null caption. At most four programs are compiled, whatever
comes: steps with and without top-p, one caption or as many as there are slots. Requests may differ in caption,
seed, temperature, top-p, guidance and codes given in advance.
S slots, A slots filled at once, T text positions, N codes of a picture, V image vocabulary.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax import autoregressive
from dalle_jax.config import Kernels, TransformerConfig
from dalle_jax.sampling.filters import draw, guide
from dalle_jax.sampling.generate import row_keys

Params = dict[str, Any]


class Request(NamedTuple):
    """One picture. text_T: int32 (T,). prime: int32 (P,), its first P < N codes. guidance: 1 is none."""

    text_T: np.ndarray
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    guidance: float = 1.0
    prime: np.ndarray = np.zeros(0, np.int32)


class _Slots(NamedTuple):
    """What the device holds. A slot on the null caption repeats the codes of its `leader`, whose `null` it is."""

    cache: autoregressive.Cache
    codes_SN: jax.Array
    place_S: jax.Array  # of the code that is fed next; N - 1 at the end
    given_S: jax.Array  # codes below this place are not drawn
    keys_S: jax.Array
    temperature_S: jax.Array
    top_p_S: jax.Array
    guidance_S: jax.Array
    leader_S: jax.Array
    null_S: jax.Array


def _pick(logits_SV, nulls_SV, guided_S, guidance_S, keys_S, place_S, temperature_S, top_p_S, top_k, nucleus):
    """A row without guidance has its own scores, to the last bit."""
    mixed_SV = guide(logits_SV, nulls_SV, guidance_S)
    logits_SV = jnp.where(guided_S[:, None], mixed_SV, logits_SV)
    keys_S = jax.vmap(jax.random.fold_in)(keys_S, place_S)
    top_p = top_p_S if nucleus else None
    return draw(logits_SV, keys_S, temperature=temperature_S, top_k=top_k, top_p=top_p)


@functools.partial(jax.jit, static_argnames=("cfg", "top_k", "nucleus", "kernels"), donate_argnames="slots")
def _steps(
    cfg: TransformerConfig,
    params: Params,
    slots: _Slots,
    count,
    top_k,
    nucleus: bool,
    kernels: Kernels = "xla",
) -> _Slots:
    """`count` steps of all slots; finished and empty ones stay where they are."""
    rows, last = jnp.arange(len(slots.place_S)), cfg.num_codes - 1

    def step(_, slots: _Slots) -> _Slots:
        code_S = slots.codes_SN[rows, slots.place_S]
        logits_SV, cache = autoregressive.decode_step(
            cfg, params, slots.cache, code_S, slots.place_S, kernels
        )
        after_S = jnp.minimum(slots.place_S + 1, last)
        drawn_S = _pick(
            logits_SV, logits_SV[slots.null_S], slots.null_S != rows, slots.guidance_S, slots.keys_S, after_S,
            slots.temperature_S, slots.top_p_S, top_k, nucleus,
        )  # fmt: skip
        there_S = slots.codes_SN[rows, after_S]
        keep_S = (after_S < slots.given_S) | (slots.place_S == last)
        next_S = jnp.where(keep_S, there_S, drawn_S)[slots.leader_S]
        return slots._replace(
            cache=cache, codes_SN=slots.codes_SN.at[rows, after_S].set(next_S), place_S=after_S
        )

    with jax.named_scope("decode"):
        return jax.lax.fori_loop(0, count, step, slots)


class _Arrivals(NamedTuple):
    """Requests for the slots `at_A`, and for their null captions the slots `null_A`; S where there is none."""

    text_AT: jax.Array
    at_A: jax.Array
    null_A: jax.Array
    codes_AN: jax.Array  # the given ones first
    given_A: jax.Array
    keys_A: jax.Array
    temperature_A: jax.Array
    top_p_A: jax.Array
    guidance_A: jax.Array


@functools.partial(jax.jit, static_argnames=("cfg", "top_k"), donate_argnames="slots")
def _admit(cfg: TransformerConfig, params: Params, slots: _Slots, new: _Arrivals, top_k) -> _Slots:
    """Runs the captions and begins their pictures; rows for the slot S are dropped."""
    count, size = len(slots.place_S), len(new.at_A)
    with jax.named_scope("prefill"):
        logits, fresh = autoregressive.prefill(cfg, params, new.text_AT, guided=True)
    own_AV, null_AV = jnp.split(logits, 2)
    guided_A = new.null_A < count
    first_A = _pick(
        own_AV, null_AV, guided_A, new.guidance_A, new.keys_A, jnp.zeros_like(new.at_A), new.temperature_A,
        new.top_p_A, top_k, True,
    )  # fmt: skip
    first_A = jnp.where(new.given_A > 0, new.codes_AN[:, 0], first_A)
    both = jnp.concatenate([new.at_A, new.null_A])

    cache = autoregressive.seat(cfg, slots.cache, fresh, both)

    def put(old, value):
        return old.at[both].set(jnp.concatenate([value, value]), mode="drop")

    keys = jax.random.wrap_key_data(put(jax.random.key_data(slots.keys_S), jax.random.key_data(new.keys_A)))
    return _Slots(
        cache=cache,
        codes_SN=put(slots.codes_SN, new.codes_AN.at[:, 0].set(first_A)),
        place_S=put(slots.place_S, jnp.zeros(size, jnp.int32)),
        given_S=put(slots.given_S, new.given_A),
        keys_S=keys,
        temperature_S=put(slots.temperature_S, new.temperature_A),
        top_p_S=put(slots.top_p_S, new.top_p_A),
        guidance_S=put(slots.guidance_S, new.guidance_A),
        leader_S=put(slots.leader_S, new.at_A),
        null_S=slots.null_S.at[both].set(
            jnp.concatenate([jnp.where(guided_A, new.null_A, new.at_A), new.null_A]), mode="drop"
        ),
    )


class Queue:
    """Requests wait here and are drawn in `slots` slots; holds the caches of those on the device.

    params: as `autoregressive.unstack` returns them. top_k: of all requests, static; None keeps every code. kernels: as
    of `generate`.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        params: Params,
        slots: int,
        *,
        top_k: int | None = None,
        kernels: Kernels = "xla",
    ):
        if slots < 1:
            raise ValueError(f"slots is {slots}; want at least 1, and 2 for guidance")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; want at least 1, or None to keep every code")
        self._cfg = cfg
        self._params = autoregressive.unstack(cfg, params, platform=None if kernels == "xla" else "gpu")
        self._top_k, self._kernels = top_k, kernels
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._tickets = itertools.count()
        self._free = list(range(slots))
        self._active: dict[int, tuple[int, Request, tuple[int, ...]]] = {}  # by slot: ticket, request, slots
        self._place = dict[int, int]()  # of active slots
        self._nucleus = False
        none = jnp.zeros(slots, jnp.int32)
        empty = _Slots(
            cache=autoregressive.init_cache(cfg, slots),
            codes_SN=jnp.zeros((slots, cfg.num_codes), jnp.int32),
            place_S=jnp.full(slots, cfg.num_codes - 1),
            given_S=none,
            keys_S=row_keys(np.zeros(slots)),
            temperature_S=jnp.ones(slots),
            top_p_S=jnp.ones(slots),
            guidance_S=jnp.ones(slots),
            leader_S=jnp.arange(slots),
            null_S=jnp.arange(slots),
        )
        self._slots = jax.tree.map(jnp.copy, empty)  # no array twice: all of them are donated to each program

    @property
    def slots(self) -> int:
        return len(self._slots.place_S)

    def __len__(self) -> int:
        """Requests that wait or are being drawn."""
        return len(self._waiting) + len(self._active)

    def submit(self, request: Request) -> int:
        """Adds one request. Returns its ticket: 0, 1, ... in the order of submission.

        Raises ValueError for a request that this model or queue cannot draw.
        """
        cfg, text = self._cfg, np.asarray(request.text_T)
        if text.shape != (cfg.text_len,) or not np.issubdtype(text.dtype, np.integer):
            raise ValueError(f"text is {text.dtype} {text.shape}; want integers ({cfg.text_len},)")
        prime = np.asarray(request.prime)
        if prime.ndim != 1 or len(prime) >= cfg.num_codes or not np.issubdtype(prime.dtype, np.integer):
            raise ValueError(
                f"prime is {prime.dtype} {prime.shape}; want integers, fewer than {cfg.num_codes}"
            )
        for name, value, holds, want in (
            ("seed", request.seed, 0 <= request.seed < 2**32, "an integer in [0, 2**32)"),
            ("temperature", request.temperature, 0 <= request.temperature < np.inf, "0 (greedy) or more"),
            ("top_p", request.top_p, 0 < request.top_p <= 1, "a share in (0, 1]"),
            ("guidance", request.guidance, 0 <= request.guidance < np.inf, "0 or more, 1 is none"),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; want {want}")
        if self._wants(request) > self.slots:
            raise ValueError("guidance takes two slots, this queue has one; give it 2 or more")
        ticket = next(self._tickets)
        self._waiting.append((ticket, request._replace(text_T=text, prime=prime)))
        return ticket

    def step(self, most: int | None = None) -> list[tuple[int, np.ndarray]]:
        """Fills free slots, then draws until the next picture is finished, or for `most` codes.

        Returns the finished pictures, ticket and codes, int32 (N,); [] if there is none yet, or nothing to do.
        """
        self._fill()
        if not self._active:
            return []
        last = self._cfg.num_codes - 1
        count = last - max(self._place.values())
        count = count if most is None else min(count, most)
        if count:
            self._slots = _steps(
                self._cfg,
                self._params,
                self._slots,
                jnp.int32(count),
                self._top_k,
                self._nucleus,
                self._kernels,
            )
        self._place = {slot: place + count for slot, place in self._place.items()}
        done = [slot for slot, place in self._place.items() if place == last]
        if not done:
            return []
        codes_SN, found = np.asarray(self._slots.codes_SN), []
        for slot in done:
            ticket, _, held = self._active.pop(slot)
            del self._place[slot]
            self._free += held
            found.append((ticket, codes_SN[slot].copy()))
        self._nucleus = any(request.top_p < 1 for _, request, _ in self._active.values())
        return found

    def drain(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every picture as it is finished, until nothing waits; more may be submitted meanwhile."""
        while self._waiting or self._active:
            yield from self.step()

    @staticmethod
    def _wants(request: Request) -> int:
        return 1 if request.guidance == 1 else 2

    def _fill(self) -> None:
        """Requests in order, as far as slots are free, in one program for one request or one for many."""
        taken = []
        while self._waiting and self._wants(self._waiting[0][1]) <= len(self._free):
            ticket, request = self._waiting.popleft()
            held = tuple(self._free.pop(0) for _ in range(self._wants(request)))
            taken.append((ticket, request, held))
            self._active[held[0]], self._place[held[0]] = taken[-1], 0
        self._nucleus |= any(request.top_p < 1 for _, request, _ in taken)
        size = self.slots if len(taken) > 1 else 1
        if taken:
            new = self._arrivals(taken, size)
            self._slots = _admit(self._cfg, self._params, self._slots, new, self._top_k)

    def _arrivals(self, taken: list[tuple[int, Request, tuple[int, ...]]], size: int) -> _Arrivals:
        """Padded to `size` with copies of the last request for the slot that is dropped."""
        none, padded = self.slots, taken + taken[-1:] * (size - len(taken))
        codes = np.zeros((size, self._cfg.num_codes), np.int32)
        for i, (_, request, _) in enumerate(padded):
            codes[i, : len(request.prime)] = request.prime
        real = np.arange(size) < len(taken)
        requests = [request for _, request, _ in padded]

        def each(name: str) -> jax.Array:
            return jnp.asarray([getattr(request, name) for request in requests], jnp.float32)

        return _Arrivals(
            text_AT=jnp.asarray(np.stack([request.text_T for request in requests]), jnp.int32),
            at_A=jnp.asarray(np.where(real, [held[0] for *_, held in padded], none), jnp.int32),
            null_A=jnp.asarray(
                np.where(real, [held[1] if len(held) > 1 else none for *_, held in padded], none), jnp.int32
            ),
            codes_AN=jnp.asarray(codes),
            given_A=jnp.asarray([len(request.prime) for request in requests], jnp.int32),
            keys_A=row_keys([request.seed for request in requests]),
            temperature_A=each("temperature"),
            top_p_A=each("top_p"),
            guidance_A=each("guidance"),
        )
