"""Every family of transformers' classifiers that can be built small, against weights zeroed."""

import json

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")

from tests.components import families  # noqa: E402

KNOWN = json.loads(families.RECORD.read_text())
COMPUTED = {name: entry for name, entry in KNOWN["models"].items() if "refused" not in entry}
# a tenth in `make test`, drawn once; those that take seconds are left to the thorough run
SOME = set(np.random.default_rng(0).permutation(sorted(COMPUTED))[:18]) - {
    "CvtForImageClassification",
    "EfficientNetForImageClassification",
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name", [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in COMPUTED]
)
def test_counterfactuals_equal_zeroed_weights(name):
    entry = COMPUTED[name]
    if transformers.__version__ != KNOWN["transformers"]:
        # families come and go with a release; CI runs the version of constraints.txt
        pytest.skip(f"the record is of transformers {KNOWN['transformers']}")
    seen = families.sweep(entry["task"], entry["family"], name)
    assert seen["kinds"] == entry["kinds"]
    assert seen["path"] == "gates"
    assert seen["by_hand"] == entry["by_hand"]
    assert seen["verified"] < 1e-5
    assert seen["by_hand"] == 0 or seen["error"] < 1e-5


def test_most_families_are_computed_and_the_rest_are_named():
    assert len(COMPUTED) >= 165
    refused = {name for name, entry in KNOWN["models"].items() if "refused" in entry}
    assert refused == set(KNOWN["models"]) - set(COMPUTED)
    by_hand = [name for name, entry in COMPUTED.items() if entry["by_hand"]]
    assert len(by_hand) >= len(COMPUTED) - 2


def test_auto_takes_heads_and_neurons_of_all_with_attention_or_warns():
    for name, entry in COMPUTED.items():
        kinds = set(entry["kinds"])
        if "attention_head" in kinds:
            inner = {"mlp_neuron", "conv_filter", "expert"} & kinds
            assert inner or entry["warned"], name
