import math

import pytest
import torch

from finetune.fake_layernorm import CLASSES
from finetune.objective import auxiliary_loss, cross_entropy


def test_cross_entropy_is_the_mean_surprise_of_the_next_token():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator) * 4
    tokens = torch.randint(0, 7, (3, 5), generator=generator)
    surprises = []
    for b in range(3):
        for p in range(4):
            row = logits[b, p].tolist()
            surprises.append(math.log(sum(map(math.exp, row))) - row[tokens[b, p + 1]])
    assert cross_entropy(logits, tokens).item() == pytest.approx(sum(surprises) / 12, rel=1e-6)


def test_cross_entropy_has_no_gradient_at_the_last_position_and_is_taken_in_float32():
    logits = torch.randn(2, 4, 6, dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert (logits.grad[:, -1] == 0).all()
    assert (logits.grad[:, :-1] != 0).any(-1).all()


def test_end_of_text_is_a_target_like_any_other():
    logits = torch.zeros(1, 3, 4)
    assert cross_entropy(logits, torch.tensor([[0, 0, 0]])).item() == pytest.approx(math.log(4))


STD = [[9.0, 1.0, 2.0, 5.0], [7.0, 3.0, 8.0, 2.0]]
NAMES = [["bos", "ordinary", "ordinary", "eot"], ["bos", "ordinary", "eot", "ordinary"]]


def auxiliary(std):
    return auxiliary_loss(std, torch.tensor([[CLASSES.index(name) for name in row] for row in NAMES]))


def test_auxiliary_loss_draws_every_token_to_the_mean_of_the_ordinary_ones():
    target = (1 + 2 + 3 + 2) / 4
    expected = sum((std - target) ** 2 for row in STD for std in row) / 8
    assert auxiliary(torch.tensor(STD, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_flows_through_the_target_of_the_auxiliary_loss():
    std = torch.tensor(STD, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(auxiliary(std), std)
    torch.testing.assert_close(found, 2 * (std.detach() - 2) / 8)


def test_uniform_stds_have_no_auxiliary_loss():
    assert auxiliary(torch.full((2, 4), 3.0)).item() == 0
