"""The protocol of all pipelines: a frozen request per image in, an image per request out."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from dalle_jax.checkpoint.load import Run
from dalle_jax.pipelines.batching import ProgressFn

if TYPE_CHECKING:
    from dalle_jax.pipelines.tokenizer import TokenizerPipeline

SAMPLE_BATCH_SIZE = 8  # images sampled at once where the caller sets no batch size

# Called with the unfinished images that follow those already yielded, uint8 (B, H, W, 3).
PreviewFn = Callable[[np.ndarray], None]


def as_float(name: str, value: Any) -> float:
    """Convert a number of Python, numpy or jax.

    Raises:
        ValueError: `value` is no number; the message contains `name`.
    """
    array = value if isinstance(value, (np.ndarray, jnp.ndarray)) else np.asarray(value, object)
    if array.dtype == object:
        valid = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    else:
        valid = array.ndim == 0 and jnp.issubdtype(array.dtype, np.number)
    if not valid or np.iscomplexobj(value):
        raise ValueError(f"Expected a number {name}, got {value!r}.")
    return float(value)


def as_int(name: str, value: Any) -> int:
    """Convert an integer of Python, numpy or jax.

    Raises:
        ValueError: `value` is no integer; the message contains `name`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"Expected an integer {name}, got {value!r}.") from None


