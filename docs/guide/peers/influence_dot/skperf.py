from skperf import InfluenceScorer

scorer = InfluenceScorer(module, method="gradient_dot").fit(X_train, y_train)
scores = scorer.influence(X_test, y_test)
