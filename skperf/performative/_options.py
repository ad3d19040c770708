"""Parameters of an adapter turned into what the record and its maps are made with."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from skperf.performative._neural import fit_neural
from skperf.performative.anticipation import Candidate, Contender, Settings
from skperf.performative.corrector import MIXES, STRENGTHS, Corrector
from skperf.performative.paper import fit_paper, new_map
from skperf.performative.record import Options
from skperf.performative.response import Form
from skperf.performative.trajectory import MOST_CONFUSED

COSTLY = 2000  # parameters above which a map with a matrix is refitted more rarely
KINDS = ("fixed", "tied", "curve", "linear")
INPUTS = ("statistic", "previous", "lags", "shares", "confusion", "covariates")
ONE, RECENT = (1.0,), (1.0, 0.9)
S, S2, X, X2, X3 = "statistic", "statistic_2", "mix", "mix_2", "mix_3"
# name after the kind, inputs that have to be allowed, form, decays
MAPS: tuple[tuple[str, str, tuple[str, ...], Form, tuple[float, ...]], ...] = (
    ("fixed", "", (), Form(), RECENT),
    ("fixed", "", ("previous",), Form(), (0.6, 0.2)),
    ("tied", "", (S,), Form((S,)), RECENT),
    ("curve", "", (S,), Form(("curve",)), RECENT),
    ("linear", "", (S,), Form((S,), (S,)), ONE),
    ("tied", ": mix", ("previous",), Form((X,)), RECENT),
    ("tied", ": trend", ("previous",), Form(anchor="previous"), (0.95, 0.8)),
    ("tied", ": mix, statistic", ("previous", S), Form((X, S)), RECENT),
    ("tied", ": momentum", ("lags",), Form(("change",), (), "previous"), (0.95,)),
    ("tied", ": lags", ("lags",), Form((X, X2, X3), (), "previous"), (1.0, 0.95)),
    ("tied", ": lags, statistic", ("lags", S), Form((X, X2, S, S2)), ONE),
    ("linear", ": delayed", ("lags", S), Form((S, S2, X), (S, S2)), ONE),
    ("tied", ": shares", ("shares",), Form(("shares",)), RECENT),
    ("tied", ": mix, shares", ("shares", "previous"), Form((X, "shares")), ONE),
    ("tied", ": confusion", ("confusion", S), Form((S, "taken")), ONE),
    ("linear", ": confusion", ("confusion",), Form(("taken",), ("confusions",)), ONE),
    ("linear", ": covariates", ("covariates",), Form((), ("covariates",)), RECENT),
    ("linear", ": mix, covariates", ("covariates", "previous"), Form((X,), ("covariates",)), ONE),
    ("linear", ": statistic, covariates", ("covariates", S), Form((S,), ("covariates",)), ONE),
)
LADDER = (*KINDS, "mlp")
BY_STRATUM = ("stratum", "class_stratum")
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
    strengths = STRENGTHS if isinstance(strength, str) else np.array([float(strength)])
    mixes = MIXES if isinstance(mix, str) else np.array([float(mix)])
    none = np.zeros((len(options.calibrations), len(strengths), len(mixes)))
    return Corrector(strengths, mixes, (None,) * len(none), none, none, none, none)


def settings_of(
    params: dict[str, Any], seed: int, n_statistics: int, n_classes: int, n_covariates: int
) -> Settings:
    """List the maps in competition."""
    entry_a_class = n_statistics == n_classes and params["statistic"] not in BY_STRATUM
    names = _names(params["adapter"], entry_a_class)
    kinds = [name for name in names if isinstance(name, str) and name in KINDS]
    alone = len(names) == 1
    if alone and not entry_a_class and names[0] in SHARED:
        raise ValueError(
            f"adapter={names[0]!r} needs a statistic with one entry a class: a slope shared by "
            f"{n_classes} classes can't read {n_statistics} entries. Use 'linear' or 'mlp'."
        )
    decay = params["decay"]
    allowed = set(_inputs(params["inputs"], alone))
    allowed -= set() if n_covariates else {"covariates"}
    allowed -= set() if n_classes <= MOST_CONFUSED and entry_a_class else {"confusion"}
    faded, size = None if isinstance(decay, str) else float(decay), n_statistics * n_classes
    found = _candidates(kinds, allowed, entry_a_class, size, faded, alone)
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
    given: dict[str, Any] = {} if isinstance(kind, str) else {"module": kind}
    given |= {name: params[name] for name in ("lr", "max_epochs", "weight_decay")}
    fit = partial(fit_neural, **given, seed=seed, hidden=params["hidden_layer_sizes"])
    # among others a network only enters once it has something to learn from
    first, growth = (1, 1.1) if alone else (20, 1.25)
    decay = params["decay"]
    faded = 1.0 if isinstance(decay, str) else float(decay)
    return Candidate(
        OF_STATISTIC, faded, fit=fit, first_pair=first, growth=growth, weigh=False, kind=name
    )


def _candidates(
    kinds: Iterable[str],
    inputs: Iterable[str],
    entry_a_class: bool,
    n_parameters: int,
    decay: float | None = None,
    alone: bool = False,
) -> dict[str, Candidate]:
    """List the maps of some kinds over some inputs; `decay` holds for all where it is given."""
    allowed, found = set(inputs), {}
    for kind, name, needed, form, decays in MAPS:
        if kind not in set(kinds) or not set(needed) <= allowed:
            continue
        if not entry_a_class and S in needed:
            if kind != "linear" or needed != (S,):
                continue
            form = Form((), (S,))  # there is no slope that classes could share
        # a map with a matrix is dear: among others it is fitted anew after a twentieth more rounds
        growth = 1.0 if alone or not form.free else 1.2 if n_parameters > COSTLY else 1.05
        for faded in decays if decay is None else (decay,):
            label = kind + name if faded == 1.0 or decay else f"{kind}{name}, decay {faded}"
            found[label] = Candidate(form, faded, growth=growth, kind=kind)
    return found
