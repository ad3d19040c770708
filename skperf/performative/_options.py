"""Parameters of an adapter turned into what the record and its maps are made with."""

from functools import partial
from typing import Any

import numpy as np
from torch import nn

from skperf.performative._neural import fit_neural
from skperf.performative.anticipation import Candidate, Contender, Settings
from skperf.performative.corrector import MIXES, STRENGTHS, Corrector
from skperf.performative.ladder import INPUTS, KINDS, candidates
from skperf.performative.paper import fit_paper, new_map
from skperf.performative.record import Options
from skperf.performative.response import Form
from skperf.performative.trajectory import MOST_CONFUSED

LADDER = (*KINDS, "mlp")
SHARED = ("tied", "curve")  # these need one entry of the statistic for every class
OF_STATISTIC = Form(free=("statistic",))


def options_of(params: dict[str, Any], seed: int, *, refines_base: bool) -> Options:
    """Freeze what the record reads of the parameters."""
    is_paper = "paper" in _names(params["adapter"], True)
    statistic = params["statistic"]
    if is_paper and params["objective"] == "log_loss":
        raise ValueError("adapter='paper' is fitted to label mixes: objective must be 'marginal'.")
    if is_paper and statistic == "recall":
        statistic = "released"
    return Options(
        statistic=statistic,
        smoothing=params["recall_smoothing"],
        objective=params["objective"],
        min_rounds=1 if is_paper else params["min_rounds"],
        transductive=params["transductive"],
        prior_strength=params["prior_strength"],
        floor=params["worst_recall_floor"],
        calibrations=_calibrations(params["calibration"], is_paper),
        refines_base=refines_base and not is_paper,
        seed=seed,
    )


def _calibrations(given: Any, is_paper: bool) -> tuple[Any, ...]:
    if given == "none" or (given is None and is_paper):
        return (None,)
    return (None, "temperature", "bcts") if given is None else (given,)


def corrector_of(params: dict[str, Any], options: Options) -> Corrector:
    """Start the judge of strengths, mixes and calibrations."""
    is_paper = "paper" in _names(params["adapter"], True)
    strength = 1.0 if is_paper and params["strength"] == "auto" else params["strength"]
    mix = 0.0 if is_paper and params["mix"] == "auto" else params["mix"]
    return Corrector.start(
        STRENGTHS if isinstance(strength, str) else np.array([float(strength)]),
        MIXES if isinstance(mix, str) else np.array([float(mix)]),
        (None,) * len(options.calibrations),
    )


def settings_of(
    params: dict[str, Any], seed: int, *, n_statistics: int, n_classes: int, n_covariates: int
) -> Settings:
    """List the maps in competition."""
    entry_a_class = n_statistics == n_classes and params["statistic"] not in (
        "stratum",
        "class_stratum",
    )
    names = _names(params["adapter"], entry_a_class)
    kinds = [name for name in names if isinstance(name, str) and name in KINDS]
    for kind in kinds:
        if kind in SHARED and not entry_a_class and len(names) == 1:
            raise ValueError(
                f"adapter={kind!r} needs a statistic with one entry a class: a slope shared by "
                f"{n_classes} classes can't read {n_statistics} entries. Use 'linear' or 'mlp'."
            )
    alone = len(names) == 1
    decay = params["decay"]
    allowed = set(_inputs(params["inputs"], alone))
    allowed -= set() if n_covariates else {"covariates"}
    allowed -= set() if n_classes <= MOST_CONFUSED and entry_a_class else {"confusion"}
    found = candidates(
        kinds,
        allowed,
        entry_a_class=entry_a_class,
        n_parameters=n_statistics * n_classes,
        decay=None if isinstance(decay, str) else float(decay),
        alone=alone,
    )
    for name in names:
        if name not in KINDS:
            found[_name_of(name)] = _trained(name, params, seed, alone)
    return Settings(found, l2=params["l2"], buffer_size=params["buffer_size"])


def first_contenders(
    params: dict[str, Any], seed: int, n_statistics: int, n_classes: int
) -> dict[str, Contender]:
    """Give maps that answer before any round was learned from: that of the paper."""
    if "paper" not in _names(params["adapter"], True):
        return {}
    response = new_map(n_statistics, n_classes, seed)
    return {"paper": Contender(response, np.array([0.0, -np.inf]), 1.0, 0, True, "paper")}


def _inputs(given: Any, alone: bool) -> tuple[str, ...]:
    if isinstance(given, str) and given == "auto":
        # one map asked for by name is that map of the statistic
        return ("statistic", "covariates") if alone else INPUTS
    names = (given,) if isinstance(given, str) else tuple(given)
    unknown = [name for name in names if name not in INPUTS]
    if unknown or not names:
        raise ValueError(f"inputs must be 'auto' or some of {list(INPUTS)}; got {given!r}.")
    return names


def _names(given: Any, entry_a_class: bool) -> tuple[Any, ...]:
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError("adapter is an empty list: name one kind of map or more.")
        return tuple(given)
    if not (isinstance(given, str) and given == "auto"):
        return (given,)
    return tuple(name for name in LADDER if entry_a_class or name not in SHARED)


def _name_of(kind: Any) -> str:
    if isinstance(kind, str) and kind in (*LADDER, "paper"):
        return kind
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind.__name__
    raise ValueError(
        f"adapter must be 'auto', one or a list of {[*LADDER, 'paper']}, or a torch.nn.Module "
        f"class; got {kind!r}."
    )


def _trained(kind: Any, params: dict[str, Any], seed: int, alone: bool) -> Candidate:
    """Give a map that torch trains."""
    name = _name_of(kind)
    if name == "paper":
        return Candidate(OF_STATISTIC, fit=partial(fit_paper, seed=seed), weigh=False, kind="paper")
    given = {} if isinstance(kind, str) else {"module": kind}
    fit = partial(
        fit_neural,
        **given,
        seed=seed,
        hidden=params["hidden_layer_sizes"],
        lr=params["lr"],
        max_epochs=params["max_epochs"],
        weight_decay=params["weight_decay"],
    )
    # among others a network only enters once it has something to learn from
    first, growth = (1, 1.1) if alone else (20, 1.25)
    decay = params["decay"]
    faded = 1.0 if isinstance(decay, str) else float(decay)
    return Candidate(
        OF_STATISTIC, faded, fit=fit, first_pair=first, growth=growth, weigh=False, kind=name
    )
