"""What a second Ctrl-C may leave behind in torch, put back at the end of every public method."""

import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import wraps
from traceback import clear_frames
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.overrides import _pop_mode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Owner = TypeVar("Owner", bound=type)
_C: Any = torch._C
_dispatch: Any = torch.utils._python_dispatch


def undisturbed(owner: Owner, within: Collection[str] = ()) -> Owner:
    """Have every public method of a class leave torch's modes as it found them, however it ends.

    Those of `within` are left out: others of the class call them, at every step of a training say.
    """
    for name, method in list(vars(owner).items()):
        if isinstance(method, FunctionType) and not name.startswith("_") and name not in within:
            setattr(owner, name, _undisturbed(method))
    return owner


def _undisturbed(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        # its end is no Python code, where a second interrupt could fall before the first line
        with _C._InferenceMode(torch.is_inference_mode_enabled()):
            before, filters = _levels(), warnings.filters
            try:
                return method(*args, **kwargs)
            except BaseException as error:
                restored = False
                while not restored:
                    with suppress(KeyboardInterrupt):  # another one may fall in here
                        if _levels() != before:
                            # contexts that could not end live on in tracebacks, and end with them
                            clear_frames(error.__traceback__)
                            clear_frames(getattr(error.__context__, "__traceback__", None))
                            _put_back(before)
                        if isinstance(error, KeyboardInterrupt):  # else they may be others'
                            warnings.filters = filters
                        restored = True
                raise

    return call


def _levels() -> tuple[Any, ...]:
    return (
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),  # the guard puts them back
        _C._autograd._top_saved_tensors_default_hooks(True),
        _C._len_torch_function_stack(),
        _dispatch._len_torch_dispatch_stack(),
        _C._functorch.get_dynamic_layer_stack_depth(),
        eager_transforms.JVP_NESTING,
        forward_ad._current_level,
    )


def _put_back(before: tuple[Any, ...]) -> None:
    _, hooks, functions, dispatched, depth, nesting, dual = before
    while (top := _C._autograd._top_saved_tensors_default_hooks(True)) and top != hooks:
        _C._autograd._pop_saved_tensors_default_hooks()
    while _C._len_torch_function_stack() > functions:
        _pop_mode()
    while _dispatch._len_torch_dispatch_stack() > dispatched:
        _dispatch._pop_mode()
    if _C._functorch.get_dynamic_layer_stack_depth() > depth:
        _C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        # these two belong to the process, but forward mode is one call's at a time
        eager_transforms.JVP_NESTING = nesting
        while forward_ad._current_level > dual:
            forward_ad.exit_dual_level()
