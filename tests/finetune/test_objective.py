import math

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from finetune import objective
from finetune.fake_norm import CLASSES
from finetune.objective import Head, auxiliary_loss, next_token_loss


def random_head(seed: int, batch: int = 3, pos: int = 5, vocab: int = 7, d: int = 4) -> Head:
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(batch, pos, d, generator=generator, dtype=torch.float64) * 2
    return Head(
        residual.requires_grad_(), torch.randn(vocab, d, generator=generator, dtype=torch.float64).requires_grad_()
    )


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(9))


def with_autograd(model: Head, tokens: torch.Tensor, teacher: Head, kl_weight: float) -> torch.Tensor:
    """The mixture by torch's own losses, with all logits at once."""
    logits, expected = (
        F.linear(head.residual[:, :-1], head.unembedding).flatten(0, 1).log_softmax(-1) for head in (model, teacher)
    )
    kl = F.kl_div(logits, expected.detach(), log_target=True, reduction="batchmean")
    return (1 - kl_weight) * F.nll_loss(logits, tokens[:, 1:].flatten()) + kl_weight * kl


def test_cross_entropy_is_the_mean_surprise_of_the_next_token(tokens):
    head = random_head(0)
    logits = head.residual @ head.unembedding.T
    surprises = []
    for b in range(3):
        for p in range(4):
            row = logits[b, p].tolist()
            surprises.append(math.log(sum(map(math.exp, row))) - row[tokens[b, p + 1]])
    loss = next_token_loss(head, tokens)
    assert loss.total.item() == loss.cross_entropy.item() == pytest.approx(sum(surprises) / 12, rel=1e-12)
    assert loss.kl == 0


@pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("at_once", [7, 35, 10**6])
def test_loss_and_gradients_are_those_of_all_logits_at_once(tokens, kl_weight, at_once):
    model, teacher = random_head(0), random_head(1)
    loss = next_token_loss(model, tokens, teacher, kl_weight, at_once=at_once)
    expected = with_autograd(model, tokens, teacher, kl_weight)
    torch.testing.assert_close(loss.total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.kl, with_autograd(model, tokens, teacher, 1.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss.cross_entropy, with_autograd(model, tokens, teacher, 0.0), rtol=1e-12, atol=0)
    # Scaled, as gradient accumulation does.
    torch.testing.assert_close(
        torch.autograd.grad(loss.total / 4, [*model]), torch.autograd.grad(expected / 4, [*model]), rtol=1e-10, atol=0
    )


def test_only_the_total_has_a_gradient_and_the_teacher_gets_none(tokens):
    model, teacher = random_head(0), random_head(1)
    loss = next_token_loss(model, tokens, teacher, 0.5)
    assert not loss.cross_entropy.requires_grad
    assert not loss.kl.requires_grad
    loss.total.backward()
    assert teacher.residual.grad is None
    assert teacher.unembedding.grad is None


def test_an_unembedding_that_does_not_train_changes_nothing_else(tokens):
    model = random_head(0)
    (expected,) = torch.autograd.grad(next_token_loss(model, tokens).total, model.residual)
    fixed = Head(model.residual, model.unembedding.detach())
    (found,) = torch.autograd.grad(next_token_loss(fixed, tokens).total, model.residual)
    assert torch.equal(found, expected)


def test_a_model_that_is_its_teacher_has_no_kl_and_no_gradient_of_it(tokens):
    model = random_head(0)
    loss = next_token_loss(model, tokens, Head(*(end.detach() for end in model)), 1.0)
    assert loss.total.item() == pytest.approx(0, abs=1e-15)
    assert max(gradient.abs().max() for gradient in torch.autograd.grad(loss.total, [*model])) < 1e-15


def test_soft_capped_logits_have_the_loss_and_gradients_of_their_definition(tokens):
    model, teacher, cap = random_head(0), random_head(1), 0.7

    def capped(head):
        return cap * (F.linear(head.residual[:, :-1], head.unembedding).flatten(0, 1) / cap).tanh()

    logits, expected = capped(model).log_softmax(-1), capped(teacher).log_softmax(-1).detach()
    kl = F.kl_div(logits, expected, log_target=True, reduction="batchmean")
    reference = 0.6 * F.nll_loss(logits, tokens[:, 1:].flatten()) + 0.4 * kl
    loss = next_token_loss(model, tokens, teacher, 0.4, None, None, cap)
    torch.testing.assert_close(loss.total, reference)
    torch.testing.assert_close(torch.autograd.grad(loss.total, model), torch.autograd.grad(reference, model))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocab", [500, 512])
def test_what_the_vocabulary_is_padded_with_is_never_seen(vocab, softcap):
    """In bfloat16, where it is padded: the loss of rounded logits and gradients in float64, of the whole vocabulary."""
    tokens = torch.randint(vocab, (3, 5), generator=torch.Generator().manual_seed(1))
    heads = [Head(*(end.detach().float() for end in random_head(seed, vocab=vocab, d=16))) for seed in (0, 1)]
    model = Head(*(end.requires_grad_() for end in heads[0]))
    is_cover = torch.tensor([False, True, False])
    settings = (0.5, torch.bfloat16, is_cover, softcap, 2 * vocab)
    loss = next_token_loss(model, tokens, heads[1], *settings)
    exact = next_token_loss(model, tokens, heads[1], 0.5, None, is_cover, softcap)
    torch.testing.assert_close(torch.stack(loss), torch.stack(exact), rtol=0.01, atol=0)
    assert all(part.isfinite() for part in loss)
    found, expected = (torch.autograd.grad(one.total, [*model]) for one in (loss, exact))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 0.05 * other.abs().max()
    same = next_token_loss(model, tokens, model, *settings)
    assert same.kl == same.cover_kl == 0


@pytest.mark.parametrize(("teacher", "softcap", "cover"), [(False, None, False), (True, None, True), (True, 2.0, True)])
def test_compiled_it_is_the_same_in_one_graph(tokens, teacher, softcap, cover):
    counters.clear()
    compiled = torch.compile(objective.loss_of_logits, backend="aot_eager", fullgraph=True)
    model = random_head(0)
    is_cover = torch.tensor([False, True, False]) if cover else None
    settings = (tokens, random_head(1) if teacher else None, 0.4 * teacher, None, is_cover, softcap, 14)
    losses = [next_token_loss(model, *settings, of_logits) for of_logits in (objective.loss_of_logits, compiled)]
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]))
    gradients = [torch.autograd.grad(loss.total, [*model]) for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0])
    assert counters["stats"]["unique_graphs"] == 1  # though the logits come in pieces


