"""Give pieces of work to joblib, and send what they share once to each worker."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any
from uuid import uuid4

import cloudpickle
import numpy as np
from joblib import Parallel, delayed, effective_n_jobs, parallel_config
from joblib.parallel import get_active_backend
from numpy.typing import NDArray


def spread(
    task: Callable[..., Any],
    common: Any,
    pieces: Iterable[Any],
    *,
    n_jobs: int | None,
    prefer: str | None = None,
    own: bool = False,
) -> Iterator[Any]:
    """Run ``task(common, piece)`` for every piece, wherever joblib is told to."""
    # Processes take `common` as an array of bytes: joblib maps it into the memory of processes
    # on this machine, and dask replicates it over its workers, so that a worker that dies costs
    # time only. Threads share it.
    if effective_n_jobs(n_jobs) == 1:
        yield from (task(common, piece) for piece in pieces)
        return
    if not leaves_the_process(n_jobs, prefer):
        parallel = Parallel(n_jobs, prefer=prefer, return_as="generator")
        yield from parallel(
            delayed(task)(deepcopy(common) if own else common, piece) for piece in pieces
        )
        return
    # dask names what it replicates by its content, and may be dropping the same content from the
    # last call just now: a few bytes behind the pickle make it another
    packed = np.frombuffer(cloudpickle.dumps(common) + uuid4().bytes, np.uint8)
    with _replicated(packed, prefer):
        parallel = Parallel(n_jobs, prefer=prefer, return_as="generator")
    yield from parallel(delayed(_unpacked)(task, packed, piece) for piece in pieces)


def leaves_the_process(n_jobs: int | None, prefer: str | None = None) -> bool:
    """Say whether what tasks take and give is copied to other processes and back."""
    backend, _ = get_active_backend(prefer=prefer)
    return effective_n_jobs(n_jobs) > 1 and not getattr(backend, "supports_sharedmem", False)


def _replicated(packed: NDArray[np.uint8], prefer: str | None) -> AbstractContextManager[Any]:
    backend, _ = get_active_backend(prefer=prefer)
    client = getattr(backend, "client", None)
    if client is None:
        return nullcontext()
    replicated: AbstractContextManager[Any] = parallel_config(
        "dask", n_jobs=-1, client=client, scatter=[packed]
    )
    return replicated


def _unpacked(task: Callable[..., Any], packed: NDArray[np.uint8], piece: Any) -> Any:
    return task(pickle.loads(packed.data), piece)
