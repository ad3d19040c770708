"""Batch normalisation with the statistics of the batch at hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from skperf.backbone.views import view

_WANTED: ContextVar[bool] = ContextVar("batch_statistics", default=False)


def batch_statistics_wanted() -> bool:
    """Whether this thread is inside :func:`prediction_time_batch_norm`."""
    return _WANTED.get()


class OtherBatchNorm(TorchFunctionMode):
    """Runs something else in place of ``functional.batch_norm``, and changes nothing else."""

    # A mode of one thread, so that no module is touched: layers that fuse an activation keep
    # it, and running statistics stay what they are.
    def __init__(self, instead: Callable[..., Any]) -> None:
        super().__init__()
        self.instead = instead

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        used = self.instead if func is functional.batch_norm else func
        return used(*args, **(kwargs or {}))


def _by_the_batch(
    values: Tensor,
    mean: Any,
    variance: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    return functional.batch_norm(values, None, None, weight, bias, training=True, eps=eps)


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Let whatever this thread runs normalise by the batch; refused without such layers."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules()):
        raise ValueError(
            f"{type(module).__name__} has no batch normalisation layer: there are no "
            "statistics to take from the batch."
        )
    token = _WANTED.set(True)
    try:
        with OtherBatchNorm(_by_the_batch):
            yield
    finally:
        _WANTED.reset(token)


@contextmanager
def prediction_time_batch_norm(module: nn.Module) -> Iterator[nn.Module]:
    """Normalise with the statistics of the batch at hand instead of the stored ones.

    Under covariate shift the stored means and variances of batch normalisation no longer
    fit; those of the test batch often do. Running statistics stay as they are. Holds for
    whatever this thread runs inside.

    Parameters
    ----------
    module : nn.Module
        A network with at least one batch normalisation layer.

    Yields
    ------
    nn.Module
        A view of it in evaluation mode, whose weights are its own.

    Raises
    ------
    ValueError
        If the network has no batch normalisation layer.

    Notes
    -----
    Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under
    Covariate Shift" (arXiv 2006.10963). A prediction now depends on the other rows of
    its batch: use batches of a hundred rows or more, with the class mix to be expected.
    """
    with batch_statistics(module):
        yield view(module)
