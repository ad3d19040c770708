from skperf import ComponentAttributor

attributor = ComponentAttributor(module, components="conv_filters", method="loo").fit(
    X_test, y_test
)
scores = attributor.attributions_
