"""What stands in for an ablated component, as options of its own."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.components.gates import ABLATIONS, Rule

_MOST_DONORS = 256


class Ablation(BaseEstimator):
    """What stands in for what is ablated, and where.

    Parameters
    ----------
    kind : {"zero", "zero_output", "mean", "resample"}, float or callable, default="zero"
        ``"zero"`` zeroes weight rows, biases and batch normalisation stay; ``"zero_output"``
        makes the output zero; ``"mean"`` puts a mean over the donors, ``"resample"`` the value
        on another row; a float scales the rows; a function of the layer's output returns what
        stands in for it.
    per : {"all", "position", "class", "row"}, default="all"
        Of ``"mean"``: one mean for each channel, for each position as well, or for each class
        of the labels. ``"row"``, of ``"resample"``: each row has the donor of its own number
        (patching); otherwise each mask draws one.
    positions : array-like of int, optional
        Positions (tokens, time steps) at which ablation acts; by default all.
    donors : array-like of shape (n_donors, ...), optional
        Rows that means and values are taken from; by default the rows of `fit`.
    donor_labels : array-like of shape (n_donors,), optional
        Their labels, for ``per="class"``.
    """

    def __init__(
        self,
        kind: str | float | Callable[..., Any] = "zero",
        *,
        per: str = "all",
        positions: Any = None,
        donors: Any = None,
        donor_labels: Any = None,
    ) -> None:
        self.kind = kind
        self.per = per
        self.positions = positions
        self.donors = donors
        self.donor_labels = donor_labels


def rule_of(ablation: Any, network: Network, rows: Rows, y: Any) -> Rule:
    """Read what `ablation` says; rows of `fit` (n, ...) stand in where no donors are given."""
    options = ablation if isinstance(ablation, Ablation) else Ablation(ablation)
    kind, per = options.kind, options.per
    if isinstance(kind, str) and kind not in ABLATIONS:
        raise ValueError(
            f"ablation={kind!r} is unknown; use one of {ABLATIONS}, a scale or a function."
        )
    kinds = {"position": "mean", "class": "mean", "row": "resample"}
    if per != "all" and kinds.get(per, per) != kind:
        raise ValueError(
            f"per={per!r} goes with no ablation {kind!r}: 'position' and 'class' are kinds of "
            "'mean', 'row' of 'resample'."
        )
    if per == "row" and options.donors is None:
        raise ValueError("per='row' needs donors: one row for each row of X.")
    positions = options.positions
    if positions is not None:
        positions = tuple(int(position) for position in np.atleast_1d(positions))
    donors, labels = None, None
    if kind in ("mean", "resample"):
        given = options.donors is not None
        source = Rows.of(options.donors) if given else rows
        if per != "row":
            chosen = np.linspace(0, len(source) - 1, min(len(source), _MOST_DONORS)).astype(int)
            source = source[chosen]
        donors = network.inputs(source)
        if per == "class":
            own = options.donor_labels if given else y
            if own is None or network.classes is None:
                raise ValueError("per='class' needs labels: y of fit, or donor_labels.")
            labels = network.codes(np.asarray(own)[chosen])
    return Rule(kind, per, positions, donors, labels)
