"""scikit-learn's callbacks, alone and through a grid search of two processes."""

import pytest
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV

from skperf import ComponentAttributor, InfluenceScorer, PerformativeAdapter, Reprogrammer

callback = pytest.importorskip("sklearn.callback", reason="scikit-learn 1.8 has no callbacks")

X, y = load_iris(return_X_y=True)
ESTIMATORS = [
    PerformativeAdapter(random_state=0),
    Reprogrammer(max_epochs=1, random_state=0),
    InfluenceScorer(method="gradient_dot", random_state=0),
    ComponentAttributor(budget=70, random_state=0),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_progress_bar_through_a_search(estimator, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    search = GridSearchCV(
        estimator,
        {"random_state": [0, 1]},
        cv=2,
        n_jobs=2,
        scoring=lambda fitted, X, y: float(len(X)),
    ).set_callbacks(callback.ProgressBar())
    search.fit(X, y)
    assert type(estimator).__name__ in capfd.readouterr().out
    assert not hasattr(search.best_estimator_, "_callback_fit_ctx")


def test_scoring_monitor_gets_a_fitted_estimator():
    monitor = callback.ScoringMonitor(scoring="accuracy")
    PerformativeAdapter(random_state=0).set_callbacks(monitor).fit(X, y)
    logs = monitor.get_logs().data_as_pandas
    assert len(logs) == 1
    assert logs["accuracy"].iloc[0] > 0.9
