"""What an attributor has measured and learned, apart from the classifier itself."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import clone

from skperf.backbone.network import Network
from skperf.backbone.parameters import checksum
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.components._ablation import rule_of
from skperf.components.designs import bernoulli_masks, plan_budget
from skperf.components.estimation import Fit
from skperf.components.finding import find, size_at
from skperf.components.folding import in_image_order, is_small
from skperf.components.gates import STACKED, Asked, Circuit, Rule
from skperf.components.measures import Measure
from skperf.components.passes import (
    Measurements,
    Question,
    intact_gradients,
    measure_baseline,
    spend,
)
from skperf.components.recipes import Learned, attribute, exact
from skperf.components.taps import opened_attention
from skperf.components.units import Component, Found, select
from skperf.components.wiring import Wiring, wire

DEFAULT_FRACTION = 0.05
Array = NDArray[np.float64]
_MOST_BYTES = 2**28
"""Rows that take more stay where they are, and go to the device pass by pass."""
_LOOKED_AT = 32
"""Rows that may be routed through parts that the first passes by."""
_ROUNDING = 2000
"""Times the resolution of the numbers, at the size of the outputs: what rounding may do."""


@dataclass(frozen=True)
class Settings:
    """Options as they were when `fit` was called."""

    output: Any
    method: str
    regressor: Any
    tol: float | None
    n_jobs: int | None
    verbose: int


@dataclass(frozen=True)
class Study:
    """Examples, components, and all that is known about them."""

    rows: Rows  # (n_rows, ...)
    y: NDArray[Any] | None  # (n_rows, ...)
    key: str
    weights: str  # checksum of the network
    wiring: Wiring
    rule: Rule
    measure: Measure
    settings: Settings
    seed: int
    fraction: float
    coverage: Mapping[str, Any]
    base: NDArray[np.bool_] | None = None  # (n_components,): closed before anything is measured
    verified: float = float("nan")
    measured: Measurements | None = None
    shape: tuple[int, ...] = ()  # of the outputs, (n_rows,) or (n_rows, n_numbers)
    learned: Learned = field(default_factory=Learned)
    differentiable: bool = True
    fit: Fit | None = None
    regressor: Any = None

    @property
    def known(self) -> Measurements:
        """What has been measured."""
        assert self.measured is not None
        return self.measured

    @property
    def cost(self) -> int:
        """Forward-equivalents spent."""
        return 4 if self.settings.method == "gradient" else self.known.done.cost

    @property
    def n_components(self) -> int:
        """Number of gates."""
        return len(self.wiring.components)

    def is_about(self, rows: Rows, y: Any) -> bool:
        """Whether these are the rows of `fit`."""
        same = y is self.y if self.y is None or y is None else np.array_equal(self.y, y)
        return same and len(rows) == len(self.rows) and rows.key() == self.key

    def question(
        self,
        network: Network,
        rows: Rows | None = None,
        y: Any = None,
        *,
        alike: bool = False,
        plain: bool = False,
    ) -> Question:
        """Put a question to the network about the rows of `fit`, or about others (n, ...)."""
        network = _another(network)  # gates, folding and order of weights are the circuit's own
        if rows is None:
            rows, y = self.rows, self.y
        donors = None
        if self.rule.per == "row":
            donors = self.rule.donors
            assert donors is not None
            if len(donors) != len(rows):
                raise ValueError(
                    f"ablation has {len(donors)} donors, one for each row of fit; here are "
                    f"{len(rows)} rows. Fit on these rows, with a donor for each."
                )
        wiring = self.wiring.plainly() if plain else self.wiring
        closed = None if self.base is None else torch.as_tensor(self.base)
        raw = rows.nbytes > _MOST_BYTES
        targets = targets_of(network, self.measure, y)
        asked = Asked(rows if raw else network.inputs(rows), targets, donors, raw, rows.single)
        if not wiring.plain and is_small(network.module):
            in_image_order(network, asked[:2].ready(network).rows)
        circuit = Circuit(network, wiring, self.rule, closed)
        return Question(circuit, asked, self.measure, self.seed, self.fraction, alike)

    def begun(self, network: Network) -> "Study":
        """Measure the intact network, and hold the fast path against plain ablation."""
        question = self.question(network)
        few = replace(question, asked=question.asked[:8])
        first, second = measure_baseline(few), measure_baseline(few)
        if not np.array_equal(first, second):
            warnings.warn(
                "the network gives different outputs on two equal passes in evaluation mode; "
                "attributions will carry that noise.",
                UserWarning,
                stacklevel=6,
            )
            verified, wiring = float(np.abs(first - second).max()), self.wiring
        else:
            verified, wiring = self._verified(network, question)
        study = replace(self, verified=verified, wiring=wiring)
        if wiring is not self.wiring:
            question = study.question(network)
            few = replace(question, asked=question.asked[:8])
        study._warn_of_unused(few)
        baseline = measure_baseline(question)
        n_rows = len(self.rows)
        shape = (n_rows,) if len(baseline) == n_rows else (n_rows, len(baseline) // n_rows)
        return replace(
            study,
            measured=Measurements(baseline, self.n_components),
            shape=shape,
            differentiable=len(shape) == 1 and _is_differentiable(few),
        )

    def _warn_of_unused(self, few: Question) -> None:
        places = [s for s in self.wiring.sites if not (s.weights or s.keeps_bias)]
        for site in [] if self.rule.replaces else places:
            mask = np.array([not site.holds(component) for component in self.wiring.components])
            if np.array_equal(few.outcomes(mask[None])[0], measure_baseline(few)):
                warnings.warn(
                    f"ablating all of {site.kind!r} at {site.module!r} changes no output of the "
                    f"first {few.n_rows} rows: of several tensors the first is meant, and the "
                    "network may not use it.",
                    UserWarning,
                    stacklevel=7,
                )

    def around(self, mask: NDArray[np.bool_]) -> "Study":
        """Put the same question to the network with some components gone: mask (n_components,)."""
        return replace(self, base=mask, measured=None, fit=None, learned=Learned())

    def spent(self, network: Network, budget: int) -> tuple["Study", KeyboardInterrupt | None]:
        """Spend a budget and conclude, also from part of it when interrupted."""
        question = self.question(network)
        if self.settings.method == "gradient":
            self._checked_method()
            fit = exact(intact_gradients(question), self.known.baseline)
            return replace(self, fit=fit), None
        plan = self._plan(budget)
        measured = copy.deepcopy(self.known)
        study, broken_off = replace(self, measured=measured), None
        try:
            spend(
                question,
                measured,
                plan,
                n_jobs=self.settings.n_jobs,
                verbose=self.settings.verbose,
                stop=None if self.settings.tol is None else study._stop(question),
            )
        except KeyboardInterrupt as interrupt:
            broken_off = interrupt
            if not measured.done.gradients and measured.done.masks <= 2:
                return study, broken_off
        return study._concluded(question), broken_off

    def about_others(self, network: Network, rows: Rows, y: Any) -> Fit:
        """Linear models of other examples (n, ...), each by itself."""
        question = self.question(network, rows, y, alike=True)
        baseline = measure_baseline(question)
        if self.settings.method == "gradient":
            return exact(intact_gradients(question), baseline)
        measured = Measurements(baseline, self.n_components)
        spend(question, measured, self.known.done, n_jobs=self.settings.n_jobs)
        if self.regressor is not None:
            return _from_regressor(self._regress(measured), self.n_components)
        return attribute(question, measured, self.learned)[0]

    def fresh_masks(self, n_masks: int, fraction: float) -> NDArray[np.bool_]:
        """Masks that no fit uses: -> (n_masks, n_components)."""
        return bernoulli_masks(self.seed, range(n_masks), self.n_components, fraction, fresh=True)

    def masks(self, numbers: range) -> NDArray[np.bool_]:
        """Masks of the fit: -> (len(numbers), n_components)."""
        return bernoulli_masks(self.seed, numbers, self.n_components, self.fraction)

    def row_fit(self) -> Fit:
        """Give linear models, one a row: of several numbers a row their mean."""
        assert self.fit is not None
        if len(self.shape) == 1:
            return self.fit
        mean, error = self.shaped(self.fit.coefficients), self.shaped(self.fit.stderr)
        return replace(self.fit, coefficients=mean.mean(1), stderr=error.mean(1))

    def first_circuit(self, network: Network) -> Circuit:
        """Gates as a lasting edit has them: where there are donors, the first stands in."""
        wiring = replace(self.wiring, plain=False, followers={}, prefix=())
        circuit = Circuit(_another(network), wiring, self.rule)
        if self.rule.kind == "resample":
            circuit.replace_by(Asked(network.inputs(self.rows[:1]), None), range(1))
        return circuit

    def shaped(self, values: Array, n_rows: int | None = None) -> Array:
        """Give several numbers of a row an axis of their own: (n_examples, ...)."""
        n_rows = len(self.rows) if n_rows is None else n_rows
        return values.reshape(n_rows, -1, *values.shape[1:]) if len(self.shape) > 1 else values

    def _verified(self, network: Network, question: Question) -> tuple[float, Wiring]:
        """Largest difference from plain ablation, and the wiring that is to be trusted."""
        plain = self.question(network, plain=True)
        masks = self.fresh_masks(3, self.fraction)
        # half of them, so that hardly any kind of component is passed by; of a few components a
        # sparse mask may ablate none
        masks[0] = self.fresh_masks(1, 0.5)[0]
        for mask in masks[:-1]:
            mask[self.seed % self.n_components] &= not mask.all()
        masks[-1] = True  # nothing ablated must change nothing
        gates = torch.as_tensor(masks[:1].astype(np.float32))
        n_rows = question.n_rows
        worst, size, trouble = 0.0, 0.0, ""
        # two masks a pass, so that what one leaves is used by the next; one; and all of them, of a
        # large network as many as its gradients have room for; donors go by number
        light, draws = question.circuit.light, self.rule.kind == "resample"
        few, one = min(3, n_rows), 1 if n_rows > 3 else 2  # masks a pass of the many rows
        sizes = ((1, 2), (few, 2), (min(33, n_rows), one), (min(6, n_rows), 9))
        passes = {
            (count, count if draws else min(STACKED, count * at_once, max(2 * count, light)))
            for count, at_once in sizes
        }
        for count, stacked in sorted(passes):
            here = replace(question, asked=question.asked[n_rows - count :])
            truth = replace(plain, asked=plain.asked[n_rows - count :]).outcomes(masks)
            size = max(size, float(np.abs(truth).max()))
            here.circuit.stacked = stacked
            again = np.arange(5 if stacked > count else 3) % 3
            try:
                gated = here.outcomes(masks[again])
                worst = max(worst, float(np.abs(gated - truth[again]).max()))
                once = count == few and stacked == (count if draws else 2 * count)
                if once and truth.shape[1] == count:
                    values, _ = here.circuit.gradients(here.asked, here.measure, gates[0])
                    worst = max(worst, float(np.abs(values.numpy() - truth[0]).max()))
            except Exception as error:  # whatever it is, the plain path has none
                if not isinstance(error, RuntimeError) or "grad" not in str(error):
                    worst, trouble = float("inf"), f" ({error})"
        question.circuit.stacked = STACKED
        rounding = _ROUNDING * torch.finfo(network.dtype).eps * max(size, 1e-3)
        if worst <= rounding:
            return worst, self.wiring
        warnings.warn(
            f"gating the network differs from zeroing its weights by {worst:.2g} where rounding "
            f"explains {rounding:.2g}{trouble}; the plain path is used: one mask a pass, on "
            "a view of its own.",
            UserWarning,
            stacklevel=7,
        )
        return worst, self.wiring.plainly()

    def _checked_method(self) -> None:
        regressor, method = self.settings.regressor, self.settings.method
        own = not isinstance(regressor, str)
        if not own and regressor != "ridge":
            raise ValueError(f"regressor={regressor!r} must be 'ridge' or a regressor.")
        if own and method not in ("auto", "regression"):
            raise ValueError(f"method={method!r} fits no regression; leave out the regressor.")
        if method in ("path_gradient", "gradient") and not self.differentiable:
            raise ValueError(
                f"method={method!r} needs gradients, but the output of this network has none "
                "with respect to its components, or several numbers a row; use 'regression' or "
                "'loo'."
            )

    def _plan(self, budget: int) -> Any:
        self._checked_method()
        own = not isinstance(self.settings.regressor, str)
        return plan_budget(
            "regression" if own else self.settings.method,
            budget,
            self.n_components,
            self.fraction,
            differentiable=self.differentiable,
            done=self.known.done,
        )

    def _concluded(self, question: Question) -> "Study":
        if isinstance(self.settings.regressor, str):
            fit, learned = attribute(question, self.known)
            return replace(self, fit=fit, learned=learned)
        regressor = self._regress(self.known)
        fit = _from_regressor(regressor, self.n_components)
        return replace(self, fit=fit, regressor=regressor)

    def _regress(self, measured: Measurements) -> Any:
        masks = self.masks(range(measured.done.masks))
        return clone(self.settings.regressor).fit(masks.astype(float), measured.outcomes)

    def _stop(self, question: Question) -> Callable[[], bool]:
        scores: list[float] = []
        tol = self.settings.tol
        assert tol is not None

        def enough() -> bool:
            scores.append(attribute(question, self.known)[0].oob_score)
            return len(scores) > 2 and scores[-1] - scores[-2] < tol

        return enough


def study_of(
    network: Network,
    rows: Rows,
    y: Any,
    *,
    components: Any,
    ablation: Any,
    fraction: float,
    seed: int,
    settings: Settings,
) -> Study:
    """Find the components and how to gate them, before anything is measured: rows (n, ...)."""
    measure = Measure(settings.output, network.loss, network.probabilities)
    key, weights = rows.key(), checksum(network.module)
    network = _another(network)
    few = network.inputs(rows[: min(3, len(rows))])
    opened_attention(network.module)
    found = find(network, few[:1], network.inputs(rows[:_LOOKED_AT]))
    chosen, sites = select(
        found, components, network.module, lambda place: size_at(network, few[:1], place)
    )
    rule = rule_of(ablation, network, rows, y)
    wiring = wire(network, chosen, sites, few, outputs_themselves=rule.replaces)
    coverage = coverage_of(network, found, wiring)
    if components == "auto":
        _warn_of(coverage, found)
    share = checked_fraction(fraction, len(chosen))
    return Study(rows, y, key, weights, wiring, rule, measure, settings, seed, share, coverage)


def coverage_of(network: Network, found: Found, wiring: Wiring) -> dict[str, Any]:
    """Say what the chosen components cover of a network, and what not."""
    kinds: dict[str, int] = {}
    for component in wiring.components:
        kinds[component.kind] = kinds.get(component.kind, 0) + 1
    covered = {spot.module for site in wiring.sites for spot in (*site.spots, *site.weights)}
    if "attention_head" in kinds or "key_value_group" in kinds:
        covered |= found.attention_layers
        covered |= {site.module for site in wiring.sites}
    total, inside = 0, 0
    left_out = []
    for name, part in network.module.named_modules():
        own = sum(p.numel() for p in part._parameters.values() if p is not None)
        total += own
        if any(name == other or name.startswith(other + ".") for other in covered):
            inside += own
        elif any(p is not None and p.ndim > 1 for p in part._parameters.values()):
            left_out.append(name)
    return {
        "kinds": kinds,
        "share": inside / max(total, 1),
        "left_out": left_out,
        "attention_not_recognised": list(found.unrecognised),
        "fused_parameters": list(found.fused),
    }


def _warn_of(coverage: Mapping[str, Any], found: Found) -> None:
    kinds = coverage["kinds"]
    said = [f"{count} x {kind}" for kind, count in kinds.items()]
    troubles = []
    if found.unrecognised:
        troubles.append(f"no heads were found in the attention of {list(found.unrecognised)[:4]}")
    if found.fused:
        troubles.append(f"the fused parameters {list(found.fused)[:4]} hold no known components")
    if "attention_head" in kinds and not {"mlp_neuron", "conv_filter", "expert"} & set(kinds):
        troubles.append("no feed-forward neurons were found beside its attention")
    if troubles:
        warnings.warn(
            f"components='auto' took {', '.join(said)}; " + "; ".join(troubles) + ". Name them by "
            "Place, or say which components are meant; coverage_ lists what is left out.",
            UserWarning,
            stacklevel=6,
        )


def targets_of(network: Network, measure: Measure, y: Any) -> torch.Tensor | None:
    """Targets as the output takes them: y (n, ...) -> (n, ...)."""
    if y is None:
        return None
    if isinstance(y, torch.Tensor):
        return y.to(network.device)
    values = np.asarray(y)
    if measure.by_class:
        if network.classes is None:
            raise ValueError(
                f"output={measure.output!r} is of a class, but the estimator predicts no classes; "
                "use 'value', 'loss' or a function of (outputs, y)."
            )
        return network.codes(values)
    if isinstance(measure.output, str):
        return network.targets(values)
    if network.classes is not None and values.ndim == 1 and np.isin(values, network.classes).all():
        return network.codes(values)
    tensor = torch.as_tensor(values)
    kind = network.dtype if tensor.is_floating_point() else torch.long
    return tensor.to(network.device, kind)


def predicted_targets(network: Network, measure: Measure, rows: Rows) -> torch.Tensor | None:
    """Targets as the network predicts them, None where the output reads none: rows (n, ...)."""
    if measure.n_arguments < 2 or measure.output == "value":
        return None
    if network.classes is None and callable(measure.output):
        return None  # it may do without
    if network.classes is None:
        raise ValueError(
            "the output reads targets, and this estimator predicts no labels: pass y, "
            "attribute(X, y)."
        )
    outputs = network.logits(rows)
    axis = -1 if outputs.ndim > 2 and outputs.shape[1] != len(network.classes) else 1
    return outputs.argmax(axis)


def checked_fraction(fraction: float, n_components: int) -> float:
    """Check the share of components a mask ablates."""
    if fraction * n_components >= 1:
        return float(fraction)
    if fraction == DEFAULT_FRACTION:
        return 1 / max(n_components, 2)
    raise ValueError(
        f"fraction={fraction} of {n_components} components is less than one: most masks would "
        f"ablate nothing. Use at least {1 / n_components:.3g}."
    )


def checked_masks(masks: Any, n_components: int) -> Array:
    """Turn masks into numbers, one row each: (m, n_components) or (n_components,)."""
    masks = np.asarray(masks.detach().cpu() if isinstance(masks, torch.Tensor) else masks)
    if masks.dtype.kind not in "bifu":
        raise TypeError(f"masks must hold numbers or booleans, got {masks.dtype}.")
    masks = np.atleast_2d(masks)
    if masks.ndim != 2 or masks.shape[1] != n_components:
        raise ValueError(
            f"masks have shape {masks.shape}, expected (m, {n_components}): one entry for each "
            "component, 1 = kept, 0 = ablated."
        )
    numbers: Array = masks.astype(np.float64)
    if not ((numbers >= 0) & (numbers <= 1)).all():
        raise ValueError("masks must lie between 0 (ablated) and 1 (kept).")
    return numbers


def table_of(components: tuple[Component, ...]) -> Any:
    """Lay components out as a record array: index, module, kind, unit."""
    fields = [(component.module, component.kind, component.unit) for component in components]
    columns = [np.array(column) for column in zip(*fields, strict=True)]
    return np.rec.fromarrays(  # type: ignore[call-overload]
        [np.arange(len(components)), *columns], names="index,module,kind,unit"
    )


def same(one: Any, other: Any) -> bool:
    """Whether two values of parameters say the same."""
    if one is other:
        return True
    try:
        return bool(np.all(one == other)) and type(one) is type(other)
    except (ValueError, TypeError):
        return False


def _another(network: Network) -> Network:
    """Give hooks and modes of its own to a second pass through the same weights."""
    return replace(network, module=view(network.module))


def _is_differentiable(question: Question) -> bool:
    # rows may be routed past all gates, and a row alone is its own donor
    if question.circuit.wiring.knows_rows and question.circuit.rule.kind != "resample":
        question = replace(question, asked=question.asked[:1])
    ones = torch.ones(question.n_components)
    try:
        values, gradients = question.circuit.gradients(question.asked, question.measure, ones)
        # rows that look at one another are others when each is run by itself
        alike = np.allclose(values.numpy(), measure_baseline(question), rtol=1e-3, atol=1e-5)
        return bool(alike and gradients.isfinite().all() and gradients.any())
    except RuntimeError:
        return False


def _from_regressor(regressor: Any, n_components: int) -> Fit:
    """Attributions of any fitted multi-output regressor of outputs on masks."""
    masks = np.vstack([np.ones(n_components), 1 - np.eye(n_components)])
    predicted = np.asarray(regressor.predict(masks)).reshape(len(masks), -1)
    coefficients = (predicted[:1] - predicted[1:]).T
    intercept = predicted[0] - coefficients.sum(1)
    return Fit(coefficients, intercept, np.full(coefficients.shape, np.nan), np.nan, np.nan)
