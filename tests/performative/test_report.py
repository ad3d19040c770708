"""Numbers of a diagnosis, from what the adapter shows of its rounds."""

import numpy as np
import pytest
from scipy.stats import entropy

from skperf.performative.report import quick_diagnostics


def test_the_residual_is_the_divergence_of_mixes_from_anticipated_ones(lived):
    record = lived[0].record_
    n_pairs = len(record.anticipation.trajectory.pairs()[0].statistics)
    each = [entropy(one["realised"], one["predicted"]) for one in record.losses[-n_pairs:]]
    found = quick_diagnostics(record)
    assert found["n_pairs"] == n_pairs
    assert found["residual_kl"] == pytest.approx(np.mean(each))
