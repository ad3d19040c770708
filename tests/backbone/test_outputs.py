import pytest
import torch

from skperf.backbone.outputs import OUTPUTS, resolve_output

LOGITS = torch.tensor([[2.0, 1.0, -1.0], [0.0, 3.0, 5.0]])
CODES = torch.tensor([0, 1])


def test_outputs_follow_their_definitions():
    p = LOGITS.softmax(1)[[0, 1], [0, 1]]
    expected = {
        "margin": torch.tensor([1.0, -2.0]),
        "logit": torch.tensor([2.0, 3.0]),
        "log_odds": (p / (1 - p)).log(),
        "loss": -p.log(),
        "proba": p,
    }
    assert set(expected) == set(OUTPUTS)
    for name, values in expected.items():
        torch.testing.assert_close(resolve_output(name)(LOGITS, CODES), values)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"output='hinge' is unknown; use one of \['loss'\]"):
        resolve_output("hinge", ["loss"])


def test_a_function_of_the_user_is_guarded():
    assert torch.equal(resolve_output(lambda z, y: z[:, 0])(LOGITS, CODES), LOGITS[:, 0])
    with pytest.raises(ValueError, match=r"a tensor of shape \(2,\); it returned \(\)"):
        resolve_output(lambda z, y: z.sum())(LOGITS, CODES)
    with pytest.raises(ValueError, match="not finite, first at row 1"):
        resolve_output(lambda z, y: torch.tensor([1.0, torch.nan]))(LOGITS, CODES)
