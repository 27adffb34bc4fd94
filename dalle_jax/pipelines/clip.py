"""Images ranked by a trained CLIP: how well each fits its caption, and the best of many (2102.12092, sec. 2.6).

R rows, C captions, N candidates of each caption, K best of them, H W pixels, E common space.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar, cast

import jax
import numpy as np

from dalle_jax.checkpoint.layout import TEXT_TOKENIZER_FILE
from dalle_jax.checkpoint.load import Run
from dalle_jax.config import ClipConfig
from dalle_jax.data.images import to_float
from dalle_jax.models import clip
from dalle_jax.pipelines.batching import ProgressFn, chunked, map_batches
from dalle_jax.pipelines.captions import CaptionTokens
from dalle_jax.pipelines.protocol import GeneratedImage, ImageRequest, Pipeline
from dalle_jax.pipelines.tokenizer import IMAGE_BATCH_SIZE
from dalle_jax.text.tokenizers import BosEosTokenizer
from dalle_jax.typing import Params


@partial(jax.jit, static_argnums=0)
def _encode_image(cfg: ClipConfig, params: Params, image_BHWC: jax.Array) -> jax.Array:
    return clip.encode_image(cfg, params, to_float(image_BHWC))


_encode_text = jax.jit(clip.encode_text, static_argnums=0)


@dataclasses.dataclass(frozen=True, eq=False)
class ClipPipeline:
    """A trained CLIP with its text tokenizer."""

    kind: ClassVar[str] = "clip"
    tokenizer: ClassVar[None] = None
    is_class_conditional: ClassVar[bool] = False

    run: Run
    text: BosEosTokenizer

    @classmethod
    def from_run(cls, run: Run) -> ClipPipeline:
        file = run.path / TEXT_TOKENIZER_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"Expected {TEXT_TOKENIZER_FILE} in {run.path}, got none. Import the run again with --text-tokenizer "
                "FILE, e.g. CLIP's bpe_simple_vocab_16e6.txt.gz (docs/import.md), or train it to its first "
                "checkpoint."
            )
        text, text_vocab = BosEosTokenizer.load(file), cast(ClipConfig, run.config.model).text_vocab
        if text.num_used_ids > text_vocab - 2:
            raise ValueError(
                f"Expected at most {text_vocab - 2} pieces in {file}, beside the start and the end in the text_vocab "
                f"{text_vocab} of the run, got {text.num_used_ids}. Use the text tokenizer that the CLIP was trained "
                "with."
            )
        return cls(run, text)

    @property
    def config(self) -> ClipConfig:
        return cast(ClipConfig, self.run.config.model)

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def languages(self) -> tuple[str, ...]:
        return self.run.config.data.languages

    def num_dropped_tokens(self, prompt: str) -> int:
        """Return how many tokens of a caption are beyond those that the model reads."""
        return self._captions.num_dropped(prompt)

    @cached_property
    def _captions(self) -> CaptionTokens:
        return CaptionTokens(self.text, self.config.text_vocab, self.config.text_len)

    def embed_images(
        self,
        images: np.ndarray,
        *,
        batch_size: int = IMAGE_BATCH_SIZE,
        progress: ProgressFn | None = None,
    ) -> np.ndarray:
        """Embed images, uint8 (R, H, W, 3) of any size, in vectors of length 1, float32 (R, E).

        Raises:
            ValueError: another shape or dtype, or no images.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(
                f"Expected images uint8 (rows, height, width, 3), got {images.dtype} {images.shape}."
            )
        encode = partial(_encode_image, self.config, self.run.params)
        return map_batches(encode, (images,), min(batch_size, len(images)), progress)

    def embed_captions(self, captions: Sequence[str], *, batch_size: int = IMAGE_BATCH_SIZE) -> np.ndarray:
        """Embed captions in vectors of length 1, float32 (R, E). A caption that is too long is truncated.

        Raises:
            ValueError: no captions.
        """
        if not len(captions):
            raise ValueError("Expected at least one caption, got none.")
        text_RT = np.stack([self._captions.ids(caption) for caption in captions])
        encode = partial(_encode_text, self.config, self.run.params)
        return map_batches(encode, (text_RT,), min(batch_size, len(text_RT)))

    def score(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Score how well each image fits its own caption.

        Args:
            images: uint8 (R, H, W, 3).
            captions: R texts.

        Returns:
            The cosine similarity of their vectors, float32 (R,) in [-1, 1].

        Raises:
            ValueError: as many captions as images were expected.
        """
        if len(images) != len(captions):
            raise ValueError(
                f"Expected one caption for each image, got {len(images)} images and {len(captions)} captions."
            )
        unique = list(dict.fromkeys(captions))
        text_RE = self.embed_captions(unique)[[unique.index(caption) for caption in captions]]
        return np.einsum("re,re->r", self.embed_images(images), text_RE)

    def rerank(self, images: np.ndarray, captions: Sequence[str], top: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `top` images of each caption that fit it best, best first; of equal ones the first.

        Args:
            images: uint8 (C, N, H, W, 3), N candidates for each caption.
            captions: C texts.
            top: K, 1 to N.

        Returns:
            Indices int64 (C, K) and their scores float32 (C, K).

        Raises:
            ValueError: `top` is out of range, or there is not a set of images for each caption.
        """
        if images.ndim != 5 or len(images) != len(captions):
            raise ValueError(
                f"Expected images of shape ({len(captions)}, candidates, height, width, 3), a set for each caption, "
                f"got {images.shape}."
            )
        count = images.shape[1]
        if not 1 <= top <= count:
            raise ValueError(f"Expected top in [1, {count}], the candidates of a caption, got {top}.")
        repeated = [caption for caption in captions for _ in range(count)]
        score = self.score(images.reshape(-1, *images.shape[2:]), repeated).reshape(len(captions), count)
        best = np.argsort(-score, axis=1, kind="stable")[:, :top]
        return best, np.take_along_axis(score, best, axis=1)

    def sample(
        self, requests: Iterable[ImageRequest], config: Any = None, **options: Any
    ) -> Iterator[GeneratedImage]:
        """Raise ValueError: a CLIP generates no images."""
        path = self.run.path
        raise ValueError(
            f"Expected a run of a model that generates images, got {path} of stage clip, which ranks them. Use the run "
            f"of a Transformer with --clip {path}."
        )


def sample_and_rerank(
    generator: Pipeline,
    ranker: ClipPipeline,
    requests: Sequence[ImageRequest],
    candidates: int,
    top: int,
    config: Any = None,
    **options: Any,
) -> Iterator[list[GeneratedImage]]:
    """Generate candidates for each request and keep those that fit its prompt best (2102.12092, sec. 2.6).

    Args:
        generator: a pipeline that generates images from captions.
        ranker: the CLIP that scores them.
        requests: each with a prompt. Candidate i of a request has its seed + i.
        candidates: N, images generated for each request.
        top: K, images kept of each request, 1 to N.
        config, options: of `generator.sample`.

    Returns:
        For each request, as its candidates are done, the best K with their scores, best first.

    Raises:
        ValueError: a prompt has no text, `top` is out of range, or `generator.sample` raises it.
    """
    if empty := [i for i, request in enumerate(requests) if not request.prompt.strip()]:
        raise ValueError(f"Expected captions with text to rank images by, got none in caption {empty[0]}.")
    if not 1 <= top <= candidates:
        raise ValueError(f"Expected top in [1, {candidates}], the candidates of a caption, got {top}.")
    expanded = [
        dataclasses.replace(request, seed=request.seed + i) for request in requests for i in range(candidates)
    ]
    return _best(generator.sample(expanded, config, **options), ranker, candidates, top)


def _best(
    generated: Iterator[GeneratedImage], ranker: ClipPipeline, candidates: int, top: int
) -> Iterator[list[GeneratedImage]]:
    for group in chunked(generated, candidates):
        images = np.stack([candidate.image for candidate in group])
        (best,), (score,) = ranker.rerank(images[None], [group[0].request.prompt], top)
        yield [group[i]._replace(score=float(s)) for i, s in zip(best, score, strict=True)]
