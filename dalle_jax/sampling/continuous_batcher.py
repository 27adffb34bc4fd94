"""Continuous batching (Yu et al. 2022, Orca): requests share a batch of fixed shape whose slots are refilled as they
finish.

    batcher = ContinuousBatcher(cfg, params, num_slots=8)
    batcher.submit(SamplingRequest(text_T, seed=0, guidance_scale=2.0))
    for ticket, codes_N in batcher.drain(): ...

Each slot of the batch is at its own position of its own image. When an image is finished, its slot takes the next
request at once: the caption is prefilled alone and its keys and values replace the old ones, while the other slots keep
their caches. A request with guidance takes two slots, the second on the null caption. Requests may differ in caption,
seed, temperature, top-p, guidance and prefix codes. At most five programs are compiled, whatever is submitted: decoding
with and without top-p; prefill of one caption, of an eighth of the slots, and of all slots.

With `draft_len` decoding is speculative (speculative.py) and each slot advances by its accepted drafts until one image
is finished. While requests wait, decoding continues until an eighth of the slots are finished, because some image is
finished in nearly every pass, and the next captions are cheaper together. The host does not read the state in between.
S slots, A slots prefilled at once, T text positions, N codes, P prefix codes.
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
from dalle_jax.sampling.decode_state import (
    NewRequests,
    decode_slots,
    decode_slots_speculatively,
    init_decode_state,
    prefill_slots,
)
from dalle_jax.sampling.generate import row_keys
from dalle_jax.sampling.speculative import check_draft_len
from dalle_jax.typing import Params


class SamplingRequest(NamedTuple):
    """One image to sample.

    Attributes:
      text_T: int32 (T,), the caption.
      seed: in [0, 2**32).
      temperature: 0 or more; 0 is greedy decoding.
      top_p: in (0, 1]; 1 keeps every code.
      guidance_scale: 0 or more; 1 is no guidance.
      prefix_codes: int32 (P,), the first P < N codes.
    """

    text_T: np.ndarray
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    guidance_scale: float = 1.0
    prefix_codes: np.ndarray = np.zeros(0, np.int32)


class _Active(NamedTuple):
    """A request that is decoded; slots: its own and, with guidance, the one on the null caption."""

    ticket: int
    request: SamplingRequest
    slots: tuple[int, ...]


class ContinuousBatcher:
    """A queue of requests and the device state of the slots that decode them.

    Args:
      cfg: the model.
      params: of `autoregressive.init` or `autoregressive.prepare_for_decode`.
      num_slots: rows of the batch, at least 1; 2 for requests with guidance.
      top_k: of all requests; None keeps every code.
      draft_len: codes per forward pass of speculative decoding, 2 to N. The images are the same, up to rounding. None
        decodes one code per pass.

    Raises:
      ValueError: invalid num_slots, top_k or draft_len.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        params: Params,
        num_slots: int,
        *,
        top_k: int | None = None,
        draft_len: int | None = None,
    ):
        if num_slots < 1:
            raise ValueError(f"Expected num_slots of at least 1, got {num_slots}. Guidance needs 2.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"Expected top_k of at least 1, got {top_k}. Use None to keep every code.")
        check_draft_len(cfg, draft_len)
        self._cfg = cfg
        self._params = autoregressive.prepare_for_decode(cfg, params)
        self._top_k, self._draft_len = top_k, draft_len
        self._waiting: collections.deque[tuple[int, SamplingRequest]] = collections.deque()
        self._tickets = itertools.count()
        self._free = list(range(num_slots))
        self._active: dict[int, _Active] = {}  # by slot
        self._position: dict[int, int] = {}  # of active slots
        self._use_top_p = False
        self._num_codes = self._num_passes = 0  # of finished images
        self._state = init_decode_state(cfg, num_slots)
        self._prefill_sizes = 1, -(-num_slots // 8), num_slots

    @property
    def num_slots(self) -> int:
        return len(self._state.position_S)

    def __len__(self) -> int:
        """Return the number of requests that wait or are decoded."""
        return len(self._waiting) + len(self._active)

    @property
    def codes_per_pass(self) -> float | None:
        """Codes of an image per forward pass, over all finished images; None before the first.

        The first code of an image is sampled by the prefill and not counted.
        """
        return self._num_codes / self._num_passes if self._num_passes else None

    def submit(self, request: SamplingRequest) -> int:
        """Add a request to the queue.

        Returns:
          Its ticket: 0, 1, ... in the order of submission.

        Raises:
          ValueError: a value is out of range, or guidance with a single slot.
        """
        cfg, text = self._cfg, np.asarray(request.text_T)
        if text.shape != (cfg.text_len,) or not np.issubdtype(text.dtype, np.integer):
            raise ValueError(f"Expected text of integers ({cfg.text_len},), got {text.dtype} {text.shape}.")
        prefix = np.asarray(request.prefix_codes)
        if prefix.ndim != 1 or len(prefix) >= cfg.num_codes or not np.issubdtype(prefix.dtype, np.integer):
            raise ValueError(
                f"Expected prefix_codes of fewer than {cfg.num_codes} integers, got {prefix.dtype} {prefix.shape}."
            )
        for name, value, valid, expected in (
            ("seed", request.seed, 0 <= request.seed < 2**32, "an integer in [0, 2**32)"),
            ("temperature", request.temperature, 0 <= request.temperature < np.inf, "0 (greedy) or more"),
            ("top_p", request.top_p, 0 < request.top_p <= 1, "a fraction in (0, 1]"),
            (
                "guidance_scale",
                request.guidance_scale,
                0 <= request.guidance_scale < np.inf,
                "0 or more (1 is no guidance)",
            ),
        ):
            if not valid:
                raise ValueError(f"Expected {name} to be {expected}, got {value}.")
        if self._slots_needed(request) > self.num_slots:
            raise ValueError("Expected at least 2 slots for guidance, got 1. Set num_slots to 2 or more.")
        ticket = next(self._tickets)
        self._waiting.append((ticket, request._replace(text_T=text, prefix_codes=prefix)))
        return ticket

    def step(self, max_passes: int | None = None) -> list[tuple[int, np.ndarray]]:
        """Fill free slots, then decode until the next image is finished.

        Args:
          max_passes: return after this many forward passes in any case.

        Returns:
          Ticket and codes, int32 (N,), of each finished image; [] if none is finished.
        """
        self._fill_slots()
        if not self._active:
            return []
        self._decode(max_passes)
        last = self._cfg.num_codes - 1
        finished_slots = [slot for slot, position in self._position.items() if position == last]
        if not finished_slots:
            return []
        codes_SN, num_passes_S = jax.device_get((self._state.codes_SN, self._state.num_passes_S))
        finished = []
        for slot in finished_slots:
            active = self._active.pop(slot)
            del self._position[slot]
            self._free += active.slots
            self._num_codes += self._cfg.num_codes - max(1, len(active.request.prefix_codes))
            self._num_passes += int(num_passes_S[slot])
            finished.append((active.ticket, codes_SN[slot].copy()))
        self._use_top_p = any(active.request.top_p < 1 for active in self._active.values())
        return finished

    def _decode(self, max_passes: int | None) -> None:
        """Decode until an image is finished. At one code per pass the host computes when, without waiting."""
        cfg, last = self._cfg, self._cfg.num_codes - 1
        if self._draft_len is None:
            remaining = last - max(self._position.values())
            num_steps = remaining if max_passes is None else min(remaining, max_passes)
            self._state = decode_slots(
                cfg, self._params, self._state, jnp.int32(num_steps), top_k=self._top_k, use_top_p=self._use_top_p
            )  # fmt: skip
            self._position = {slot: position + num_steps for slot, position in self._position.items()}
            return
        busy = self.num_slots - len(self._free)
        min_finished = min(self._prefill_sizes[1], busy) if self._waiting else 1
        self._state = decode_slots_speculatively(
            cfg, self._params, self._state, jnp.int32(last if max_passes is None else max_passes),
            jnp.int32(min_finished), self._draft_len, top_k=self._top_k, use_top_p=self._use_top_p,
        )  # fmt: skip
        position_S = np.asarray(self._state.position_S)
        self._position = {slot: int(position_S[slot]) for slot in self._position}

    def drain(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield ticket and codes of every image as it is finished, until the queue is empty.

        Requests may be submitted meanwhile.
        """
        while self._waiting or self._active:
            yield from self.step()

    @staticmethod
    def _slots_needed(request: SamplingRequest) -> int:
        return 1 if request.guidance_scale == 1 else 2

    def _fill_slots(self) -> None:
        """Prefill waiting requests in order while slots are free, with the smallest program that holds them."""
        taken: list[_Active] = []
        while self._waiting and self._slots_needed(self._waiting[0][1]) <= len(self._free):
            ticket, request = self._waiting.popleft()
            slots = tuple(self._free.pop(0) for _ in range(self._slots_needed(request)))
            taken.append(_Active(ticket, request, slots))
            self._active[slots[0]], self._position[slots[0]] = taken[-1], 0
        self._use_top_p |= any(active.request.top_p < 1 for active in taken)
        if taken:
            size = next(size for size in self._prefill_sizes if size >= len(taken))
            new = self._new_requests(taken, size)
            self._state = prefill_slots(self._cfg, self._params, self._state, new, self._top_k)

    def _new_requests(self, taken: list[_Active], size: int) -> NewRequests:
        """Stack requests, padded to `size` with copies of the last one for slot S, which is dropped."""
        dropped = self.num_slots
        padding = [taken[-1]._replace(slots=(dropped,))] * (size - len(taken))
        requests = [active.request for active in taken + padding]
        slots = [active.slots for active in taken + padding]
        prefix_codes_AN = np.zeros((size, self._cfg.num_codes), np.int32)
        for i, request in enumerate(requests):
            prefix_codes_AN[i, : len(request.prefix_codes)] = request.prefix_codes

        def stack(name: str) -> jax.Array:
            return jnp.asarray([getattr(request, name) for request in requests], jnp.float32)

        return NewRequests(
            text_AT=jnp.asarray(np.stack([request.text_T for request in requests]), jnp.int32),
            slot_A=jnp.asarray([own[0] for own in slots], jnp.int32),
            null_slot_A=jnp.asarray([own[1] if len(own) > 1 else dropped for own in slots], jnp.int32),
            prefix_codes_AN=jnp.asarray(prefix_codes_AN),
            prefix_len_A=jnp.asarray([len(request.prefix_codes) for request in requests], jnp.int32),
            keys_A=row_keys([request.seed for request in requests]),
            temperature_A=stack("temperature"),
            top_p_A=stack("top_p"),
            guidance_scale_A=stack("guidance_scale"),
        )
