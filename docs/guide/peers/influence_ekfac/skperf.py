from skperf import InfluenceScorer

scorer = InfluenceScorer(module, method="ekfac").fit(X_train, y_train)
scores = scorer.influence(X_test, y_test)
