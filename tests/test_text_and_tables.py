"""Text and tables go through every estimator that applies, whole pipelines included."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from skperf import (
    MLP,
    ComponentAttributor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    PerformativeWarning,
)

transformers = pytest.importorskip("transformers", reason="the extra `clip` is not installed")

SPORT = ("goal", "match", "team", "score", "player", "league", "coach", "final", "race", "win")
MONEY = ("bank", "profit", "share", "market", "trade", "stock", "price", "loan", "tax", "debt")
COMMON = ("the", "a", "of", "and", "in", "to", "was", "said")
WORDS = {"sport": SPORT, "money": MONEY}
VOCABULARY = ("[PAD]", *SPORT, *MONEY, *COMMON)


def make_texts(n=120, length=12, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.choice(["money", "sport"], n)
    texts = [
        " ".join(
            rng.choice(WORDS[label]) if rng.random() < 0.4 else rng.choice(COMMON)
            for _ in range(length)
        )
        for label in y
    ]
    return texts, y


def tokenize(texts):
    """Stands where a Hugging Face tokenizer would, so that nothing is downloaded."""
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    return np.array([[ids[word] for word in text.split()] for text in texts])


class HuggingFaceClassifier(nn.Module):
    """A small BERT as one writes it for skorch: token ids in, logits out."""

    def __init__(self, n_classes=2):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=n_classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, ids):
        return self.bert(input_ids=ids, attention_mask=(ids != 0).long()).logits


@pytest.fixture(scope="module")
def texts():
    raw, y = make_texts()
    return tokenize(raw), y


@pytest.fixture(scope="module")
def text_net(texts):
    ids, y = texts
    net = Net(HuggingFaceClassifier, lr=5e-3, max_epochs=6, batch_size=32, random_state=0)
    return net.fit(ids, y)


def test_text_net_learns(text_net):
    raw, y = make_texts(seed=1)
    assert text_net.score(tokenize(raw), y) > 0.9


def test_text_through_performative_adapter(texts):
    ids, y = texts
    net = Net(HuggingFaceClassifier, lr=5e-3, max_epochs=20, batch_size=16, random_state=0)
    adapter = PerformativeAdapter(net, adapter="tied", random_state=0)
    # an estimator that is not fitted trains on the first round
    with pytest.warns(PerformativeWarning, match="same in every round"):
        adapter.fit(ids, y, rounds=np.maximum(np.arange(120) - 60, 0) // 15)
    assert adapter.score(ids, y) > 0.8


def test_text_through_influence_scorer(texts, text_net):
    from sklearn.frozen import FrozenEstimator

    ids, y = texts
    scorer = InfluenceScorer(FrozenEstimator(text_net), method="gradient_dot").fit(ids[:60], y[:60])
    influence = scorer.influence(ids[60:], y[60:])
    same = y[60:, None] == y[None, :60]
    assert influence[same].mean() > influence[~same].mean()


def test_text_through_component_attributor(texts, text_net):
    from sklearn.frozen import FrozenEstimator

    ids, y = texts
    attributor = ComponentAttributor(
        FrozenEstimator(text_net), components="attention_heads", fraction=0.5, budget=20
    ).fit(ids[:40], y[:40])
    assert len(attributor.components_) == 2


def test_a_table_in_a_pipeline():
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    y = np.where(y == 1, "benign", "malignant")
    net = Net(MLP, lr=0.01, max_epochs=10, random_state=0)
    for estimator in (
        PerformativeAdapter(net, random_state=0),
        InfluenceScorer(net, method="ggn", random_state=0),
        ComponentAttributor(net, budget=40, random_state=0),
    ):
        pipeline = make_pipeline(StandardScaler(), estimator).fit(X[:200], y[:200])
        last = getattr(pipeline, "predict", None) or pipeline.transform
        assert len(last(X[200:260])) == 60
    scores = cross_val_score(
        make_pipeline(StandardScaler(), PerformativeAdapter(net, random_state=0)), X, y, cv=3
    )
    assert scores.mean() > 0.9


def test_transforms_name_their_columns():
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    net = Net(MLP, module__hidden=(8,), lr=0.01, max_epochs=3, random_state=0)
    attributor = ComponentAttributor(net, budget=40, random_state=0)
    frame = attributor.set_output(transform="pandas").fit(X[:50], y[:50]).transform(X[50:60])
    assert frame.shape == (10, len(attributor.components_))
    assert all(isinstance(name, str) for name in frame.columns)
    assert torch.is_grad_enabled()
