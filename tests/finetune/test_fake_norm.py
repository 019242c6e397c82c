import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from finetune.fake_norm import CLASSES, FakeNorm, NormedReader, NormStyle, TokenClasses

EOT = 9
TOKENS = torch.tensor([[1, 2, EOT, 3, EOT], [EOT, 4, 5, 6, 7]])
CLASS_OF_TOKEN = [
    ["position_0", "ordinary", "eot", "ordinary", "eot"],
    ["position_0", "ordinary", "ordinary", "ordinary", "ordinary"],
]
D = 6
LAYER_NORM, RMS_NORM, GEMMA = NormStyle(), NormStyle(centred=False), NormStyle(centred=False, gain_offset=1.0)
STYLES = [LAYER_NORM, RMS_NORM, GEMMA]
STATES = [(alpha, merged) for alpha in (0.0, 0.3, 1.0) for merged in (0.0, 0.5, 1.0)]


def classes(tokens=TOKENS) -> TokenClasses:
    classes = TokenClasses(EOT)
    classes.set(tokens)
    return classes


def layer_norm(d=D, dtype=torch.float64, bias=True) -> nn.LayerNorm:
    norm = nn.LayerNorm(d, bias=bias, dtype=dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return norm


def fake_norm(norm, style=LAYER_NORM, n_paths=1, has_readers=False, tokens=TOKENS) -> FakeNorm:
    return FakeNorm(norm, style, n_paths, classes(tokens), has_readers=has_readers)


class RMSNorm(nn.Module):
    """RMSNorm in the dtype of its input: transformers' own compute in float32."""

    def __init__(self, d=D, dtype=torch.float64, offset=0.0):
        super().__init__()
        self.weight, self.offset, self.eps = nn.Parameter(torch.randn(d, dtype=dtype)), offset, 1e-5

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (self.weight + self.offset)


def make_norm(style: NormStyle, d=D, dtype=torch.float64, bias=True) -> nn.Module:
    return layer_norm(d, dtype, bias) if style.centred else RMSNorm(d, dtype, style.gain_offset)


def set_site(site, alpha, frozen=(2.0, 7.0, 0.3), merged=0.0):
    site.alpha.fill_(alpha)
    site.frozen.copy_(torch.tensor(frozen))
    site.merged[1:] = merged


def stream(dtype=torch.float64, tokens=TOKENS, d=D) -> torch.Tensor:
    return (3 * torch.randn(*tokens.shape, d, dtype=torch.float64) + 5).to(dtype).requires_grad_()


def reference(x, norm, alpha, frozen, merged):
    """The definition, a token at a time, in float64."""
    out = []
    for b, row in enumerate(CLASS_OF_TOKEN):
        for p, name in enumerate(row):
            v = x[b, p].double()
            constant = frozen[CLASSES.index(name)] ** (1 - merged) * frozen[0] ** merged
            std = (v.var(correction=0) + norm.eps).sqrt()
            y = (v - v.mean()) / torch.exp((1 - alpha) * std.log()) / constant**alpha * norm.weight.double()
            out.append(y if norm.bias is None else y + norm.bias.double())
    return torch.stack(out).view(x.shape)


def gradients(output, *inputs):
    """Gradients of a scalar that every output moves by another amount."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("bias", [True, False])
def test_alpha_0_is_layer_norm(dtype, tolerance, bias):
    norm, x = layer_norm(dtype=dtype, bias=bias), stream(dtype)
    fake = fake_norm(norm)
    set_site(fake.divisors[0], 0.0)
    torch.testing.assert_close(fake(x), norm(x), rtol=tolerance, atol=tolerance)
    found, expected = (gradients(f(x), x, *norm.parameters()) for f in (fake, norm))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("style", [RMS_NORM, GEMMA])
def test_an_rms_norm_is_divided_by_its_scale(style, alpha):
    norm, x, frozen = make_norm(style), stream(), (2.0, 7.0, 0.3)
    fake = fake_norm(norm, style)
    set_site(fake.divisors[0], alpha, frozen)
    if alpha == 0:
        torch.testing.assert_close(fake(x), norm(x))
    rms = (x.square().mean(-1) + 1e-5).sqrt()
    constants = torch.tensor([[frozen[CLASSES.index(name)] for name in row] for row in CLASS_OF_TOKEN])
    expected = x / (rms ** (1 - alpha) * constants**alpha).unsqueeze(-1) * (norm.weight + style.gain_offset)
    torch.testing.assert_close(fake(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fake.live_std, rms)


@pytest.mark.parametrize(("alpha", "merged"), STATES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_class_is_divided_by_its_scale(alpha, merged, bias):
    norm, x, frozen = layer_norm(bias=bias), stream(), (2.0, 7.0, 0.3)
    fake = fake_norm(norm)
    set_site(fake.divisors[0], alpha, frozen, merged)
    expected = reference(x, norm, alpha, torch.tensor(frozen).double(), merged)
    torch.testing.assert_close(fake(x), expected, rtol=1e-6, atol=1e-6)  # the frozen stds were set in float32
    found, expected = (gradients(y, x, *norm.parameters()) for y in (fake(x), expected))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("centred", [True, False])
def test_gradients_of_the_output_and_of_the_std_are_those_of_the_function(alpha, centred):
    fake = fake_norm(make_norm(LAYER_NORM if centred else RMS_NORM), LAYER_NORM if centred else RMS_NORM)
    set_site(fake.divisors[0], alpha, (1.2, 0.7, 0.9))
    assert gradcheck(fake, stream())
    assert gradcheck(lambda x: (fake(x), fake.live_std)[1], stream())


@pytest.mark.parametrize("least", [0.0, 0.4, 0.99])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("style", [LAYER_NORM, RMS_NORM])
def test_a_guard_is_the_least_share_of_the_live_std(style, alpha, least):
    norm, x, frozen = make_norm(style), stream(), (2.0, 7.0, 0.3)
    fake = fake_norm(norm, style)
    set_site(fake.divisors[0], alpha, frozen)
    fake.guards = True
    fake.divisors[0].least.fill_(least)
    mean = x.mean(-1, keepdim=True) if style.centred else 0.0
    std = ((x - mean).square().mean(-1, keepdim=True) + 1e-5).sqrt()
    constants = torch.tensor([[frozen[CLASSES.index(name)] for name in row] for row in CLASS_OF_TOKEN])[..., None]
    scale = std ** (1 - alpha) * constants.float().double() ** alpha
    acts = scale < least * std
    assert acts.any() or alpha < 1 or least == 0
    assert not acts.all()
    expected = (x - mean) / torch.where(acts, least * std, scale) * norm.weight + (norm.bias if style.centred else 0)
    torch.testing.assert_close(fake(x), expected, rtol=1e-6, atol=1e-6)
    found, expected = (gradients(y, x, *norm.parameters()) for y in (fake(x), expected))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("held", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("alphas", [(0.0, 0.3), (0.7, 0.7), (1.0, 1.0)])
@pytest.mark.parametrize("style", [LAYER_NORM, RMS_NORM])
def test_gradients_along_the_vector_are_held_back(style, alphas, held):
    """Against a norm whose std is, for autograd, `held` parts its own live one, divided by itself without a graph."""
    norm, x, constants = make_norm(style), stream(), (2.0, 2.0, 2.0)
    classes = TokenClasses(None)
    classes.set(torch.zeros(x.shape[:2], dtype=torch.long))
    fake = FakeNorm(norm, style, 2, classes)
    fake.guards = True
    for divisor, alpha in zip(fake.divisors, alphas, strict=True):
        set_site(divisor, alpha, constants)
        divisor.held.fill_(held)
    for path, alpha in enumerate(alphas):
        centred = x - x.mean(-1, keepdim=True) if style.centred else x
        std = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y, ratios = fake.normalise(x)
        found = y * ratios[0] if path else y
        expected = centred / (2.0**alpha * std ** (1 - alpha)) * (std.detach() / std) ** (alpha * held)
        torch.testing.assert_close(found, expected)
        if alphas[0] == alphas[1] or held in (0.0, 1.0):
            torch.testing.assert_close(gradients(found, x), gradients(expected, x))


def test_a_guard_on_two_paths_is_that_of_separate_norms():
    read = Read(alphas=(0.4, 1.0), groups=2)
    read.norm.guards = True
    for divisor in read.norm.divisors:
        divisor.least.fill_(0.5)
    x = stream()
    found, expected = read(x), read.separate(x)
    inputs = [x, *read.parameters()]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs))
    for divisor in read.norm.divisors:
        divisor.least.zero_()
    assert not torch.allclose(found, read(x))


@pytest.mark.parametrize("style", STYLES)
def test_an_ordinary_norm_has_the_graph_of_its_live_std_if_it_is_to(style):
    read = Read(style=style, alphas=(0.0, 0.0))
    x = stream()
    read(x)
    expected = gradients(read.norm.live_std, x)
    read.norm.live = True
    read(x)
    assert not read.norm.live_std.requires_grad
    read.norm.live_graph = True
    read(x)
    torch.testing.assert_close(gradients(read.norm.live_std, x), expected)


def test_live_std_is_that_of_the_tokens_and_trains_them():
    x = stream()
    fake = fake_norm(layer_norm())
    fake(x)
    torch.testing.assert_close(fake.live_std, (x.var(-1, correction=0) + 1e-5).sqrt())
    (found,) = torch.autograd.grad(fake.live_std.sum(), x)
    torch.testing.assert_close(found, (x - x.mean(-1, keepdim=True)) / (D * fake.live_std.unsqueeze(-1)))


def test_statistics_of_bfloat16_are_float32():
    x = torch.randn(*TOKENS.shape, 64, dtype=torch.float64).add(8).to(torch.bfloat16)
    norm = layer_norm(64, torch.bfloat16)
    fake = fake_norm(norm)
    found = fake(x)
    assert found.dtype == torch.bfloat16
    assert {buffer.dtype for buffer in fake.buffers()} == {torch.float32}
    torch.testing.assert_close(fake.live_std.double(), (x.double().var(-1, correction=0) + 1e-5).sqrt())
    expected = reference(x, norm, 0.0, torch.ones(3), 0.0)
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-3)  # rounded once


def test_a_frozen_site_is_the_linear_map_centre_divide_gain():
    norm, frozen = layer_norm(), (2.0, 8.0, 0.5)
    fake = fake_norm(norm)
    set_site(fake.divisors[0], 1.0, frozen)
    centring = torch.eye(D, dtype=torch.float64) - 1 / D
    for x in (stream().detach(), 100 * stream().detach()):
        jacobian_of_x = jacobian(fake, x)
        for b, row in enumerate(CLASS_OF_TOKEN):
            for p, name in enumerate(row):
                expected = norm.weight.diag() @ centring / frozen[CLASSES.index(name)]
                torch.testing.assert_close(jacobian_of_x[b, p, :, b, p], expected)
        assert jacobian_of_x.count_nonzero() == TOKENS.numel() * D * D


def test_a_frozen_site_does_not_see_the_std():
    fake = fake_norm(layer_norm())
    set_site(fake.divisors[0], 1.0)
    x = stream().detach()
    centre = x.mean(-1, keepdim=True)
    wider = centre + 10 * (x - centre)
    torch.testing.assert_close(fake(wider) - fake.bias, 10 * (fake(x) - fake.bias))
    assert torch.isfinite(fake(torch.full_like(x, 3.0))).all()


def test_the_constant_of_position_0_reaches_position_0_and_no_hidden_dimension():
    fake = fake_norm(layer_norm())
    x = stream()
    set_site(fake.divisors[0], 1.0, (2.0, 2.0, 2.0))
    before = fake(x)
    set_site(fake.divisors[0], 1.0, (2.0, 1000.0, 2.0))
    ratio = (fake(x) - fake.bias) / (before - fake.bias)
    torch.testing.assert_close(ratio[:, 0], torch.full_like(ratio[:, 0], 2 / 1000))
    torch.testing.assert_close(ratio[:, 1:], torch.ones_like(ratio[:, 1:]))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_norm_without_bias_still_centres_and_divides(alpha):
    norm = nn.LayerNorm(D, bias=False, dtype=torch.float64)
    fake = fake_norm(norm)
    set_site(fake.divisors[0], alpha, (4.0, 4.0, 4.0))
    y = fake(stream())
    torch.testing.assert_close(y.mean(-1), torch.zeros_like(y[..., 0]))
    scale = 1.0 if alpha == 0 else fake.live_std / 4
    torch.testing.assert_close(y.std(-1, correction=0), torch.ones_like(y[..., 0]) * scale, rtol=1e-5, atol=0)


def test_classes_of_tokens():
    found = classes()
    assert [[CLASSES[c] for c in row] for row in found.index.tolist()] == CLASS_OF_TOKEN
    found.set(TOKENS, past_length=3)
    assert [[CLASSES[c] for c in row] for row in found.index.tolist()] == [
        ["ordinary", "ordinary", "eot", "ordinary", "eot"],
        ["eot", "ordinary", "ordinary", "ordinary", "ordinary"],
    ]


def test_classes_without_end_of_text():
    classes = TokenClasses(None)
    classes.set(TOKENS)
    assert [[CLASSES[c] for c in row] for row in classes.index.tolist()] == [["position_0"] + ["ordinary"] * 4] * 2


def test_a_class_without_tokens_has_the_constant_of_ordinary_tokens():
    site = fake_norm(layer_norm()).divisors[0]
    site.update(torch.tensor([6.0, 10.0, 0.0]).double(), torch.tensor([3.0, 2.0, 0.0]).double(), 0.9)
    site.freeze()
    assert site.frozen.tolist() == [2.0, 5.0, 2.0]


class Read(nn.Module):
    """A norm and a linear module that reads it, with our norm in it and as it is."""

    def __init__(
        self,
        paths=(0, 0, 1),
        groups=1,
        width=D,
        d=D,
        style=LAYER_NORM,
        linear=Conv1D,
        bias=True,
        merged=0.0,
        dtype=torch.float64,
        tokens=TOKENS,
        alphas=None,
    ):
        super().__init__()
        out = groups * len(paths) * width
        plain = Conv1D(out, d).to(dtype) if linear is Conv1D else nn.Linear(d, out, bias, dtype=dtype)
        for parameter in plain.parameters():
            nn.init.normal_(parameter)
        n_paths = max(paths) + 1
        self.norm = FakeNorm(make_norm(style, d, dtype, bias), style, n_paths, classes(tokens))
        self.reader = NormedReader(self.norm, plain, paths, groups)
        self.__dict__["plain"] = plain
        for i, divisor in enumerate(self.norm.divisors):
            alpha = torch.rand(()) if alphas is None else alphas[i]
            set_site(divisor, alpha, (torch.rand(3) + 0.5).tolist(), merged)

    def forward(self, x):
        return self.reader(self.norm(x))

    def separate(self, x):
        """The definition: a norm of its own for each path, then the product, part by part."""
        weight = self.reader.matrix.unflatten(0, (self.reader.groups, len(self.reader.paths), -1))
        parts = []
        for i, path in enumerate(self.reader.paths):
            norm = copy.copy(self.norm)  # the same parameters
            norm._modules = {"divisors": nn.ModuleList([self.norm.divisors[path]])}
            norm.has_readers = False
            parts.append(torch.einsum("bpi,goi->bpgo", norm(x), weight[:, i]))
        found = torch.stack(parts, dim=-2).flatten(-3)
        return found if self.reader.bias is None else found + self.reader.bias


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_one_product_equals_separate_norms_and_products(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    tokens = torch.randint(0, EOT + 1, data.draw(st.tuples(st.integers(1, 3), st.integers(1, 5))))
    paths = tuple(sorted(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))))
    read = Read(
        paths=paths,
        groups=data.draw(st.integers(1, 3)),
        width=data.draw(st.integers(1, 6)),
        d=data.draw(st.integers(2, 7)),
        style=data.draw(st.sampled_from(STYLES)),
        linear=data.draw(st.sampled_from([Conv1D, nn.Linear])),
        bias=data.draw(st.booleans()),
        merged=data.draw(st.sampled_from([0.0, 0.5])),
        tokens=tokens,
        alphas=[data.draw(st.sampled_from([0.0, 0.4, 1.0])) for _ in range(3)],
    )
    x = stream(tokens=tokens, d=read.norm.weight.shape[0])
    found, expected = read(x), read.separate(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    inputs = [x, *read.parameters()]
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs), rtol=1e-8, atol=1e-8)


def test_qk_and_v_cost_one_product():
    read = Read()
    x = stream()
    with FlopCounterMode(display=False) as ours:
        read(x)
    with FlopCounterMode(display=False) as plain:
        read.plain(x)
    assert ours.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.parametrize("groups", [1, 3])
def test_no_scale_reaches_a_bias(groups):
    read = Read(alphas=(1.0, 1.0), groups=groups)
    at_mean = torch.full((*TOKENS.shape, D), 3.0, dtype=torch.float64)
    expected = read.plain(read.norm.bias).expand(*TOKENS.shape, -1)
    for frozen in ((1.0, 2.0, 3.0), (50.0, 0.1, 7.0)):
        set_site(read.norm.divisors[1], 1.0, frozen)
        torch.testing.assert_close(read(at_mean), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.15)]
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shortcut", "alpha"), [("live", 0.0), ("constant", 1.0)])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("paths", "groups"), [((0, 0, 1), 1), ((0, 0, 1), 2), ((1,), 1)])
def test_shortcuts_equal_the_general_path(dtype, tolerance, bias, shortcut, alpha, style, paths, groups):
    linear = Conv1D if bias else nn.Linear
    read = Read(paths, groups, style=style, linear=linear, bias=bias, merged=alpha, dtype=dtype, alphas=(alpha, alpha))
    x = stream(dtype)
    general, live_std = read(x), read.norm.live_std
    setattr(read.norm, shortcut, True)
    short = read(x)
    assert short.dtype == general.dtype == dtype
    torch.testing.assert_close(short, general, rtol=tolerance, atol=tolerance)
    inputs = [x, *read.parameters()]
    torch.testing.assert_close(
        gradients(short, *inputs), gradients(general, *inputs), rtol=10 * tolerance, atol=10 * tolerance
    )
    torch.testing.assert_close(read.norm.live_std, live_std, rtol=1e-6, atol=0)


def test_autocast_rounds_products_and_no_statistics():
    read = Read(dtype=torch.float32)
    x = stream(torch.float32)
    exact, std = read(x), read.norm.live_std
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read(x)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(read.norm.live_std, std)
    assert 0 < (rounded.float() - exact).abs().max() < 0.03 * exact.abs().max()
