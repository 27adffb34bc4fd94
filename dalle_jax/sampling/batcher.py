"""A queue of pictures to draw that keeps a batch of fixed shape busy (continuous batching, Yu et al. 2022, Orca).

    queue = Queue(cfg, params, slots=8)
    queue.submit(Request(text_T, seed=0, guidance=2.0))
    for ticket, codes_N in queue.drain(): ...

Each slot of the batch is at its own place of its own picture. When one is finished, its slot takes the next
request at once: its caption is run by itself and put where the old one was, while the other slots keep their
caches. A guided request takes two slots, the second on the null caption. At most five programs are compiled, whatever
comes: steps with and without top-p; one caption, as many as an eighth of the slots, or as many as there are. Requests
may differ in caption, seed, temperature, top-p, guidance and codes given in advance.
With `jacobi` a pass looks at several places (jacobi.py), and each slot goes on as far as its guesses are right, until
one is finished; while requests wait until an eighth of them are, as some is nearly always and the next captions
are cheaper together. The host does not look on before.
S slots, T text positions, N codes of a picture, P of them given in advance.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.config import TransformerConfig
from dalle_jax.models import autoregressive
from dalle_jax.sampling import decode_state as device
from dalle_jax.sampling.generate import row_keys
from dalle_jax.sampling.speculative import check_draft_len
from dalle_jax.typing import Params


class Request(NamedTuple):
    """One picture. text_T: int32 (T,). prime: int32 (P,), its first P < N codes. guidance: 1 is none."""

    text_T: np.ndarray
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    prefix_codes: np.ndarray = np.zeros(0, np.int32)


class ContinuousBatcher:
    """Requests wait here and are drawn in `slots` slots; holds the caches of those on the device.

    params: as `autoregressive.prepare_for_decode` returns them. top_k: of all requests, static; None keeps every code. jacobi:
    codes that one pass of the network looks at, static; the pictures are the same, up to rounding; None is one.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        params: Params,
        slots: int,
        *,
        top_k: int | None = None,
        jacobi: int | None = None,
    ):
        if slots < 1:
            raise ValueError(f"slots is {slots}; want at least 1, and 2 for guidance")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}; want at least 1, or None to keep every code")
        check_draft_len(cfg, jacobi)
        self._cfg = cfg
        self._params = autoregressive.prepare_for_decode(cfg, params)
        self._top_k, self._window = top_k, jacobi
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._tickets = itertools.count()
        self._free = list(range(slots))
        self._active: dict[int, tuple[int, Request, tuple[int, ...]]] = {}  # by slot: ticket, request, slots
        self._place = dict[int, int]()  # of active slots
        self._nucleus = False
        self._drawn = self._passes = 0  # of finished pictures
        self._slots = device.init_decode_state(cfg, slots)
        self._sizes = 1, -(-slots // 8), slots  # captions that one program runs

    @property
    def slots(self) -> int:
        return len(self._slots.place_S)

    def __len__(self) -> int:
        """Requests that wait or are being drawn."""
        return len(self._waiting) + len(self._active)

    @property
    def codes_per_pass(self) -> float | None:
        """Codes that a pass of the network drew of a picture, over all that are finished; None before the first. The
        first code of a picture comes with its caption and is not counted."""
        return self._drawn / self._passes if self._passes else None

    def submit(self, request: Request) -> int:
        """Adds one request. Returns its ticket: 0, 1, ... in the order of submission.

        Raises ValueError for a request that this model or queue cannot draw.
        """
        cfg, text = self._cfg, np.asarray(request.text_T)
        if text.shape != (cfg.text_len,) or not np.issubdtype(text.dtype, np.integer):
            raise ValueError(f"text is {text.dtype} {text.shape}; want integers ({cfg.text_len},)")
        prime = np.asarray(request.prefix_codes)
        if prime.ndim != 1 or len(prime) >= cfg.num_codes or not np.issubdtype(prime.dtype, np.integer):
            raise ValueError(
                f"prefix_codes is {prime.dtype} {prime.shape}; want integers, fewer than {cfg.num_codes}"
            )
        for name, value, holds, want in (
            ("seed", request.seed, 0 <= request.seed < 2**32, "an integer in [0, 2**32)"),
            ("temperature", request.temperature, 0 <= request.temperature < np.inf, "0 (greedy) or more"),
            ("top_p", request.top_p, 0 < request.top_p <= 1, "a share in (0, 1]"),
            (
                "guidance_scale",
                request.guidance_scale,
                0 <= request.guidance_scale < np.inf,
                "0 or more, 1 is none",
            ),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; want {want}")
        if self._wants(request) > self.slots:
            raise ValueError("guidance takes two slots, this queue has one; give it 2 or more")
        ticket = next(self._tickets)
        self._waiting.append((ticket, request._replace(text_T=text, prefix_codes=prime)))
        return ticket

    def step(self, most: int | None = None) -> list[tuple[int, np.ndarray]]:
        """Fills free slots, then draws until the next picture is finished, or for `most` passes of the network.

        Returns the finished pictures, ticket and codes, int32 (N,); [] if there is none yet, or nothing to do.
        """
        self._fill()
        if not self._active:
            return []
        self._advance(most)
        last = self._cfg.num_codes - 1
        done = [slot for slot, place in self._place.items() if place == last]
        if not done:
            return []
        codes_SN, passes_S = jax.device_get((self._slots.codes_SN, self._slots.passes_S))
        found = []
        for slot in done:
            ticket, request, held = self._active.pop(slot)
            del self._place[slot]
            self._free += held
            self._drawn += self._cfg.num_codes - max(1, len(request.prefix_codes))
            self._passes += int(passes_S[slot])
            found.append((ticket, codes_SN[slot].copy()))
        self._nucleus = any(request.top_p < 1 for _, request, _ in self._active.values())
        return found

    def _advance(self, most: int | None) -> None:
        """Draws until a picture is finished. The host knows when that is at one code a pass, and need not wait."""
        cfg, last = self._cfg, self._cfg.num_codes - 1
        how = {"top_k": self._top_k, "nucleus": self._nucleus}
        if self._window is None:
            left = last - max(self._place.values())
            count = left if most is None else min(left, most)
            self._slots = device.decode_steps(cfg, self._params, self._slots, jnp.int32(count), **how)
            self._place = {slot: place + count for slot, place in self._place.items()}
            return
        busy = self.slots - len(self._free)
        enough = min(self._sizes[1], busy) if self._waiting else 1
        counts = jnp.int32(last if most is None else most), jnp.int32(enough)
        self._slots = device.speculative_passes(cfg, self._params, self._slots, *counts, self._window, **how)
        place_S = np.asarray(self._slots.place_S)
        self._place = {slot: int(place_S[slot]) for slot in self._place}

    def drain(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every picture as it is finished, until nothing waits; more may be submitted meanwhile."""
        while self._waiting or self._active:
            yield from self.step()

    @staticmethod
    def _wants(request: Request) -> int:
        return 1 if request.guidance_scale == 1 else 2

    def _fill(self) -> None:
        """Requests in order, as far as slots are free, in the program for as few as there are."""
        taken = []
        while self._waiting and self._wants(self._waiting[0][1]) <= len(self._free):
            ticket, request = self._waiting.popleft()
            held = tuple(self._free.pop(0) for _ in range(self._wants(request)))
            taken.append((ticket, request, held))
            self._active[held[0]], self._place[held[0]] = taken[-1], 0
        self._nucleus |= any(request.top_p < 1 for _, request, _ in taken)
        if taken:
            size = next(size for size in self._sizes if size >= len(taken))
            new = self._arrivals(taken, size)
            self._slots = device.prefill_slots(self._cfg, self._params, self._slots, new, self._top_k)

    def _arrivals(self, taken: list[tuple[int, Request, tuple[int, ...]]], size: int) -> device.NewRequests:
        """Padded to `size` with copies of the last request for the slot that is dropped."""
        none, padded = self.slots, taken + taken[-1:] * (size - len(taken))
        codes = np.zeros((size, self._cfg.num_codes), np.int32)
        for i, (_, request, _) in enumerate(padded):
            codes[i, : len(request.prefix_codes)] = request.prefix_codes
        real = np.arange(size) < len(taken)
        requests = [request for _, request, _ in padded]

        def each(name: str) -> jax.Array:
            return jnp.asarray([getattr(request, name) for request in requests], jnp.float32)

        return device.NewRequests(
            text_AT=jnp.asarray(np.stack([request.text_T for request in requests]), jnp.int32),
            at_A=jnp.asarray(np.where(real, [held[0] for *_, held in padded], none), jnp.int32),
            null_A=jnp.asarray(
                np.where(real, [held[1] if len(held) > 1 else none for *_, held in padded], none), jnp.int32
            ),
            codes_AN=jnp.asarray(codes),
            given_A=jnp.asarray([len(request.prefix_codes) for request in requests], jnp.int32),
            keys_A=row_keys([request.seed for request in requests]),
            temperature_A=each("temperature"),
            top_p_A=each("top_p"),
            guidance_A=each("guidance_scale"),
        )
