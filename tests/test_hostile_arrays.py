"""Six estimators, every public method, arrays of every kind that users have.

A cell either gives what the same call gives on the plain float64 array, or raises a ValueError or
TypeError that names the argument. ``python -m tests.test_hostile_arrays`` prints how many cells
there are, by outcome.
"""

import copy
import functools
import re
import warnings
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from torch import nn

from skperf import (
    ComponentAttributor,
    ComponentEditor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    Reprogrammer,
    from_module,
)

N, D, K = 48, 64, 3
RNG = np.random.default_rng(0)
# exact in half precision, in [0, 1] as pictures are
TABLE = np.round(RNG.random((N, D)) * 256) / 256
LABELS = np.arange(N) % K
TABLE[:, 0] = np.clip(0.25 * LABELS + 0.25 * TABLE[:, 0], 0, 1)
TABLE = TABLE.astype(np.float16).astype(np.float64)
ROUNDS = np.repeat(np.arange(6), N // 6)
NAMES = [f"c{i}" for i in range(D)]


def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, K)).eval()


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)).eval()


def unfitted(name):
    attributor = ComponentAttributor(
        components="neurons", fraction=0.3, budget=20, output="logit", random_state=0
    )
    return {
        "PerformativeAdapter": lambda: PerformativeAdapter(from_module(module()), random_state=0),
        "Reprogrammer": lambda: Reprogrammer(
            encoder(), image_shape=(1, 8, 8), border=1, max_epochs=1, random_state=0
        ),
        "InfluenceScorer": lambda: InfluenceScorer(
            module(), method="ggn", damping=0.1, random_state=0
        ),
        "ComponentAttributor": lambda: clone(attributor).set_params(estimator=module()),
        "ComponentEditor": lambda: ComponentEditor(
            from_module(module()), attributor, max_drop=1, random_state=0
        ),
        "Net": lambda: Net(module(), max_epochs=2, random_state=0),
    }[name]()


def fit(name, X, y, weight=None):
    made = unfitted(name)
    options = {} if weight is None else {"sample_weight": weight}
    if name == "PerformativeAdapter":
        options["rounds"] = ROUNDS if y is None else ROUNDS[: 0 if np.ndim(y) == 0 else len(y)]
    return made.fit(X, y, **options)


@functools.lru_cache
def fitted(name, frame=False):
    return fit(name, pd.DataFrame(TABLE, columns=NAMES) if frame else TABLE, LABELS)


# Of a fitted estimator; X and y are what is hostile --------------------------------------------

MASKS = (np.random.default_rng(1).random((2, 6)) > 0.3).astype(float)


