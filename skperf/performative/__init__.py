"""PerformativeAdapter and its mathematics."""
