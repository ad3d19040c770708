"""Weights and moments of the stages of a training, as a network of ours takes them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn

from skperf.backbone._opening import open_network
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.influence._methods import TracIn
from skperf.influence.methods import Adam


def moments_of(state: Mapping[str, Any], parameters: Parameters, method: TracIn) -> Adam:
    """Adam's moments at a stage, by name of parameter, as flat tensors (p,)."""
    parts: dict[str, list[Tensor]] = {"exp_avg": [], "exp_avg_sq": []}
    steps = []
    for name, parameter in parameters.items():
        own = state.get(name, {}) if isinstance(state, Mapping) else {}
        if any(np.shape(own.get(key)) != parameter.shape for key in parts):
            raise ValueError(
                f"moments hold no state of {name!r}; needed is a dict by name of parameter with "
                "exp_avg and exp_avg_sq of its shape."
            )
        for key, entries in parts.items():
            entries.append(torch.as_tensor(state[name][key]).to(parameter).reshape(-1).cpu())
        steps.append(state[name].get("step"))
    # the step that Adam would take next
    step = None if steps[0] is None else int(steps[0]) + 1
    first, second = method.betas
    mean, square = (torch.cat(entries) for entries in parts.values())
    return Adam(mean, square, step, (first, second), method.eps)


def state_of(network: Network, checkpoint: Any, i: int) -> dict[str, Tensor]:
    """Weights of stage i, held against the network that they are put into."""
    if isinstance(checkpoint, Mapping):
        state = checkpoint
    elif isinstance(checkpoint, nn.Module):
        state = checkpoint.state_dict()
    elif isinstance(checkpoint, BaseEstimator):
        state = open_network(checkpoint).module.state_dict()
    else:
        raise TypeError(
            f"checkpoint {i} is a {type(checkpoint).__name__}; needed is a state dict, a module or "
            "a fitted estimator. skperf.influence.read_checkpoints reads files and folders."
        )
    for name, tensor in network.module.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            seen = "missing" if name not in state else f"of shape {tuple(state[name].shape)}"
            raise ValueError(
                f"checkpoint {i} does not fit the estimator: {name!r} is {seen}, expected shape "
                f"{tuple(tensor.shape)}."
            )
    # own memory: the user may go on training the module that was given
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def with_weights(
    network: Network, state: Mapping[str, Tensor] | None, *, double: bool = False
) -> Network:
    """Put other weights into a network of ours, or take it to double precision."""
    if state is None and not (double and network.dtype != torch.float64):
        return network
    copy = network.copy()
    own = dict(copy.module.state_dict())
    with torch.no_grad():
        for name, value in (state or {}).items():
            if name in own:
                own[name].copy_(value)
    return replace(copy, module=copy.module.double()) if double else copy