METHODS = {
    "PerformativeAdapter": {
        "predict": lambda e, X, y: e.predict(X),
        "predict_proba": lambda e, X, y: e.predict_proba(X),
        "predict_log_proba": lambda e, X, y: e.predict_log_proba(X),
        "decision_function": lambda e, X, y: e.decision_function(X),
        "correct": lambda e, X, y: e.correct(X, [0.2, 0.3, 0.5]),
        "estimate_prior": lambda e, X, y: e.estimate_prior(X),
        "statistic_of": lambda e, X, y: e.statistic_of(e.estimator_, X, y),
        "deployed_statistic": lambda e, X, y: e.deployed_statistic(X, y),
        "score": lambda e, X, y: e.score(X, y),
        "rank_models": lambda e, X, y: e.rank_models([e.estimator_], X, y, n_bootstrap=3).predicted,
        "stable_point": lambda e, X, y: e.stable_point(X, y).prior,
        "partial_fit": lambda e, X, y: copy.deepcopy(e).partial_fit(X, y).predict_prior(),
    },
    "Reprogrammer": {
        "predict": lambda e, X, y: e.predict(X),
        "predict_proba": lambda e, X, y: e.predict_proba(X),
        "decision_function": lambda e, X, y: e.decision_function(X),
        "score_samples": lambda e, X, y: e.score_samples(X),
        "predict_inlier": lambda e, X, y: e.predict_inlier(X),
        "transform": lambda e, X, y: e.transform(X),
        "reprogram": lambda e, X, y: e.reprogram(X),
        "score": lambda e, X, y: e.score(X, y),
    },
    "InfluenceScorer": {
        "influence": lambda e, X, y: e.influence(X, y),
        "rows of influence": lambda e, X, y: e.influence(TABLE[:3], LABELS[:3], rows=(X, y)),
        "transform": lambda e, X, y: e.transform(X),
        "self_influence": lambda e, X, y: e.self_influence(X, y),
        "top_k": lambda e, X, y: e.top_k(X, y, k=3)["values"],
        "group_influence": lambda e, X, y: e.group_influence([[0, 3], [7]], X, y, order=2),
        "loo_effect": lambda e, X, y: e.loo_effect(X, y),
        "radius_effect": lambda e, X, y: e.radius_effect(X, y),
        "fading": lambda e, X, y: e.fading(X, y, steps=(1, 2), n_train=3).actual,
        "score": lambda e, X, y: e.score(X, y, n_subsets=3),
        "repair": lambda e, X, y: e.repair(
            X, y, k=3, max_steps=2, max_drop=1, baselines=False
        ).predict_proba(TABLE),
        "guard of remove": lambda e, X, y: e.remove([0, 1], guard=(X, y)).predict_proba(TABLE),
    },
    "ComponentAttributor": {
        "transform": lambda e, X, y: e.transform(X),
        "attribute": lambda e, X, y: e.attribute(X, y),
        "counterfactual": lambda e, X, y: e.counterfactual(MASKS, X, y),
        "predict_counterfactual": lambda e, X, y: e.predict_counterfactual(MASKS, X, y),
        "score": lambda e, X, y: e.score(X, y, n_masks=4),
        "guard of edit": lambda e, X, y: e.edit([0, 1], k=1, guard=(X, y)).predict_proba(TABLE),
    },
    "ComponentEditor": {
        "predict": lambda e, X, y: e.predict(X),
        "predict_proba": lambda e, X, y: e.predict_proba(X),
        "score": lambda e, X, y: e.score(X, y),
    },
    "Net": {
        "predict": lambda e, X, y: e.predict(X),
        "predict_proba": lambda e, X, y: e.predict_proba(X),
        "score": lambda e, X, y: e.score(X, y),
        "partial_fit": lambda e, X, y: copy.deepcopy(e).partial_fit(X, y).predict_proba(TABLE),
    },
}
AFTER_FIT = {
    "PerformativeAdapter": lambda e: e.predict_proba(TABLE),
    "Reprogrammer": lambda e: e.predict_proba(TABLE),
    "InfluenceScorer": lambda e: e.influence(TABLE[:4], e.y_[:4]),
    "ComponentAttributor": lambda e: e.attributions_,
    "ComponentEditor": lambda e: e.predict_proba(TABLE),
    "Net": lambda e: e.predict_proba(TABLE),
}
WEIGHED = ("PerformativeAdapter", "Reprogrammer", "InfluenceScorer", "Net")
TAKES_LABELS = re.compile(
    "statistic|score$|rank|stable|partial|alpha|influence|top|loo|radius|fading|repair|guard|"
    "attribute|counterfactual"
)


def put(X, row, value):
    X = X.copy()
    X[row, 3] = value
    return X


def strided(X):
    wide = np.zeros((2 * len(X), 3 * X.shape[1]))
    wide[::2, ::3] = X
    return wide[::2, ::3]


def frozen(X):
    X = X.copy()
    X.flags.writeable = False
    return X


def mapped(X):
    import tempfile

    with tempfile.TemporaryFile() as file:
        stored = np.memmap(file, X.dtype, "w+", shape=X.shape)
        stored[:] = X
        return stored


