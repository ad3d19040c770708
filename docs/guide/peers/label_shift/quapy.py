from quapy.method.aggregative import EMQ

# prevalence of the classes in the new rows; correcting predictions with it is left to you
quantifier = EMQ(classifier, fit_classifier=False, val_split=None)
quantifier.fit(X_train, y_train)
prevalence = quantifier.predict(X_test)