def as_setting(name: str, value: Any) -> float:
    """Check and convert one of the settings that a request may override.

    Raises:
        ValueError: `value` is no number, or not in the range of the setting.
    """
    value = as_float(name, value)
    valid, expected, hint = {
        "temperature": (0 <= value < math.inf, "of at least 0", "Use 0 for greedy decoding."),
        "top_p": (0 < value <= 1, "in (0, 1]", "Use None to keep every code."),
        "guidance_scale": (0 <= value < math.inf, "of at least 0", "Use 1 for no guidance."),
    }[name]
    if not valid:
        raise ValueError(f"Expected {name} {expected}, got {value}. {hint}")
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image to generate. The image depends on its request and the configuration of the call alone.

    Attributes:
        prompt: the caption; "" generates without one.
        seed: integer in [0, 2**32).
        guidance_scale: scale of classifier-free guidance, 1 turns it off; None takes the call's.
        temperature, top_p: of a Transformer; None takes the call's.
        prefix_codes: of a Transformer, int (P,): the first P codes of the image, fewer than the image has.
        label: of a class-conditional model, the number of the class; None generates without one.
        codes: of a diffusion model on image tokens, int (N,): the codes whose pixels it generates.
        low_res: of a diffusion model for super-resolution, uint8 (h, w, 3): the small image.
        image: of a diffusion model, uint8 (H, W, 3): the image to start from.
        strength: with `image`, the amount of noise added to it before denoising, in (0, 1].
        mask: with `image`, bool (H, W): True where `image` is kept.
    """

    prompt: str = ""
    seed: int = 0
    _: dataclasses.KW_ONLY
    guidance_scale: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    prefix_codes: np.ndarray | None = None
    label: int | None = None
    codes: np.ndarray | None = None
    low_res: np.ndarray | None = None
    image: np.ndarray | None = None
    strength: float | None = None
    mask: np.ndarray | None = None

    def __post_init__(self):
        if not isinstance(self.prompt, str):
            raise ValueError(f'Expected prompt as a str, got {self.prompt!r}. Use "" for no caption.')
        try:
            seed = as_int("seed", self.seed)
        except ValueError:
            seed = -1
        if not 0 <= seed < 2**32:
            raise ValueError(f"Expected an integer seed in [0, 2**32), got {self.seed!r}.")
        object.__setattr__(self, "seed", seed)
        for name in ("guidance_scale", "temperature", "top_p"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, as_setting(name, value))
        if self.strength is not None:
            object.__setattr__(self, "strength", as_float("strength", self.strength))
        for name in ("prefix_codes", "codes"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.asarray(value))


class GeneratedImage(NamedTuple):
    """A generated image.

    Attributes:
        image: uint8 (H, W, 3).
        request: the request that it answers.
        codes: int32 (N,), the image tokens; None for a model without.
        score: cosine similarity with the prompt, by the CLIP that ranked it; None without re-ranking.
        frames: uint8 (F, H, W, 3), the denoised image at F of the steps; None where none were asked for.
        codes_per_pass: with speculative decoding, codes per pass of the network, the mean over the images of the
            call so far.
    """

    image: np.ndarray
    request: ImageRequest
    codes: np.ndarray | None = None
    score: float | None = None
    frames: np.ndarray | None = None
    codes_per_pass: float | None = None


class Pipeline(Protocol):
    """A trained model with everything that its use needs.

    Attributes:
        kind: "text-to-image", "diffusion", "tokenizer" or "clip".
        run: configuration, parameters, directory and step of the trained model.
        config: the model's configuration, `run.config.model`.
        tokenizer: the image tokenizer whose codes the model reads or generates, if any.
        image_size: side of the square images that the model generates or reads, pixels.
        languages: languages of the captions that the model reads; () for a model without captions.
        is_class_conditional: whether the model reads the label of a class.
    """

    kind: ClassVar[str]

    @property
    def run(self) -> Run: ...

    @property
    def config(self) -> Any: ...

    @property
    def tokenizer(self) -> TokenizerPipeline | None: ...

    @property
    def image_size(self) -> int: ...

    @property
    def languages(self) -> tuple[str, ...]: ...

    @property
    def is_class_conditional(self) -> bool: ...

    @classmethod
    def from_run(cls, run: Run) -> Pipeline:
        """Complete a trained model with the files of its run directory."""
        ...

    def num_dropped_tokens(self, prompt: str) -> int:
        """Return how many tokens of a prompt are beyond those that the model reads."""
        ...

    def sample(
        self,
        requests: Iterable[ImageRequest],
        config: Any = ...,
        *,
        batch_size: int = ...,
        on_preview: PreviewFn | None = ...,
        progress: ProgressFn | None = ...,
    ) -> Iterator[GeneratedImage]:
        """Generate an image for each request, in their order.

        The arguments are checked before this returns; the images are computed as they are iterated over.

        Args:
            requests: at least one.
            config: what all images of the call share, a SamplingConfig or a DiffusionSamplingConfig; None is its
              default.
            batch_size: images computed at once.
            on_preview: called with unfinished images; of a Transformer only.
            progress: called with what is done and what there is, in images or denoising steps.

        Raises:
            ValueError: the model generates no images, or cannot generate one of these.
        """
        ...


def check_requests(
    requests: list[ImageRequest], batch_size: int, config: Any, config_class: type[Any]
) -> None:
    """Check the arguments that all generators share.

    Raises:
        ValueError: there is no request, one is no ImageRequest, `batch_size` is below 1, or `config` is no
            `config_class`.
    """
    if not isinstance(config, config_class):
        raise ValueError(
            f"Expected config as a {config_class.__name__}, got a {type(config).__name__}. "
            f"Use {config_class.__name__}(...)."
        )
    for request in requests:
        if not isinstance(request, ImageRequest):
            raise ValueError(
                f"Expected each request as an ImageRequest, got {request!r:.60}. Use ImageRequest(prompt)."
            )
    if not requests:
        raise ValueError("Expected at least one request, got none.")
    if batch_size < 1:
        raise ValueError(f"Expected batch_size of at least 1, got {batch_size}.")


def check_unused(requests: list[ImageRequest], fields: tuple[str, ...], model: str) -> None:
    """Check that no request sets a field that the model does not read.

    Raises:
        ValueError: the first of `fields` that a request sets.
    """
    for name in fields:
        if any(getattr(request, name) is not None for request in requests):
            raise ValueError(f"Expected requests without {name} for {model}, got one with it. Remove it.")
