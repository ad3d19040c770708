"""matplotlib, where it is wanted and may be missing."""

from typing import Any


def pyplot() -> Any:
    """Import matplotlib's pyplot, or say how to install it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Drawing needs matplotlib, which is not installed: pip install 'skperf[plot]'"
        ) from error
    return plt
