"""Honest progress for long work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def track(
    iterable: Iterable[Item], *, description: str, total: int | None = None, verbose: int = 0
) -> Iterator[Item]:
    """Pass items on, with a bar where one was asked for."""
    if verbose:
        # in a notebook without ipywidgets this import warns: only who asked for a bar shall see it
        from tqdm.auto import tqdm

        iterable = tqdm(iterable, desc=description, total=total, leave=False)
    yield from iterable