# how X looks: whoever is given it, and the float64 array that it stands for, if it stands for one
ROWS = {
    "float32": (lambda X: X.astype(np.float32), lambda X: X),
    "float16": (lambda X: X.astype(np.float16), lambda X: X),
    "longdouble": (lambda X: X.astype(np.longdouble), lambda X: X),
    "Fortran": (np.asfortranarray, lambda X: X),
    "strided": (strided, lambda X: X),
    "reversed": (lambda X: np.ascontiguousarray(X[::-1, ::-1])[::-1, ::-1], lambda X: X),
    "read-only": (frozen, lambda X: X),
    "memmap": (mapped, lambda X: X),
    "object": (lambda X: X.astype(object), lambda X: X),
    "lists": (lambda X: X.tolist(), lambda X: X),
    "big-endian": (lambda X: X.astype(">f8"), lambda X: X),
    "nullable": (lambda X: pd.DataFrame(X).astype("Float64").set_axis(NAMES, axis=1), lambda X: X),
    "tensor": (lambda X: torch.tensor(X), lambda X: X),
    "tensor with grad": (lambda X: torch.tensor(X, requires_grad=True), lambda X: X),
    "constant columns": (lambda X: X * 0 + 0.5, lambda X: X * 0 + 0.5),
    "tiny": (lambda X: X * 1e-300, lambda X: X * 1e-300),
    "booleans": (lambda X: X > 0.5, lambda X: (X > 0.5).astype(float)),
    "one row": (lambda X: X[:1], lambda X: X[:1]),
    "huge": (lambda X: put(X, 0, 1e300), None),
    "NaN": (lambda X: put(X, 0, np.nan), None),
    "infinity": (lambda X: put(X, 0, -np.inf), None),
    "missing": (lambda X: pd.DataFrame(X).astype("Float64").mask(X > 0.9), None),
    "None": (lambda X: put(X.astype(object), 0, None), None),
    "empty": (lambda X: X[:0], None),
    "no columns": (lambda X: X[:, :0], None),
    "too narrow": (lambda X: X[:, 1:], None),
    "too wide": (lambda X: np.hstack([X, X[:, :1]]), None),
    "one axis": (lambda X: X[0], None),
    "number": (lambda X: 3.0, None),
    "sparse": (csr_matrix, None),
    "strings": (lambda X: np.full(X.shape, "a"), None),
    "categories": (lambda X: pd.DataFrame(np.full(X.shape, "a")).astype("category"), None),
    "complex": (lambda X: X.astype(complex) + 1j, None),
    "dates": (lambda X: np.zeros(X.shape, "datetime64[s]"), None),
}
# how y looks, and what it stands for
TARGETS = {
    "list": (lambda y: y.tolist(), lambda y: y),
    "object": (lambda y: y.astype(object), lambda y: y),
    "float64": (lambda y: y.astype(float), lambda y: y),
    "uint8": (lambda y: y.astype(np.uint8), lambda y: y),
    "series": (lambda y: pd.Series(y, index=range(5, 5 + len(y))), lambda y: y),
    "categories": (lambda y: pd.Series(y).astype("category"), lambda y: y),
    "nullable": (lambda y: pd.Series(y).astype("Int64"), lambda y: y),
    "tensor": (lambda y: torch.tensor(y), lambda y: y),
    "column": (lambda y: y[:, None], lambda y: y),
    "read-only": (lambda y: frozen(y), lambda y: y),
    "NaN": (lambda y: np.where(np.arange(len(y)) == 1, np.nan, y), None),
    "None in it": (lambda y: np.where(np.arange(len(y)) == 1, None, y.astype(object)), None),
    "never seen": (lambda y: np.where(np.arange(len(y)) == 1, 77, y), None),
    "other type": (lambda y: np.array(list("abc"))[y], None),
    "too long": (lambda y: np.append(y, 0), None),
    "empty": (lambda y: y[:0], None),
    "none": (lambda y: None, None),
    "two columns": (lambda y: np.stack([y, y], 1), None),
    "number": (lambda y: 3, None),
}
ONLY_AFTER_FIT = {"never seen", "other type"}
WEIGHTS = {
    "float32": (lambda w: w.astype(np.float32), lambda w: w),
    "list": (lambda w: w.tolist(), lambda w: w),
    "series": (lambda w: pd.Series(w), lambda w: w),
    "tensor": (lambda w: torch.tensor(w), lambda w: w),
    "some zero": (lambda w: np.where(np.arange(len(w)) % 5 == 0, 0.0, w), "itself"),
    "all zero": (lambda w: w * 0, None),
    "negative": (lambda w: put(w[:, None].repeat(4, 1), 1, -1.0)[:, 3], None),
    "NaN": (lambda w: put(w[:, None].repeat(4, 1), 1, np.nan)[:, 3], None),
    "infinity": (lambda w: put(w[:, None].repeat(4, 1), 1, np.inf)[:, 3], None),
    "huge": (lambda w: w * 1e300, None),
    "strings": (lambda w: ["a"] * len(w), None),
    "too long": (lambda w: np.append(w, 1.0), None),
    "two columns": (lambda w: np.stack([w, w], 1), None),
}
WEIGHT = np.random.default_rng(2).integers(1, 5, N).astype(float)

