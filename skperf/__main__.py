"""The main job: every estimator on real data, one table, a few figures.

Run with ``python -m skperf [folder]``; figures go to the folder, by default
``skperf_quickstart``.
"""

import sys
import textwrap
import time
import warnings
from pathlib import Path

COLUMNS = ("estimator", "what was asked", "what came out", "the naive alternative")
WIDTHS = (21, 38, 38, 30)


def main(folder: Path) -> None:
    """Run every section and print one table.

    Parameters
    ----------
    folder : Path
        Where figures go; made if it is not there.
    """
    import matplotlib as mpl
    import torch

    mpl.use("Agg")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    print_row(COLUMNS)
    print("-" * (sum(WIDTHS) + 2 * len(WIDTHS)))
    for section in SECTIONS:
        start = time.perf_counter()
        for row in section(folder):
            print_row(row)
        print(f"  ({time.perf_counter() - start:.0f} s)\n", flush=True)
    names = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    print(f"Figures in {folder}/: {names}")


def print_row(cells: tuple[str, ...]) -> None:
    """Print a row of the table, its cells wrapped.

    Parameters
    ----------
    cells : tuple of str
        One for each of the columns.
    """
    wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, WIDTHS, strict=True)]
    for line in range(max(map(len, wrapped))):
        parts = [
            (lines[line] if line < len(lines) else "").ljust(width)
            for lines, width in zip(wrapped, WIDTHS, strict=True)
        ]
        print("  ".join(parts).rstrip())


SECTIONS: list = []

if __name__ == "__main__":
    warnings.simplefilter("default")
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "skperf_quickstart"))