@pytest.mark.parametrize(("tokens", "vocab", "size"), [(16368, 50304, 4092), (12, 7, 2), (11, 7, 2), (1020, 4096, 510)])
def test_pieces_are_equal_where_they_can_be(tokens, vocab, size):
    at_once = 2**28 if vocab == 50304 else 2 * vocab if vocab == 7 else 2**21
    assert objective._piece(tokens, vocab, at_once) == size


def test_the_last_position_has_no_gradient(tokens):
    model = random_head(0)
    (of_residual,) = torch.autograd.grad(next_token_loss(model, tokens).total, model.residual)
    assert (of_residual[:, -1] == 0).all()
    assert (of_residual[:, :-1] != 0).any(-1).all()


def test_bfloat16_products_have_their_softmax_in_float32(tokens):
    exact, narrow = random_head(0), Head(*(end.detach().float().requires_grad_() for end in random_head(0)))
    loss = next_token_loss(narrow, tokens, dtype=torch.bfloat16)
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(next_token_loss(exact, tokens).total.item(), rel=0.02)
    loss.total.backward()
    assert narrow.residual.grad.dtype == narrow.unembedding.grad.dtype == torch.float32


def offset_heads(offset: float) -> list[Head]:
    """Two near heads with logits of a spread of 1.5, to all of which a direction of the residual adds `offset`."""
    generator = torch.Generator().manual_seed(0)
    residual, unembedding = torch.randn(4, 65, 64, generator=generator), torch.randn(500, 64, generator=generator)
    residual[..., 0] = 8.0
    unembedding *= 1.5 / 8
    unembedding[:, 0] += offset / 8
    noise = 0.1 * torch.randn(4, 65, 64, generator=generator)
    return [Head(residual.requires_grad_(), unembedding.requires_grad_()), Head(residual + noise, unembedding)]


@pytest.mark.parametrize(("offset", "softcap"), [(-65.0, None), (-25.0, 30.0)])
def test_bfloat16_loses_nothing_to_what_is_added_to_all_logits(offset, softcap):
    """GPT-2's lie near −65, where a step of bfloat16 is 0.5."""
    tokens = torch.randint(0, 500, (4, 65), generator=torch.Generator().manual_seed(1))
    model, teacher = offset_heads(offset)
    exact, rounded = (
        next_token_loss(model, tokens, teacher, 0.5, dtype, None, softcap) for dtype in (torch.float32, torch.bfloat16)
    )
    assert exact.kl > 0.001
    assert rounded.cross_entropy.item() == pytest.approx(exact.cross_entropy.item(), abs=1e-3)
    assert rounded.kl.item() == pytest.approx(exact.kl.item(), abs=1e-3)
    expected = torch.autograd.grad(exact.total, model)
    for found, gradient in zip(torch.autograd.grad(rounded.total, model), expected, strict=True):
        assert (found - gradient).abs().max() < 0.02 * gradient.abs().max()


def test_end_of_text_is_a_target_like_any_other():
    head = Head(torch.zeros(1, 3, 2), torch.ones(4, 2))
    assert next_token_loss(head, torch.tensor([[0, 0, 0]])).total.item() == pytest.approx(math.log(4))


STD = [[9.0, 1.0, 2.0, 5.0], [7.0, 3.0, 8.0, 2.0]]
NAMES = [["position_0", "ordinary", "ordinary", "eot"], ["position_0", "ordinary", "eot", "ordinary"]]


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
