"""Honest progress for long work."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def track(
    iterable: Iterable[Item], *, description: str, total: int | None = None, verbose: int = 0
) -> Iterator[Item]:
    """Pass items on, with a bar where one was asked for.

    Parameters
    ----------
    iterable : iterable
        The work, item by item.
    description : str
        What the bar says.
    total : int, optional
        Number of items, if the iterable has no length.
    verbose : int, default=0
        No bar at 0.

    Yields
    ------
    object
        The items.
    """
    if verbose:
        iterable = tqdm(iterable, desc=description, total=total, leave=False)
    yield from iterable
