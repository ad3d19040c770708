"""Numbers of a diagnosis, from what the adapter shows of its rounds."""

import numpy as np
import pytest
from scipy.stats import entropy

from skperf.performative.diagnostics import extrapolation, identifiability
from skperf.performative.report import drift_report, quick_diagnostics


def test_the_residual_is_the_divergence_of_mixes_from_anticipated_ones(lived):
    record = lived[0].record_
    n_pairs = len(record.anticipation.trajectory.pairs()[0].statistics)
    each = [entropy(one["realised"], one["predicted"]) for one in record.losses[-n_pairs:]]
    found = quick_diagnostics(record)
    assert found["n_pairs"] == n_pairs
    assert found["residual_kl"] == pytest.approx(np.mean(each))


def test_a_report_tells_each_recall_and_the_worst_of_the_last_round(lived):
    adapter = lived[0]
    report = drift_report(adapter.record_)
    lines = str(report).splitlines()
    start = lines.index("recall")
    for row, line in zip(report.recall, lines[start + 2 : start + 2 + 4], strict=True):
        label, *cells = line.split()
        assert label == str(row["label"])
        told = [row["before"], row["last"], row["z"]]
        assert [float(cell) for cell in cells] == pytest.approx(told, abs=6e-4)
    worst = adapter.prequential_.worst_recall[-1]
    assert f"worst recall of a class in the last round: {worst:.2f}" in report.answer["notes"]


def test_a_report_tells_the_mix_of_each_class_with_its_interval(lived):
    report = drift_report(lived[0].record_)
    lines = str(report).splitlines()
    assert lines[0] == f"round {report.answer['round']}: mix"
    assert lines[1].split() == ["class", "base", "before", "last", "next", "low", "high"]
    names = ("base", "before", "last", "anticipated", "low", "high")
    for row, line in zip(report.mix, lines[2:6], strict=True):
        label, *cells = line.split()
        assert label == str(row["label"])
        assert [float(cell) for cell in cells] == pytest.approx([row[n] for n in names], abs=6e-4)
    assert lines[6] == "recall"


def test_diagnostics_hold_the_model_in_force_against_those_before_it(lived):
    record = lived[0].record_
    trajectory = record.anticipation.trajectory
    before, latest = (
        trajectory.statistics[: -trajectory.lag],
        trajectory.statistics[-trajectory.lag],
    )
    found = quick_diagnostics(record)
    assert found["extrapolation"] == pytest.approx(extrapolation(latest, before))
    assert found["extrapolation"] != pytest.approx(extrapolation(before[0], before))
    for name, value in identifiability(before).items():
        np.testing.assert_allclose(found[name], value)
