"""Methods of ComponentAttributor that pick components and cut them out."""

from dataclasses import replace
from numbers import Integral

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted

from skperf.backbone._edited import edited
from skperf.backbone._opening import open_network
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.components._edit import edit_network, rows_of
from skperf.components._study import checked_masks


def top_components(self, k=10, *, examples=None, lowest=False):
    """Name the components an output depends on most.

    Parameters
    ----------
    k : int, default=10
        How many.
    examples : array-like, optional
        Indices of, or a boolean mask over, the rows of `fit`; the mean over them counts.
        By default all.
    lowest : bool, default=False
        Instead those whose ablation raises the output most.

    Returns
    -------
    recarray of shape (k,)
        index, module, kind, unit and attribution, strongest first.
    """
    check_is_fitted(self)
    _check_k(self, k)
    rows = rows_of(examples, len(self.attributions_), "examples")
    mean = self.attributions_[rows].mean(0)
    order = np.argsort(mean if lowest else -mean, kind="stable")[:k]
    names = [*self.components_.dtype.names, "attribution"]
    columns = [self.components_[order][name] for name in self.components_.dtype.names]
    return np.rec.fromarrays([*columns, mean[order]], names=",".join(names))


def ablate(self, mask):
    """Make a classifier with some components gone.

    Parameters
    ----------
    mask : array-like of shape (n_components,)
        1 = kept, 0 = ablated.

    Returns
    -------
    EditedClassifier
        The original is left as it is.
    """
    check_is_fitted(self)
    mask = checked_masks(mask, self.n_components_)
    if len(mask) != 1:
        raise ValueError(f"ablate takes one mask, got {len(mask)}.")
    return _edited(self, mask[0], {"k": int((mask[0] == 0).sum()), "path": []})


def edit(
    self,
    target,
    reference=None,
    *,
    k="auto",
    direction="increase",
    criterion="budgeted",
    X_val=None,
    y_val=None,
    max_drop=0.01,
):
    """Ablate what stands in the way of some examples and matters little to others.

    Parameters
    ----------
    target : array-like
        Indices of, or a boolean mask over, the rows of `fit` to change.
    reference : array-like, optional
        Rows to spare; by default all others.
    k : int or "auto", default="auto"
        How many components to ablate; "auto" tries numbers by true passes and keeps the
        one best for the targets.
    direction : {"increase", "decrease"}, default="increase"
        Raise or lower the targets' output.
    criterion : {"budgeted", "welch"}, default="budgeted"
        Gain over loss, or the released t statistic.
    X_val, y_val : array-like, optional
        Rows on which the accuracy is guarded; by default the reference.
    max_drop : float, default=0.01
        How far that accuracy may fall.

    Returns
    -------
    EditedClassifier
        Its ``edit_report_`` holds ``k``, the ablated ``components`` and the ``path`` of
        outcomes over k.
    """
    check_is_fitted(self)
    if k != "auto":
        _check_k(self, k)
    network, guard = open_network(self.estimator_), None
    if X_val is not None:
        X_val, y_val = check_labelled_rows(self, X_val, y_val)
        guard = self._study.question(network, X_val, network.codes(y_val))
    mask, report = edit_network(
        self._study.question(network),
        self.attributions_,
        self.stderr_,
        target,
        reference,
        k=k,
        direction=direction,
        criterion=criterion,
        guard=guard,
        max_drop=max_drop,
    )
    return _edited(self, mask, report)


def _check_k(self, k):
    if not isinstance(k, Integral) or not 0 <= k <= self.n_components_:
        raise ValueError(
            f"k={k!r} must be a whole number from 0 to {self.n_components_}, the number of "
            "components."
        )


def _edited(self, mask, report):
    network = open_network(self.estimator_)
    circuit = self._study.question(network).circuit
    changed = circuit.edited_module(network.module, torch.as_tensor(mask))
    ablated = np.flatnonzero(np.asarray(mask) == 0)
    names = [self._study.components[position].name for position in ablated]
    report = {**report, "components": names, "mask": np.asarray(mask, bool)}
    return edited(self.estimator_, replace(network, module=changed), report)
