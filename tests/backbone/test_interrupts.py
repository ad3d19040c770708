"""What contexts leave behind that never came to their end is put back by public methods."""

import warnings

import pytest
import torch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from skperf import ComponentAttributor, InfluenceScorer, Net, PerformativeAdapter, Reprogrammer
from skperf.backbone.interrupts import undisturbed
from skperf.influence.output_rows import prepare_forward_mode


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        _python_dispatch._len_torch_dispatch_stack(),
        torch._C._functorch.get_dynamic_layer_stack_depth(),
        eager_transforms.JVP_NESTING,
        forward_ad._current_level,
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


@undisturbed
class Leaving:
    def leave(self, context):
        entered = context()
        entered.__enter__()  # and never out of it
        raise KeyboardInterrupt

    def differentiate(self):
        torch._C._functorch._vmap_increment_nesting(3, "error")
        eager_transforms.enter_jvp_nesting()
        forward_ad.enter_dual_level()
        raise KeyboardInterrupt

    def silence(self):
        warnings.catch_warnings().__enter__()
        warnings.simplefilter("ignore")
        raise KeyboardInterrupt

    def twice(self, rows):
        return 2 * rows

    def _own(self):
        torch._C._set_grad_enabled(False)


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.enable_grad,
        torch.inference_mode,
        Functions,
        Dispatch,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda _: torch.empty(0)),
    ],
)
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_context_that_never_ends_is_ended(context, outside):
    with outside():
        before = modes()
        with pytest.raises(KeyboardInterrupt):
            Leaving().leave(context)
        assert modes() == before


def test_levels_of_torchs_function_transforms_are_left():
    prepare_forward_mode()
    before = modes()
    with pytest.raises(KeyboardInterrupt):
        Leaving().differentiate()
    assert modes() == before
    moved = torch.func.jvp(torch.sin, (torch.zeros(2),), (torch.tensor([1.0, 3.0]),))[1]
    assert moved.tolist() == [1.0, 3.0]


def test_filters_of_warnings_are_those_of_before():
    before = list(warnings.filters)
    with pytest.raises(KeyboardInterrupt):
        Leaving().silence()
    assert list(warnings.filters) == before


def test_modes_of_the_user_stay_and_answers_pass():
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks, Functions():
        before = modes()
        with pytest.raises(KeyboardInterrupt):
            Leaving().leave(Functions)
        assert modes() == before
        assert Leaving().twice(torch.ones(2)).tolist() == [2, 2]


def test_only_public_methods_are_wrapped_and_keep_their_names():
    assert Leaving.twice.__name__ == "twice"
    assert not hasattr(Leaving._own, "__wrapped__")
    for owner in (ComponentAttributor, InfluenceScorer, Net, PerformativeAdapter, Reprogrammer):
        assert hasattr(owner.fit, "__wrapped__")