CELLS = [
    *[(e, m, "X", kind) for e in METHODS for m in [*METHODS[e], "fit"] for kind in ROWS],
    *[(e, m, "X", "other order") for e in METHODS for m in METHODS[e]],
    *[
        (e, m, "y", kind)
        for e in METHODS
        for m in METHODS[e]
        if TAKES_LABELS.search(m)
        for kind in TARGETS
    ],
    *[(e, "fit", "y", kind) for e in METHODS for kind in TARGETS if kind not in ONLY_AFTER_FIT],
    *[(e, "fit", "y", "one class") for e in METHODS],
    *[(e, "fit", "sample_weight", kind) for e in WEIGHED for kind in WEIGHTS],
]
NAMED = {
    "X": r"\bX\b|\bguard\b|Complex data|array|row|feature|sample|column|picture|image|pixel",
    "y": r"\by\b|\bguard\b|\brows\b|y_true|label|class|target|sample",
    "sample_weight": "sample_weight|weight",
}
# cells that give numbers where no plain array says which: a reason each
LATE = "rows whose labels are not known yet are left out"
WRONG = "a label that nobody predicts counts as wrong, as in scikit-learn"
FREE = {
    ("PerformativeAdapter", "NaN"): LATE,
    ("PerformativeAdapter", "None in it"): LATE,
    ("score", "never seen"): WRONG,
    ("PerformativeAdapter", "none"): LATE,
    ("ComponentAttributor", "none"): "y is optional, and by default what the network predicts",
}


def in_make_test(cell):
    """A seeded tenth of the table, the same on every machine."""
    return zlib.crc32("/".join(cell).encode()) % 10 == 0


def call(estimator, method, X, y, weight=None):
    if method == "fit":
        return AFTER_FIT[estimator](fit(estimator, X, y, weight))
    return METHODS[estimator][method](fitted(estimator), X, y)


def arguments(cell):
    """Hostile arguments, and plain ones or None."""
    estimator, method, argument, kind = cell
    whole = method in ("fit", "partial_fit", "stable_point") or estimator == "PerformativeAdapter"
    X, y = (TABLE, LABELS) if whole else (TABLE[30:36], LABELS[30:36])
    weight = WEIGHT if argument == "sample_weight" else None
    given = {"X": X, "y": y, "weight": weight}
    key = "weight" if argument == "sample_weight" else argument
    table = {"X": ROWS, "y": TARGETS, "weight": WEIGHTS}[key]
    if kind == "one class":
        # a network that is not trained takes rows of one class
        return given | {"y": y * 0}, given | {"y": y * 0}
    make, plain = table[kind]
    hostile = given | {key: make(given[key])}
    if plain == "itself":
        return hostile, hostile
    standing = None if plain is None else given | {key: plain(given[key])}
    if kind == "one row":  # which fits one class, and may say so of y
        hostile["y"], standing["y"] = y[:1], y[:1]
    return hostile, standing


def outcome(cell):
    """Run one cell: "same", "refused", or what is wrong."""
    estimator, method, argument, kind = cell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if kind == "other order":
                X = pd.DataFrame(TABLE, columns=NAMES)[NAMES[::-1]]
                whole = estimator == "PerformativeAdapter" or method == "partial_fit"
                where = slice(0, N) if whole else slice(30, 36)
                found = METHODS[estimator][method](
                    fitted(estimator, frame=True), X[where], LABELS[where]
                )
                return f"columns in another order are taken: {np.asarray(found).ravel()[:3]}"
            hostile, plain = arguments(cell)
            found = np.asarray(call(estimator, method, **hostile))
        except (ValueError, TypeError) as error:
            if re.search(NAMED["y" if kind == "one row" else argument], str(error)):
                return "refused"
            if method == "score" and "'<' not supported" in str(error):
                return "refused"  # in the words of scikit-learn's own accuracy, which score is
            return f"does not name {argument}: {type(error).__name__}: {error}"
        except Exception as error:  # anything else is an answer too, and a wrong one
            return f"{type(error).__name__}: {error}"
        if plain is None and {(estimator, kind), (method, kind)} & set(FREE):
            return "same" if np.isfinite(found.astype(float)).all() else "not finite"
        if plain is None:
            return f"is taken: {found.ravel()[:3]}"
        expected = np.asarray(call(estimator, method, **plain))
    if found.dtype.kind not in "biuf":
        return "same" if (found == expected).all() else "other labels"
    if not np.isfinite(found).all():
        return f"not finite: {found.ravel()[:3]}"
    scale = max(float(np.abs(expected).max()), 1e-12)
    close = found.shape == expected.shape and np.allclose(
        found, expected, rtol=2e-3, atol=1e-4 * scale
    )
    return "same" if close else f"{found.ravel()[:3]} for {expected.ravel()[:3]}"


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if in_make_test(cell) else pytest.mark.slow, id="/".join(cell))
        for cell in CELLS
    ],
)
def test_cell(cell):
    assert outcome(cell) in ("same", "refused")


