"""The maps that compete, by name: kinds of map, inputs and horizons."""

from collections.abc import Iterable

from skperf.performative.anticipation import Candidate
from skperf.performative.response import Form

COSTLY = 2000  # parameters above which a map with a matrix is refitted more rarely
KINDS = ("fixed", "tied", "curve", "linear")
INPUTS = ("statistic", "previous", "lags", "shares", "confusion", "covariates")
RECENT = (1.0, 0.9)


def forms(
    kinds: Iterable[str],
    inputs: Iterable[str],
    *,
    entry_a_class: bool,
    n_covariates: int = 0,
    confusable: bool = True,
    decays: tuple[float, ...] | None = None,
) -> dict[str, tuple[Form, float, str]]:
    """List the maps of some kinds over some inputs: name -> form, decay and kind."""
    kinds, inputs = set(kinds), set(inputs)
    found: dict[str, tuple[Form, float, str]] = {}

    def add(name: str, form: Form, kind: str, horizons: tuple[float, ...]) -> None:
        if kind not in kinds:
            return
        for decay in horizons if decays is None else decays:
            label = name if decay == 1.0 or decays is not None else f"{name}, decay {decay}"
            found[label] = (form, decay, kind)

    levels = (1.0, 0.9, 0.6, 0.2) if {"previous", "lags"} & inputs else RECENT
    add("fixed", Form(), "fixed", levels)
    if "statistic" in inputs:
        if entry_a_class:
            add("tied", Form(("statistic",)), "tied", RECENT)
            add("curve", Form(("curve",)), "curve", RECENT)
            add("linear", Form(("statistic",), ("statistic",)), "linear", (1.0,))
        else:
            add("linear", Form((), ("statistic",)), "linear", RECENT)
    if "previous" in inputs:
        add("tied: mix", Form(("mix",)), "tied", RECENT)
        add("tied: trend", Form((), (), "previous"), "tied", (0.95, 0.8))
        if entry_a_class and "statistic" in inputs:
            add("tied: mix, statistic", Form(("mix", "statistic")), "tied", RECENT)
    if "lags" in inputs:
        add("tied: momentum", Form(("change",), (), "previous"), "tied", (0.95,))
        add("tied: lags", Form(("mix", "mix_2", "mix_3"), (), "previous"), "tied", (1.0, 0.95))
        if entry_a_class and "statistic" in inputs:
            both = ("mix", "mix_2", "statistic", "statistic_2")
            add("tied: lags, statistic", Form(both), "tied", (1.0,))
            add(
                "linear: delayed",
                Form(("statistic", "statistic_2", "mix"), ("statistic", "statistic_2")),
                "linear",
                (1.0,),
            )
    if "shares" in inputs:
        add("tied: shares", Form(("shares",)), "tied", RECENT)
        add("tied: mix, shares", Form(("mix", "shares")), "tied", (1.0,))
    if "confusion" in inputs and entry_a_class and confusable:
        add("tied: confusion", Form(("statistic", "taken")), "tied", (1.0,))
        add("linear: confusion", Form(("taken",), ("confusions",)), "linear", (1.0,))
    if "covariates" in inputs and n_covariates:
        add("linear: covariates", Form((), ("covariates",)), "linear", RECENT)
        add("linear: mix, covariates", Form(("mix",), ("covariates",)), "linear", (1.0,))
        if entry_a_class:
            add(
                "linear: statistic, covariates",
                Form(("statistic",), ("covariates",)),
                "linear",
                (1.0,),
            )
    return found


def candidate(
    form: Form, decay: float, kind: str, *, n_statistics: int, n_classes: int, alone: bool
) -> Candidate:
    """Say how a map of a form is fitted."""
    costly = bool(form.free) and n_statistics * n_classes > COSTLY
    growth = 1.0
    if form.free and not alone:
        growth = 1.2 if costly else 1.05
    return Candidate(form, decay, growth=growth, kind=kind)
