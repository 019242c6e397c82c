"""What is done about tokens with uncommon stds: squeezing all, guarding divisors, noise, the log, and the stop."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_log
from models import random_model, tiny_gpt2

from finetune import checkpoint, families
from finetune.fake_norm import CLASSES
from finetune.objective import spread_loss
from finetune.recipe import Gaps, Recipe, RecipeError, Schedule
from finetune.removal import fit, set_up
from finetune.schedule import resolve
from finetune.sites import Sites
from finetune.training import DivergedError

TOKENS = torch.randint(0, 4096, (3, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def short(recipe: Recipe) -> Recipe:
    """Sixteen steps, without a control: everything freezes at step 8, and position 0 is merged at step 12."""
    schedule = Schedule(start=8, gap=Gaps(final=4))
    return replace(recipe, control=False, save_every=99, kl_weight=1.0, schedule=schedule)


def fitted(recipe: Recipe, directory: Path) -> list[dict]:
    setup = set_up(recipe)
    fit(setup, directory, "ln_free", setup.events)
    return read_log(directory, "ln_free")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"spread_position_0": -1.0}, "spread_position_0 is -1"),
        ({"spread_power": 0.5}, "spread_power is 0.5; it must be at least 1"),
        ({"guard": 1.0}, "guard is 1.0; it must be above 1"),
        ({"guard": math.inf}, "guard is inf"),
        ({"guard_span": (0.9, 0.5)}, "guard_span is 0.9, 0.5"),
        (
            {"guard": 2.0, "guard_span": (0.5, 1.0)},
            "guard_span ends at 1.0, so the guard would not be lifted by the last",
        ),
        ({"max_outlier": 1.0}, "max_outlier is 1.0"),
        ({"outlier_noise": 0.9, "guard": 2.0}, "outlier_noise is 0.9; it must be at least 1"),
        ({"outlier_noise": 1.5}, "outlier_noise is 1.5; it must be at least 1, and above 1 it needs a guard"),
        ({"live_gradients": True, "spread_weight": 1.0}, "live_gradients needs a guard"),
        ({"live_gradients": True, "guard": 2.0}, "live_gradients needs a guard"),
    ],
)
def test_contradictions_are_refused(fields: dict, said: str, short: Recipe):
    with pytest.raises(RecipeError, match=said):
        replace(short, **fields)


def test_the_guard_is_lifted_linearly(short: Recipe):
    guarded = replace(short, guard=4.0, guard_span=(0.25, 0.75))
    assert [guarded.guard_at(step) for step in (0, 4, 6, 8, 12, 15)] == [0.25, 0.25, 0.1875, 0.125, 0.0, 0.0]
    assert short.guard_at(0) == 0


class TestSqueeze:
    def sites(self) -> Sites:
        sites = Sites(tiny_gpt2(), 0)
        sites.keep_live_graph()
        sites.advance([], 0)
        return sites

    def test_draws_every_token_to_the_running_mean_of_ordinary_ones(self):
        sites = self.sites()
        tokens = TOKENS.clone()
        tokens[:, 5] = 0
        sites.model(tokens)
        sites.observe()
        sites.update(0.9)
        assert all(norm.live for norm in sites.norms if norm.has_readers)
        sites["h.1.v"].frozen.fill_(1.3)
        sites["h.1.v"].alpha.fill_(1.0)
        seen = []
        for norm in sites.norms:
            norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        sites.model(tokens)
        stds = [x.var(-1, correction=0).add(1e-5).sqrt() for x in seen]
        ordinary = (torch.arange(16) > 0) & (tokens != 0)
        deviations = [(std / std[ordinary].mean().detach()).log().abs() for std in stds]
        constant = (stds[2] / 1.3).log().abs()
        squares = torch.stack([*(deviations[i] for i in (0, 0, 1, 2)), constant, deviations[3], deviations[4]]) ** 3
        squares[:, :, 0] *= 20
        spread = spread_loss(*sites.spread(live=True, position_0=20.0), 3.0)
        torch.testing.assert_close(spread, squares.mean(), rtol=1e-5, atol=0)
        weight = sites.model.transformer.h[0].mlp.c_proj.weight
        gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (spread, squares.mean())]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)
        assert gradients[0].abs().max() > 0

    def test_there_is_none_before_anything_is_known(self):
        sites = self.sites()
        sites.model(TOKENS)
        spread = spread_loss(*sites.spread(live=True, position_0=5.0))
        assert spread.item() == 0
        weight = sites.model.transformer.h[0].mlp.c_proj.weight
        assert torch.autograd.grad(spread, weight)[0].abs().max() == 0

    def test_brings_the_stds_together_before_anything_freezes(self, short: Recipe, tmp_path: Path):
        def ratios(weight: float) -> list[float]:
            recipe = replace(short, spread_weight=weight, spread_live=True, spread_position_0=10.0, log_every=1)
            log = fitted(recipe, tmp_path / str(weight))
            assert log[0]["spread"] == 0
            assert all(line["spread"] > 0 for line in log[1:])
            lives = [site["live"] for site in log[7]["std"].values()]
            return [abs(math.log(live[1] / live[0])) for live in lives]

        drawn, free = ratios(100.0), ratios(1e-9)
        assert sum(drawn) < 0.7 * sum(free)

    def test_is_the_same_however_the_batch_is_split(self, short: Recipe, tmp_path: Path):
        recipe = replace(short, spread_weight=0.3, spread_live=True, spread_position_0=10.0, guard=1.5)
        one, two = (
            fitted(replace(recipe, micro_batch=size, gradient_checkpointing=size == 2), tmp_path / str(size))
            for size in (4, 2)
        )
        for key in ("loss", "spread", "guarded", "grad_norm"):
            np.testing.assert_allclose([line[key] for line in one], [line[key] for line in two], rtol=2e-3, atol=1e-6)
        for site, stds in one[12]["std"].items():
            np.testing.assert_allclose(stds["over_constant"], two[12]["std"][site]["over_constant"], rtol=1e-3)


class TestGuard:
    @pytest.mark.parametrize("family", ["gpt2", "llama"])
    def test_no_norm_is_constant_before_it_is_lifted(self, family: str):
        model = random_model(family, vocab_size=4096, max_position_embeddings=16)
        sites = Sites(model, 0)
        sites.model(TOKENS)
        sites.observe()
        sites.update(0.9)
        events = resolve(Schedule(start=1, gap=Gaps()), families.family_of(model).sites_of(2), 10)
        sites.guard(0.8)
        sites.advance(events, 1)
        assert not sites.constant
        guarded = model(TOKENS).logits
        excess = sites.excess()
        assert (excess * 0.8 > 1).any()
        sites.guard(0.0)
        sites.advance(events, 2)
        assert sites.constant
        free = model(TOKENS).logits
        assert not torch.allclose(guarded, free, rtol=1e-2)
        plain = sites.to_plain()(TOKENS).logits
        torch.testing.assert_close(plain, free, rtol=1e-3, atol=1e-4)

    def test_the_log_says_how_often_it_acted(self, short: Recipe, tmp_path: Path):
        log = fitted(replace(short, guard=1.05, guard_span=(0.7, 0.8)), tmp_path)
        shares = [line["guarded"] for line in log]
        assert shares[:8] == [0.0] * 8  # live norms need none
        assert all(0 < share < 1 for share in shares[8:11])
        assert shares[13:] == [0.0] * 3
        assert "guarded" not in fitted(short, tmp_path / "without")[0]

    def test_gradients_are_live_ones_while_it_is_up(self, short: Recipe, tmp_path: Path):
        guarded = replace(short, guard=4.0, guard_span=(0.7, 0.8), spread_weight=1e-6)
        ours, free = (fitted(replace(guarded, live_gradients=live), tmp_path / str(live)) for live in (True, False))
        same = [a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"] for a, b in zip(ours, free, strict=True)]
        begun = next(line["step"] for line in free if line["frozen"])
        assert all(same[:begun])
        assert not any(same[begun:])


class TestNoise:
    def frozen(self, family: str) -> Sites:
        sites = Sites(random_model(family, vocab_size=4096, max_position_embeddings=16).train(), 0, ())
        sites.model(TOKENS)
        sites.observe()
        sites.update(0.9)
        for site in sites:
            sites[site].freeze()
            sites[site].alpha.fill_(1.0)
        return sites

    @pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
    def test_is_a_constant_that_is_too_small(self, family: str, monkeypatch: pytest.MonkeyPatch):
        sites = self.frozen(family)
        sites.guard(1e-3, noise=2.0)
        monkeypatch.setattr(
            torch, "rand", lambda *shape, **_: torch.zeros(shape) + torch.tensor([0, 0.2])[:, *[None] * 3]
        )
        noisy = sites.model(TOKENS).logits
        monkeypatch.undo()
        sites.guard(1e-3)
        assert not torch.allclose(sites.model(TOKENS).logits, noisy, rtol=1e-2)
        for site in sites:
            sites[site].frozen /= 2**0.2
        torch.testing.assert_close(sites.model(TOKENS).logits, noisy, rtol=1e-4, atol=1e-4)

    def test_is_log_uniform_at_one_token_in_16_of_each_norm_that_is_trained(self):
        sites = self.frozen("llama")
        sites.guard(1e-3)
        quiet = sites.model(TOKENS).logits
        sites.guard(1e-3, noise=3.0)
        torch.manual_seed(0)
        norm, drawn = sites.norms[0], []
        x = torch.randn(64, 64, norm.weight.numel())
        for _ in range(4):
            norm.classes.index = torch.zeros(64, 64, dtype=torch.long)
            y = norm.normalise(x)[0] * norm.divisors[0].frozen[0]
            drawn.append((y.norm(dim=-1) / x.norm(dim=-1)).flatten())
        logs = torch.cat(drawn).log() / math.log(3)
        noisy = logs > 1e-6
        assert noisy.float().mean() == pytest.approx(1 / 16, rel=0.1)
        deciles = torch.tensor([0.1, 0.5, 0.9])
        torch.testing.assert_close(logs[noisy].quantile(deciles), deciles, rtol=0, atol=0.05)
        assert logs.unflatten(0, (4, -1)).diff(dim=0).abs().max() > 0.5  # drawn anew
        assert not torch.allclose(sites.model(TOKENS).logits, quiet, rtol=1e-2)
        sites.model.eval()
        torch.testing.assert_close(sites.model(TOKENS).logits, quiet)

    def test_spares_live_norms_and_ends_with_the_guard(self, short: Recipe, tmp_path: Path):
        noisy = replace(short, guard=4.0, guard_span=(0.7, 0.8), outlier_noise=1.5)
        ours, free = (fitted(replace(noisy, outlier_noise=most), tmp_path / str(most)) for most in (1.5, 1.0))
        begun = next(line["step"] for line in free if line["frozen"])
        same = [a["loss"] == b["loss"] for a, b in zip(ours, free, strict=True)]
        assert all(same[:begun])
        assert not any(same[begun:])
        assert ours[begun]["kl"] > free[begun]["kl"]

    def test_is_the_same_if_a_block_is_recomputed(self, short: Recipe, tmp_path: Path):
        noisy = replace(short, guard=4.0, guard_span=(0.7, 0.8), outlier_noise=1.5)
        one, two = (
            fitted(replace(noisy, gradient_checkpointing=again), tmp_path / str(again)) for again in (False, True)
        )
        for key in ("loss", "grad_norm"):
            np.testing.assert_allclose([line[key] for line in one], [line[key] for line in two], rtol=1e-4)


class TestLog:
    def test_percentile_and_largest_over_the_constant(self):
        sites = Sites(tiny_gpt2(), 0)
        live = []
        for tokens in (TOKENS, TOKENS.flip(1)):
            sites.model(tokens)
            sites.observe(keep=True)
            live.append([norm.live_std for norm in sites.norms for _ in norm.divisors])
        sites.update(0.9)
        sites["h.0.mlp"].frozen.copy_(torch.tensor([2.0, 3.0, 4.0]))
        sites["h.0.mlp"].alpha.fill_(1.0)
        found = dict(zip(sites, sites.largest_over_constants().tolist(), strict=True))
        for i, name in enumerate(sites):
            means = [2.0, 3.0, 4.0] if name == "h.0.mlp" else sites[name].running_std().tolist()
            constants = torch.full((3, 16), means[0])
            constants[:, 0] = means[CLASSES.index("position_0")]
            ratios = torch.stack([stds[i] / constants for stds in live])
            assert found[name] == pytest.approx(np.quantile(ratios.detach().numpy(), [0.999, 1.0]).tolist(), rel=1e-5)
        assert not sites._kept


class TestStop:
    def test_names_site_token_position_and_factor(self, short: Recipe, tokenizer, tmp_path: Path):
        """One token is a hundred times as long as the others, and its divisor becomes that of the others."""
        model = tiny_gpt2()
        token = tokenizer.encode(" the")[0]
        model.transformer.wte.weight.data[token] *= 100
        checkpoint.save(model, tmp_path / "model", tokenizer)
        recipe = replace(
            short, model=str(tmp_path / "model"), lr=1e-6, min_lr=1e-6, max_outlier=9.0, std_mean="geometric"
        )
        said = (
            r"at step 8 the live std of token (\d+) \(' the'\) at position (\d+) is (\d+) times its divisor at "
            r"h\.0\.qk, more than max_outlier=9: .*checkpoint: none"
        )
        with pytest.raises(DivergedError, match=said) as error:
            fitted(recipe, tmp_path / "run")
        named, position, factor = map(int, re.search(said, str(error.value)).groups())
        assert named == token
        assert factor >= 9
        log = read_log(tmp_path / "run")
        assert [line["step"] for line in log] == list(range(8))
        setup = set_up(recipe)
        text = setup.text.train
        order = np.random.default_rng(recipe.seed).permutation(len(text))[8 * recipe.batch : 9 * recipe.batch]
        assert any(text[i]["input_ids"][position] == token for i in order)
        wide = fitted(replace(recipe, max_outlier=1e9, max_rise=1e9), tmp_path / "wide")
        assert wide[12]["std"]["h.0.qk"]["over_constant"][1] > 9

    def test_what_diverges_otherwise_says_the_worst(self, short: Recipe, tmp_path: Path):
        recipe = replace(short, lr=10.0, min_lr=10.0, clip=0.0, max_outlier=math.inf)
        recipe = replace(recipe, schedule=Schedule(start=1, gap=Gaps()))
        with pytest.raises(DivergedError, match=r"at step \d.*; the live std of token \d+ .* times its divisor at"):
            fitted(recipe, tmp_path)
