from skperf import Reprogrammer
from skperf.metrics import ood_auroc

reprogrammer = Reprogrammer(module, border=1, ood_score="energy", max_epochs=5).fit(
    X_train, y_train
)
scores = reprogrammer.score_samples(np.concatenate([X_test, X_other]))
auroc = ood_auroc(np.r_[np.ones(len(X_test)), np.zeros(len(X_other))], scores)
