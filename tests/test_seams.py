"""What one estimator makes, the next one takes."""

import numpy as np
import pytest
from sklearn.frozen import FrozenEstimator

from skperf import (
    ComponentAttributor,
    InfluenceScorer,
    PerformativeAdapter,
    PerformativeWarning,
    Reprogrammer,
    from_module,
)
from skperf.datasets import load_fashion_cnn, load_fashion_mnist, load_text_image_encoder


@pytest.fixture(scope="module")
def rows():
    fashion = load_fashion_mnist(subset="test")
    return fashion.images[:120, None].astype(np.float32) / 255, fashion.target[:120]


@pytest.fixture(scope="module")
def products(rows):
    """One fitted classifier from each method that makes one."""
    X, y = rows
    network = from_module(load_fashion_cnn(), np.arange(10))
    attributor = ComponentAttributor(network, budget=30, random_state=0).fit(X, y)
    scorer = InfluenceScorer(network, method="gradient_dot").fit(X, y)
    encoder, tokenizer = load_text_image_encoder()
    reprogrammer = Reprogrammer(
        encoder, tokenizer=tokenizer, border=4, max_epochs=1, alpha=0.0, random_state=0
    ).fit(X, y)
    return {
        "ablated": attributor.edit(y == 0, y != 0, k=2, direction="decrease"),
        "unlearned": scorer.remove(indices=[0, 1, 2]),
        "reprogrammed": reprogrammer,
        "frozen": FrozenEstimator(reprogrammer),
    }


KINDS = ["ablated", "unlearned", "reprogrammed", "frozen"]


@pytest.mark.parametrize("kind", KINDS)
def test_into_performative_adapter(products, rows, kind):
    X, y = rows
    adapter = PerformativeAdapter(products[kind], adapter="fixed", random_state=0)
    adapter.fit(X, y, rounds=np.arange(120) // 30)
    assert np.isfinite(adapter.predict_proba(X)).all()


def test_all_ranked_together(products, rows):
    X, y = rows
    adapter = PerformativeAdapter(
        load_fashion_cnn(), adapter="tied", base_prior="uniform", random_state=0
    )
    adapter.fit(X, y, rounds=np.arange(120) // 20)
    with pytest.warns(PerformativeWarning, match="no evidence that the mix answers"):
        ranking = adapter.rank_models([*products.values()], X, y, n_bootstrap=10)
    assert sorted(ranking.order) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_into_influence_scorer(products, rows, kind):
    X, y = rows
    parameters = "last" if kind in ("ablated", "unlearned") else "model.visual.*"
    scorer = InfluenceScorer(products[kind], method="gradient_dot", parameters=parameters).fit(X, y)
    assert scorer.influence(X[:5], y[:5]).shape == (5, 120)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_influence_through_a_program(products, rows):
    X, y = rows
    scorer = InfluenceScorer(
        products["reprogrammed"],
        method="gradient_dot",
        parameters="*program*",
        # no layer computes with a program: its gradients are taken row by row
        gradients="reference",
    ).fit(X[:40], y[:40])
    assert np.abs(scorer.influence(X[:5], y[:5])).min() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_into_component_attributor(products, rows, kind):
    X, y = rows
    attributor = ComponentAttributor(products[kind], budget=30, random_state=0).fit(X[:30], y[:30])
    assert attributor.attributions_.shape == (30, len(attributor.components_))


@pytest.mark.parametrize("kind", ["ablated", "unlearned"])
def test_edited_networks_as_encoders(products, rows, kind):
    X, y = rows
    reprogrammer = Reprogrammer(
        products[kind].to_module(), border=2, max_epochs=1, random_state=0
    ).fit(X, y)
    assert reprogrammer.predict(X).shape == (120,)
