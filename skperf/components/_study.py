"""What an attributor has measured and learned, apart from the classifier itself."""

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from skperf.backbone.modes import preserved_rng
from skperf.backbone.outputs import resolve_output
from skperf.components.designs import bernoulli_masks, plan_budget
from skperf.components.estimation import Fit
from skperf.components.gates import Circuit
from skperf.components.passes import (
    Measurements,
    Question,
    cost_of,
    intact_gradients,
    measure_baseline,
    spend,
)
from skperf.components.recipes import Learned, attribute, first_order

DEFAULT_FRACTION = 0.05


@dataclass
class Study:
    """Examples, components, and all that is known about them."""

    X: Any  # (n_examples, ...) and (n_examples,)
    y: Any  # (n_examples, ...) and (n_examples,)
    codes: Any  # (n_examples,)
    components: list
    settings: dict
    seed: int
    fraction: float
    measured: Measurements | None = None
    learned: Learned = field(default_factory=Learned)
    differentiable: bool = True
    fit: Fit | None = None
    regressor: Any = None

    @property
    def cost(self):
        """Forward-equivalents spent."""
        if self.settings["method"] == "gradient":
            return 4
        return cost_of(self.measured.done)

    @property
    def n_components(self):
        """Number of gates."""
        return len(self.components)

    def is_about(self, X, y):
        """Whether these are the rows of `fit`."""
        return np.array_equal(self.X, X) and np.array_equal(self.y, y)

    def question(self, network, X=None, codes=None, *, alike=False):
        """Put a question to the network about the rows of `fit`, or about others."""
        if X is None:
            X, codes = self.X, self.codes
        circuit = Circuit(
            network,
            self.components,
            network.tensor(self.X[:256]),
            ablation=self.settings["ablation"],
        )
        output = resolve_output(self.settings["output"])
        return Question(
            circuit,
            network.tensor(X),
            codes.to(network.device),
            output,
            self.seed,
            self.fraction,
            alike,
        )

    def begin(self, network):
        """Measure the intact network and look whether it is fit for the method."""
        question = self.question(network)
        self.measured = Measurements(measure_baseline(question), self.n_components)
        few = replace(question, inputs=question.inputs[:8], codes=question.codes[:8])
        with preserved_rng(question.inputs.device):
            first, second = measure_baseline(few), measure_baseline(few)
        if not np.array_equal(first, second):
            warnings.warn(
                "the network gives different outputs on two equal passes in evaluation mode; "
                "attributions will carry that noise.",
                UserWarning,
                stacklevel=5,
            )
        self.differentiable = _is_differentiable(few)

    def add(self, network, budget):
        """Spend a budget and conclude, also from part of it when interrupted."""
        question = self.question(network)
        if self.settings["method"] == "gradient":
            self.fit = first_order(intact_gradients(question), self.measured.baseline)
            return
        plan = self._plan(budget)
        try:
            spend(
                question,
                self.measured,
                plan,
                sums=self.settings["regressor"] == "ridge",
                n_jobs=self.settings["n_jobs"],
                verbose=self.settings["verbose"],
                stop=self._stop(question) if self.settings["tol"] is not None else None,
            )
        except KeyboardInterrupt:
            if self.measured.done.gradients or self.measured.done.masks > 2:
                self._conclude(question)
            raise
        self._conclude(question)

    def about_others(self, network, X, codes):
        """Linear models of other examples, each by itself."""
        question = self.question(network, X, codes, alike=True)
        baseline = measure_baseline(question)
        if self.settings["method"] == "gradient":
            return first_order(intact_gradients(question), baseline)
        measured = Measurements(baseline, self.n_components)
        sums = self.measured.moments is not None
        spend(question, measured, self.measured.done, sums=sums, n_jobs=self.settings["n_jobs"])
        if self.regressor is not None:
            return _from_regressor(self._regress(measured), self.n_components)
        return attribute(question, measured, self.learned)[0]

    def fresh_masks(self, n_masks, fraction):
        """Masks that no fit uses."""
        numbers = range(n_masks)
        return bernoulli_masks(self.seed, numbers, self.n_components, fraction, fresh=True)

    def _plan(self, budget):
        regressor, method = self.settings["regressor"], self.settings["method"]
        own = not isinstance(regressor, str)
        if not own and regressor != "ridge":
            raise ValueError(f"regressor={regressor!r} must be 'ridge' or a regressor.")
        if own and method not in ("auto", "regression"):
            raise ValueError(f"method={method!r} fits no regression; leave out the regressor.")
        if method in ("path_gradient", "gradient") and not self.differentiable:
            raise ValueError(
                f"method={method!r} needs gradients, but the output of this network has none "
                "with respect to its components; use 'regression' or 'loo'."
            )
        return plan_budget(
            "regression" if own else method,
            budget,
            self.n_components,
            self.fraction,
            differentiable=self.differentiable,
            done=self.measured.done,
        )

    def _conclude(self, question):
        if isinstance(self.settings["regressor"], str):
            self.fit, self.learned = attribute(question, self.measured)
        else:
            self.regressor = self._regress(self.measured)
            self.fit = _from_regressor(self.regressor, self.n_components)

    def _regress(self, measured):
        numbers = range(measured.done.masks)
        masks = bernoulli_masks(self.seed, numbers, self.n_components, self.fraction)
        return clone(self.settings["regressor"]).fit(masks.astype(float), measured.outcomes)

    def _stop(self, question):
        scores = []

        def enough():
            scores.append(attribute(question, self.measured)[0].oob_score)
            return len(scores) > 2 and scores[-1] - scores[-2] < self.settings["tol"]

        return enough


def checked_fraction(fraction, n_components):
    """Check the share of components a mask ablates."""
    if fraction * n_components >= 1:
        return float(fraction)
    if fraction == DEFAULT_FRACTION:
        return 1 / max(n_components, 2)
    raise ValueError(
        f"fraction={fraction} of {n_components} components is less than one: most masks would "
        f"ablate nothing. Use at least {1 / n_components:.3g}."
    )


def checked_masks(masks, n_components):
    """Turn masks into numbers, one row each.

    Shapes: masks (m, n_components) or (n_components,) -> (m, n_components).
    """
    masks = np.asarray(masks.detach().cpu() if isinstance(masks, torch.Tensor) else masks)
    if masks.dtype.kind not in "bifu":
        raise TypeError(f"masks must hold numbers or booleans, got {masks.dtype}.")
    masks = np.atleast_2d(masks)
    if masks.ndim != 2 or masks.shape[1] != n_components:
        raise ValueError(
            f"masks have shape {masks.shape}, expected (m, {n_components}): one entry for each "
            "component, 1 = kept, 0 = ablated."
        )
    masks = masks.astype(np.float64)
    if not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError("masks must lie between 0 (ablated) and 1 (kept).")
    return masks


def _is_differentiable(question):
    one = replace(question, inputs=question.inputs[:1], codes=question.codes[:1])
    try:
        return bool(np.isfinite(intact_gradients(one)).all())
    except RuntimeError:
        return False


def _from_regressor(regressor, n_components):
    """Attributions of any fitted multi-output regressor of outputs on masks."""
    masks = np.vstack([np.ones(n_components), 1 - np.eye(n_components)])
    predicted = np.asarray(regressor.predict(masks)).reshape(len(masks), -1)
    coefficients = (predicted[:1] - predicted[1:]).T
    intercept = predicted[0] - coefficients.sum(1)
    unknown = np.full(coefficients.shape, np.nan)
    return Fit(coefficients, intercept, unknown, float("nan"), float("nan"))
