"""Do the same for every row or network: at once where torch can, else one after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map


@contextmanager
def plain() -> Iterator[None]:
    """Spare vmap attention that has no derivative, and users its warnings about speed."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]
        torch.backends.mha.set_fastpath_enabled(fused)


def mapped(
    function: Callable[..., Any], *stacked: Any, chunk_size: int | None = None, looped: bool = False
) -> Any:
    """Apply a function to every entry along the first dimension of trees of tensors."""
    if not looped:
        try:
            with plain():
                return vmap(function, chunk_size=chunk_size)(*stacked)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            # a network may branch on its values or use operators that vmap has no rule for: torch
            # says so in many kinds of errors, and an error of the network's own comes again below
            pass
    n = len(tree_leaves(stacked)[0])

    def entry(i: int) -> Any:
        return function(*tree_map(lambda tensor: tensor[i], stacked))

    results = [entry(i) for i in range(n)]
    return tree_map(lambda *tensors: torch.stack(tensors), results[0], *results[1:])
