"""The interface between one training stage and the training loop."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import jax
import optax
from PIL import Image

from dalle_jax.config import TrainConfig
from dalle_jax.train.optim import make_optimizer
from dalle_jax.typing import Batch, HostBatch, Params

if TYPE_CHECKING:
    from dalle_jax.train.state import TrainState

MetricDict = dict[str, jax.Array]  # name -> scalar
BatchSpec = dict[str, tuple[tuple[int, ...], Any]]  # input -> shape without the batch axis, and dtype


class BatchStream(Protocol):
    """An endless iterator of batches in host memory that holds threads or processes until it is closed."""

    def __next__(self) -> HostBatch: ...
    def close(self) -> None: ...


class Task(Protocol):
    """One training stage: parameters, loss, data, evaluation metrics and sample images.

    The training loop uses nothing else of a stage. A stage with one loss defines the abstract methods and `loss`; a
    stage with several losses overrides `gradients` and `optimizer` and sets `single_loss` to False.

    Attributes:
      config: Configuration of the run.
      best: Evaluation metric that selects the best checkpoint, and whether to minimize or maximize it.
      tokens_per_row: Tokens that one row of a batch adds to the throughput metric `tokens_per_s`.
      frozen: Parameters that are used and not trained; {} if there are none.
      batch_spec: Inputs of `loss`, with image tokens in place of images where the stage reads image tokens.
      ema_parts: Top-level entries of the parameters with an exponential moving average; None means all of them.
      single_loss: Whether `gradients` is the gradient of `loss`.
    """

    config: TrainConfig
    best: tuple[str, Literal["min", "max"]]
    tokens_per_row: int
    frozen: Params
    batch_spec: BatchSpec
    ema_parts: tuple[str, ...] | None = None
    single_loss: bool = True

    def check_prerequisites(self) -> None:
        """Check what the stage needs from elsewhere, such as a trained image tokenizer, before anything is written.

        Raises:
          ValueError: If something is missing or does not match the configuration.
        """
        return

    @abstractmethod
    def prepare(self, run_dir: Path) -> None:
        """Open the data and write the files of the run directory that the stage needs, on every process."""

    @abstractmethod
    def init(self, key: jax.Array) -> Params:
        """Return the initial parameters."""

    def loss(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, MetricDict]:
        """Compute the loss of one batch.

        Args:
          params: Trained parameters.
          frozen: Parameters that are not trained.
          batch: Inputs by name, B rows each.
          key: Random key of this step.
          step: int32 scalar, number of completed updates.

        Returns:
          The float32 loss and further metrics.
        """
        raise NotImplementedError(f"{type(self).__name__} has more than one loss")

    def gradients(
        self, params: Params, frozen: Params, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[Params, MetricDict, dict[str, jax.Array]]:
        """Compute the gradients of one batch; the arguments are those of `loss`.

        Returns:
          Gradients like `params`, metrics with `loss` among them, and arrays of B rows for `post_update`, or {}.
        """

        def loss_fn(params: Params) -> tuple[jax.Array, MetricDict]:
            loss, metrics = self.loss(params, frozen, batch, key, step)
            return loss, {**metrics, "loss": loss}

        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        return grads, metrics, {}

    def optimizer(self, params: Params) -> optax.GradientTransformation:
        """Return the optimizer; `params` are arrays or ShapeDtypeStructs."""
        return make_optimizer(self.config.optim, self.config.steps, params)

    def post_update(
        self, state: TrainState, aux: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, MetricDict]:
        """Change the state after the optimizer's update, in steps whose `gradients` returned arrays `aux`.

        Returns:
          The new state and further metrics.
        """
        return state, {}

    @abstractmethod
    def batches(self, start: int, rows: Sequence[int] | None = None) -> BatchStream:
        """Return the training batches of steps `start`, `start + 1`, ...

        Args:
          start: First step, from 0.
          rows: Rows of each batch that this process reads, ascending; None means all.
        """

    @abstractmethod
    def eval_batches(self) -> list[HostBatch]:
        """Return the evaluation batches, whole and equal on every process."""

    @abstractmethod
    def evaluate(self, params: Params, frozen: Params, batch: Batch, key: jax.Array) -> MetricDict:
        """Compute the evaluation metrics of one evaluation batch, averages over its rows."""

    @abstractmethod
    def sample_grid(self, params: Params, frozen: Params, key: jax.Array) -> Image.Image:
        """Return a grid of sample images; every process calls this method."""
