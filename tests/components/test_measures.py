"""What an output of the user's may return."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skperf import ComponentAttributor, from_module
from skperf.backbone.losses import resolve_loss
from skperf.backbone.rows import Rows
from skperf.components.measures import Measure, _guarded, checked_output


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(3, 2, 1), r"\(3, 2, 1\)"),
        (torch.tensor(1.0), r"\(\)"),
        (np.zeros(3), "ndarray"),
    ],
    ids=["length", "axes", "number", "array"],
)
def test_other_shapes_and_types_are_named(returned, seen):
    with pytest.raises(ValueError, match=rf"shape \(3,\) or \(3, t\); it returned .*{seen}"):
        _guarded(returned, 3)


def test_numbers_and_rows_of_numbers_pass():
    for values in (torch.arange(3.0), torch.ones(3, 2)):
        assert _guarded(values, 3) is values
    with pytest.raises(ValueError, match="first at row 1"):
        _guarded(torch.tensor([0.0, torch.nan, torch.inf]), 3)


def test_outputs_are_known_by_name_or_are_functions():
    checked_output("margin")
    checked_output("value")
    checked_output(lambda outputs: outputs[:, 0])
    with pytest.raises(ValueError, match="output='margins' is unknown"):
        checked_output("margins")


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]], dtype=torch.float64)


def measured(output, targets, loss=None, outputs=LOGITS):
    measure = Measure(output, loss or resolve_loss(nn.CrossEntropyLoss()))
    asked = SimpleNamespace(targets=targets, rows=Rows.of(torch.ones(2, 1)), single=True)
    return measure(outputs, asked)


def test_a_loss_is_that_of_each_row_and_several_labels_need_their_own():
    codes = torch.tensor([2, 0])
    expected = nn.functional.cross_entropy(LOGITS, codes, reduction="none")
    torch.testing.assert_close(measured("loss", codes), expected)
    shares = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    expected = -(shares * LOGITS.log_softmax(1)).sum(1)
    torch.testing.assert_close(measured("loss", shares), expected)
    with pytest.raises(ValueError, match="several labels a row"):
        measured("loss", torch.tensor([[1, 0, 1], [0, 0, 1]]))
    numbers = measured("loss", torch.zeros(2, 3), resolve_loss(nn.MSELoss()))
    torch.testing.assert_close(numbers, LOGITS.square().mean(1))


def test_functions_get_what_they_ask_for():
    codes = torch.tensor([2, 0])
    assert measured(lambda outputs: outputs[:, 0], None).tolist() == [2.0, 0.1]
    assert measured(lambda outputs, y: outputs[[0, 1], y], codes).tolist() == [0.5, 0.1]
    found = measured(lambda outputs, y, X: outputs[:, 1] + X[:, 0], codes)
    assert found.tolist() == [0.0, 1.2]
    with pytest.raises(ValueError, match="output reads y, which was not given"):
        measured(lambda outputs, y: outputs[:, 0] * y.float(), None)


def test_names_are_of_one_label_a_row():
    with pytest.raises(ValueError, match=r"output='margin' is of one label a row.*\(3, 4\) a row"):
        measured("margin", torch.tensor([0, 1]), outputs=torch.zeros(2, 3, 4))
    assert measured("value", None, outputs=torch.tensor([[1.0], [2.0]])).tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="one output a row, and this one has"):
        measured("value", None)


def test_numbers_are_no_labels_and_the_message_names_the_output():
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    X = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    network = from_module(module, loss="squared_error")
    with pytest.raises(ValueError, match=r"output='margin' is of one label a row.*use 'value'"):
        ComponentAttributor(network, budget=12).fit(X, X[:, 0])
    fitted = ComponentAttributor(network, budget=12, output="value").fit(X, X[:, 0])
    assert fitted.attributions_.shape == (9, 4)