# covariates are one row a round, in `fit` and `partial_fit`, and a vector before one
COVARIATES = np.round(np.random.default_rng(3).normal(size=(7, 2)) * 64) / 64
NUMBERS = {
    "float32": (lambda c: c.astype(np.float32), True),
    "float16": (lambda c: c.astype(np.float16), True),
    "lists": (lambda c: c.tolist(), True),
    "table": (lambda c: pd.DataFrame(np.atleast_2d(c)), True),
    "nullable": (lambda c: pd.DataFrame(np.atleast_2d(c)).astype("Float64"), True),
    "Fortran": (np.asfortranarray, True),
    "read-only": (frozen, True),
    "memmap": (mapped, True),
    "object": (lambda c: c.astype(object), True),
    "tensor with grad": (lambda c: torch.tensor(c, requires_grad=True), True),
    "NaN": (lambda c: np.where(np.arange(2) == 1, np.nan, c), False),
    "infinity": (lambda c: np.where(np.arange(2) == 1, np.inf, c), False),
    "missing": (lambda c: pd.DataFrame([[pd.NA] * 2] * len(np.atleast_2d(c))), False),
    "strings": (lambda c: np.full(np.shape(c), "a"), False),
    "too narrow": (lambda c: c[..., :1], False),
    "too wide": (lambda c: np.concatenate([c, c], -1), False),
    "empty": (lambda c: c[:0], False),
    "number": (lambda c: 3.0, False),
    "None": (lambda c: None, False),
    "complex": (lambda c: c + 1j, False),
}


def adapted(fit=COVARIATES[:6], last=COVARIATES[6:], coming=COVARIATES[0]):
    adapter = PerformativeAdapter(
        from_module(module()), inputs=["statistic", "covariates"], min_rounds=1, random_state=0
    )
    adapter.fit(TABLE, LABELS, rounds=ROUNDS, covariates=fit)
    adapter.partial_fit(TABLE[:8], LABELS[:8], covariates=last)
    return adapter.predict_prior(covariates=coming)


@pytest.mark.parametrize("where", ["fit", "last", "coming"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_covariates(kind, where):
    make, taken = NUMBERS[kind]
    plain = {"fit": COVARIATES[:6], "last": COVARIATES[6:], "coming": COVARIATES[0]}[where]
    hostile = make(plain)
    if kind == "None" and where in ("fit", "coming"):
        taken = where == "coming"  # the last ones go on; none at fit are refused later
        plain = COVARIATES[6] if taken else plain
    if not taken:
        with pytest.raises((ValueError, TypeError), match=r"covariates|inputs"):
            adapted(**{where: hostile})
        return
    np.testing.assert_allclose(adapted(**{where: hostile}), adapted(**{where: plain}), rtol=1e-3)


def main():
    """Count the cells by estimator and outcome."""
    torch.set_num_threads(1)
    counts = {}
    for cell in CELLS:
        said = outcome(cell)
        right = said in ("same", "refused")
        counts.setdefault(cell[0], {}).setdefault(said if right else "wrong", []).append(cell)
        if not right:
            print("/".join(cell), said[:300], flush=True)
    for name, own in counts.items():
        print(name, {said: len(cells) for said, cells in own.items()})
    print(len(CELLS), "cells", sum(map(in_make_test, CELLS)), "in make test")


if __name__ == "__main__":
    main()
