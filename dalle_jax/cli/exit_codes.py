"""Exit codes of the command line, and the code and message of each error that a user can cause."""

from __future__ import annotations

from typing import Any

FAILED = 1  # an invalid input, file or disk
USAGE = 2  # an invalid command line; a mesh that does not fit the devices or the model; an unknown compiler option
NOT_FINITE = 3  # a loss, gradient or sampled image that is not finite
DOES_NOT_FIT = 3  # of --compile-only: the program needs more memory than the device has
INTERRUPTED = 130


class UsageError(ValueError):
    """Flags that do not go together."""


class NegativeResult(Exception):
    """A command that completed and printed `result`, but whose exit code is not 0."""

    def __init__(self, code: int, result: dict[str, Any]):
        super().__init__(code)
        self.code, self.result = code, result


def exit_code(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the message of an error, or None for a bug in this package.

    Args:
        error: any exception of a command except SystemExit and KeyboardInterrupt.
    """
    import jax

    from dalle_jax.models.diffusion.sampler import NonFiniteSampleError
    from dalle_jax.parallel.mesh import MeshError
    from dalle_jax.parallel.processes import PROCESS_LOST, first_line, process_name
    from dalle_jax.train.compiler_options import compiler_option_error
    from dalle_jax.train.loop import NonFiniteError

    distributed = jax.distributed.is_initialized()
    process = f" ({process_name()})" if distributed else ""
    match error:
        case NonFiniteError() | NonFiniteSampleError():
            return NOT_FINITE, f"error{process}: {error}"
        case UsageError() | MeshError():
            return USAGE, f"error{process}: {error}"
        case OSError(filename=str(file), strerror=str(reason)):  # without the number of the error
            return FAILED, f"error{process}: {file}: {reason}"
        case ValueError() | OSError() | ModuleNotFoundError():
            return FAILED, f"error{process}: {error}"
        case jax.errors.JaxRuntimeError():
            if (refused := compiler_option_error(error)) is not None:
                return USAGE, f"error: {refused}"
            if distributed:
                return PROCESS_LOST, (
                    f"error{process}: this process failed, or lost another one: {first_line(error)}. Start all "
                    "processes again: they resume from the last checkpoint"
                )
    return None
