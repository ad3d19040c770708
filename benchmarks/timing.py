"""Time functions in turn, so that a drifting machine hits them alike."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int = 5, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Run every function `repeats` times, A B C A B C ...

    Parameters
    ----------
    functions : mapping of str to callable
        What to time, by name.
    repeats : int, default=5
        Counted rounds.
    warm_up : int, default=1
        Rounds before them.

    Returns
    -------
    dict of str to dict
        For each name the median, least and greatest wall and CPU seconds: ``wall``,
        ``cpu``, ``wall_min``, ``wall_max``, ``cpu_min``, ``cpu_max``.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            sample = time.perf_counter() - wall, time.process_time() - cpu
            if turn >= warm_up:
                samples[name].append(sample)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[tuple[float, float]]) -> dict[str, float]:
    summary = {}
    for name, column in zip(("wall", "cpu"), zip(*values, strict=True), strict=True):
        summary[name] = statistics.median(column)
        summary[f"{name}_min"], summary[f"{name}_max"] = min(column), max(column)
    return summary


class Peak:
    """The most memory of this process while a block of code runs, looked at every 5 ms."""

    def __init__(self, held: Callable[[], float]) -> None:
        self.held = held

    def __enter__(self) -> "Peak":
        self.before = self.highest = self.held()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.highest = max(self.highest, self.held())

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


def resident() -> float:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def anonymous() -> float:
    """Bytes of this process in memory that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024
