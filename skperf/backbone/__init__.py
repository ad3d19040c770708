"""The one door to torch: open a classifier as a network, run it, never change it."""
