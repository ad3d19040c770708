"""Skorch's own classifiers, turned into nets of ours with the same settings."""

from copy import deepcopy
from typing import Any

from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier
from skorch.dataset import Dataset
from torch.utils.data import DataLoader

from skperf.backbone._batches import TensorBatches
from skperf.backbone._nets import Net

# of a DataLoader, what changes neither which rows a batch holds nor their order
_WITHOUT_EFFECT = {
    *("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "timeout"),
    *("multiprocessing_context", "pin_memory_device"),
}
_CARRIED = {"batch_size", "shuffle", "drop_last", "generator"}


def net_of(stock: NeuralNet) -> Net:
    """Turn a skorch classifier into a Net of the same settings, not fitted; or refuse by name."""
    if isinstance(stock, Net):
        return stock
    plain = (NeuralNetClassifier, NeuralNetBinaryClassifier)
    name = type(stock).__name__
    if not isinstance(stock, plain):
        raise TypeError(
            f"estimator is a {name}, which is no classifier of skorch's and can't be turned into "
            "a skperf.Net. Fit it yourself and pass FrozenEstimator(net)."
        )
    if own := own_names(stock):
        raise TypeError(
            f"estimator is a {name}, which can't be turned into a skperf.Net: its own {own} would "
            "be lost. Derive it from skperf.Net, or fit it yourself and pass FrozenEstimator(net)."
        )
    params: dict[str, Any] = {
        k: v for k, v in stock.get_params(deep=False).items() if not k.startswith("_")
    }
    for key, usual in (
        ("dataset", Dataset),
        ("predict_nonlinearity", "auto"),
        ("warm_start", False),
        ("threshold", 0.5),
    ):
        if params.get(key, usual) != usual:
            raise ValueError(
                f"{name}({key}={params[key]!r}) can't be turned into a skperf.Net, which knows "
                f"{key}={usual!r} only. Fit it yourself and pass FrozenEstimator(net)."
            )
    params.pop("threshold", None)
    for part in ("iterator_train", "iterator_valid"):
        if params[part] is DataLoader:
            params[part] = TensorBatches
        elif params[part] is not TensorBatches:
            raise ValueError(f"{name}({part}={params[part]!r}) can't be carried to skperf.Net.")
        for key in [key for key in params if key.startswith(f"{part}__")]:
            option = key.removeprefix(f"{part}__")
            if option in _WITHOUT_EFFECT:
                del params[key]
            elif option not in _CARRIED:
                raise ValueError(f"{name}({key}=...) can't be carried to skperf.Net.")
        params.setdefault(f"{part}__shuffle", False)
    if params["callbacks"] not in (None, "disable"):
        params["callbacks"] = deepcopy(params["callbacks"])
    # skorch's own scoring of accuracy, switched off
    return Net(**{k: v for k, v in params.items() if not k.startswith("callbacks__valid_acc")})


def own_names(net: NeuralNet) -> list[str]:
    """List what a class of the user has of its own beside skorch's and ours."""
    bases = type(net).__mro__[: type(net).__mro__.index(NeuralNet)]
    return sorted(
        key
        for kind in bases
        if kind.__module__.partition(".")[0] not in ("skorch", "sklearn", "skperf")
        for key in vars(kind)
        if not key.startswith("__") and not key.endswith("_request")
    )
