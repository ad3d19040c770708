from skperf import InfluenceScorer

scorer = InfluenceScorer(module, method="ggn", damping=0.01).fit(X_train, y_train)
scores = scorer.influence(X_test, y_test)
