import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ktae_trl.credit.combine import combine

ADVANTAGES = torch.tensor([2.0, -0.5, 0.0])
VALUES = torch.tensor([[0.5, -1.0, 0.0], [0.5, -1.0, 1.0], [0.5, -1.0, 1.0]])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("multiply", [[3.0, 0.0, 2.0], [-0.25, -1.0, 0.0], [0.0, 0.0, 0.0]]),
        ("add", [[2.5, 1.0, 2.0], [0.0, -1.5, 0.5], [0.5, -1.0, 1.0]]),
        ("scale", [[1.0, -2.0, 0.0], [-0.25, 0.5, -0.5], [0.0, 0.0, 0.0]]),
        ("replace", VALUES.tolist()),
    ],
)
def test_by_hand(how, expected):
    torch.testing.assert_close(combine(ADVANTAGES, VALUES, how), torch.tensor(expected))


@given(st.floats(-10, 10, width=32), st.floats(-1, 1, width=32))
def test_multiply_never_turns_the_sign_and_at_most_doubles(advantage, value):
    result = combine(torch.tensor([advantage]), torch.tensor([[value]]), "multiply").item()
    assert result * advantage >= 0
    assert abs(result) <= 2 * abs(advantage)


def test_no_gradient_flows():
    assert not combine(ADVANTAGES.clone().requires_grad_(), VALUES, "multiply").requires_grad


def test_bad_input():
    with pytest.raises(ValueError, match="how must be one of multiply, add, scale, replace, not 'times'"):
        combine(ADVANTAGES, VALUES, "times")
    with pytest.raises(ValueError, match=r"shape \(B,\) .* not \(3,\) and \(2, 3\)"):
        combine(ADVANTAGES, VALUES[:2], "add")
