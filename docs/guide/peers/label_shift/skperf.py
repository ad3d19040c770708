from sklearn.frozen import FrozenEstimator

from skperf import PerformativeAdapter

adapter = PerformativeAdapter(FrozenEstimator(classifier), adapter="fixed", transductive="em")
predictions = adapter.fit(X_train, y_train).predict(X_test)
