"""The one door to torch: open a classifier as a network, run it, never change it."""

from skperf.backbone.batch_norm import prediction_time_batch_norm

__all__ = ["prediction_time_batch_norm"]
