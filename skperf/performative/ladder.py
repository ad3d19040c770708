"""The maps that compete, by name: kinds of map, inputs and horizons."""

from collections.abc import Iterable

from skperf.performative.anticipation import Candidate
from skperf.performative.response import Form

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


def candidates(
    kinds: Iterable[str],
    inputs: Iterable[str],
    *,
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
