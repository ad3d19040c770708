"""Twenty classifiers of scikit-learn: accuracy and log loss with and without the adapter.

Run with ``python -m benchmarks.performative_classifiers [--seeds 2]``; writes
``benchmarks/results/performative_classifiers.json``. Noisy digits, a world that collects what the
model gets wrong, 40 rounds of 300 rows; "inside" classifiers are fitted on the first round by the
adapter, "frozen" ones on 500 rows before. Both predictions are of the same rows.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
from sklearn import discriminant_analysis, ensemble, linear_model, naive_bayes, neighbors, svm, tree
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks import runner
from skperf import PerformativeAdapter
from skperf.datasets import PerformativeStream

RESULTS = Path(__file__).parent / "results" / "performative_classifiers.json"
N_ROUNDS = 40
CLASSIFIERS = (
    linear_model.LogisticRegression(max_iter=300),
    linear_model.LogisticRegression(max_iter=300, class_weight="balanced"),
    make_pipeline(StandardScaler(), linear_model.LogisticRegression(max_iter=300)),
    linear_model.RidgeClassifier(),
    linear_model.SGDClassifier(random_state=0),
    linear_model.SGDClassifier(loss="log_loss", random_state=0),
    linear_model.Perceptron(random_state=0),
    svm.LinearSVC(random_state=0),
    svm.SVC(),
    CalibratedClassifierCV(svm.LinearSVC(random_state=0)),
    naive_bayes.GaussianNB(),
    naive_bayes.BernoulliNB(binarize=8.0),
    neighbors.KNeighborsClassifier(),
    neighbors.KNeighborsClassifier(1),
    discriminant_analysis.LinearDiscriminantAnalysis(),
    tree.DecisionTreeClassifier(max_depth=6, random_state=0),
    ensemble.RandomForestClassifier(40, random_state=0),
    ensemble.ExtraTreesClassifier(40, random_state=0),
    ensemble.AdaBoostClassifier(random_state=0),
    ensemble.HistGradientBoostingClassifier(max_iter=15, random_state=0),
    MLPClassifier((32,), max_iter=150, random_state=0),
)


def run(classifier, seed, frozen):
    """Live through the rounds: means of accuracy and log loss, without and with the adapter."""
    X, y = load_digits(return_X_y=True)
    X = X + np.random.default_rng(seed).normal(scale=6, size=X.shape)
    order = np.random.default_rng(seed).permutation(len(y))
    train, rest = order[:500], order[500:]
    model = clone(classifier)
    if frozen:
        model = FrozenEstimator(model.fit(X[train], y[train]))
    world = PerformativeStream(
        X[rest], y[rest], temperature=0.2, train_size=1, test_size=300, random_state=seed
    )
    adapter = PerformativeAdapter(
        model, adapter=["fixed", "tied", "curve", "linear"], random_state=seed
    )
    statistic = None
    for number in range(N_ROUNDS):
        batch = world.next_round(statistic)
        statistic = adapter.partial_fit(batch.X_test, batch.y_test, rounds=number).statistic_
    names = ("accuracy_none", "accuracy", "none", "adapter")
    return [adapter.prequential_[name].mean() for name in names]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    records = []
    for classifier in CLASSIFIERS:
        for frozen in (True, False):
            runs = np.array([run(classifier, seed, frozen) for seed in range(options.seeds)])
            mean = runs.mean(axis=0)
            name = getattr(classifier, "steps", [("", classifier)])[-1][1]
            record = {
                "classifier": repr(name),
                "held": "frozen" if frozen else "inside",
                "accuracy alone": mean[0],
                "accuracy": mean[1],
                "least gain": (runs[:, 1] - runs[:, 0]).min(),
                "log loss alone": mean[2],
                "log loss": mean[3],
                "seeds": options.seeds,
            }
            record = {
                k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()
            }
            print(*record.values(), sep="  ", flush=True)
            records.append(record)
    runner.save(RESULTS, records, seeds=range(options.seeds))


if __name__ == "__main__":
    main()
