import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import gpt2_sites
from torch import nn
from transformers import AttentionInterface

from finetune import objective, recipe
from finetune.checkpoint import load
from finetune.errors import CheckpointError
from finetune.fake_norm import CLASSES
from finetune.folding import convert, to_identity
from finetune.recipe import Gaps, Schedule
from finetune.schedule import Event, resolve
from finetune.sites import Sites

EOT = 0
TOKENS = torch.tensor([[3, EOT, 4, 1, 5, EOT, 2], [EOT, 3, 5, 8, 9, 7, 9]])
OTHER_TOKENS = torch.tensor([[6, 5, 3, 5, 8, 9, 7], [2, 1, 8, EOT, 8, 1, 8]])
WITHOUT_EOT = TOKENS.where(TOKENS != EOT, 11)
MODELS = {
    "plain": {},
    "other": {"n_inner": 7, "scale_attn_by_inverse_layer_idx": True, "n_layer": 3, "activation_function": "relu"},
    "untied": {"tie_word_embeddings": False},
}
AT_ONCE = Schedule(start=1, gap=Gaps())
MERGED_LATER = Schedule(start=1, gap=Gaps(final=5))


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def error(found, expected):
    return float((found.double() - expected).abs().max() / expected.abs().max())


def frozen(model, eot=EOT, merged=True) -> Sites:
    """Freeze every site at the stds of TOKENS."""
    sites = Sites(model, eot)
    logits(model)
    sites.observe()
    sites.update(0.9)
    sites.advance(resolve(AT_ONCE if merged else MERGED_LATER, gpt2_sites(model.config.n_layer), 10), 1)
    return sites


def norm_inputs_std(model, tokens) -> dict[str, np.ndarray]:
    """The σ at every norm of an ordinary model, in float64."""
    stds, handles = {}, []
    for name, norm in model.named_modules():
        if isinstance(norm, nn.LayerNorm):

            def keep(norm, inputs, _, name=name):
                x = inputs[0].detach().double().numpy()
                stds[name.removeprefix("transformer.")] = np.sqrt(x.var(-1) + norm.eps)

            handles.append(norm.register_forward_hook(keep))
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    return stds


def norm_of(site: str) -> str:
    if site == "final":
        return "ln_f"
    return site.replace("qk", "ln_1").replace(".v", ".ln_1").replace("mlp", "ln_2")


def masks(tokens) -> list[np.ndarray]:
    first = np.arange(tokens.shape[1])[None] == np.zeros((len(tokens), 1))
    eot = (tokens.numpy() == EOT) & ~first
    return [~first & ~eot, first, eot]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_live_sites_change_no_logits(make_gpt2, config, dtype, tolerance):
    model = make_gpt2(dtype=dtype, **config)
    expected = logits(model)
    Sites(model, EOT)
    assert error(logits(model), expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_live_sites_change_no_logits_of_the_bundled_model(dtype, tolerance):
    model = load("micro", dtype=dtype)
    expected = logits(model)
    Sites(model, EOT)
    assert error(logits(model), expected) < tolerance


def test_names_of_the_sites(make_gpt2):
    sites = list(Sites(make_gpt2(), EOT))
    assert sorted(sites) == sorted(["final"] + [f"h.{i}.{kind}" for i in range(2) for kind in ("mlp", "qk", "v")])


def test_parameters_are_the_models_own(make_gpt2):
    model = make_gpt2()
    before = {id(parameter) for parameter in model.parameters()}
    Sites(model, EOT)
    assert {id(parameter) for parameter in model.parameters()} == before


@pytest.mark.parametrize("merged", [True, False])
def test_generation_with_a_cache_is_generation_without(make_gpt2, merged):
    model = make_gpt2(dtype=torch.float64)
    sites = frozen(model, merged=merged)
    assert not torch.allclose(sites.constants()[:, 0], sites.constants()[:, 1]) or merged
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 1,
                 "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    cached, whole = (model.generate(TOKENS, use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits))


def hold_attention_and_mlps(model, held: str):
    """Hold the attention patterns and the MLPs' activations or gates (activation / input) at those of TOKENS."""
    block_of = {id(block.attn): i for i, block in enumerate(model.transformer.h)}
    patterns, gates = {}, {}

    def hold_pattern(module, query, key, value, attention_mask, **_):
        i = block_of[id(module)]
        if i not in patterns:
            scores = query @ key.mT / query.shape[-1] ** 0.5
            future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            patterns[i] = scores.masked_fill(future, -torch.inf).softmax(-1)
        return (patterns[i] @ value).transpose(1, 2), patterns[i]

    def hold_gate(module, inputs, output):
        if held == "activations":
            return gates.setdefault(module, output)
        return inputs[0] * gates.setdefault(module, output / inputs[0])

    AttentionInterface.register("held", hold_pattern)
    model.set_attn_implementation("held")
    for block in model.transformer.h:
        block.mlp.act.register_forward_hook(hold_gate)
    free = logits(model)
    held_at = logits(model)
    assert torch.equal(free, held_at)


def logits_of_stream(model, stream):
    handle = model.transformer.drop.register_forward_hook(lambda *_: stream)
    found = logits(model)
    handle.remove()
    return found


def distance_from_affine(model, held: str) -> float:
    """How far logits(a·x + (1−a)·y) are from a·logits(x) + (1−a)·logits(y), relative to their scale."""
    hold_attention_and_mlps(model, held)
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, *TOKENS.shape, 12, generator=generator, dtype=torch.float64) * 3).unbind()
    at = [logits_of_stream(model, stream) for stream in (x, y, 1.7 * x - 0.7 * y)]
    assert error(at[0], at[1]) > 0.1
    return error(at[2], 1.7 * at[0] - 0.7 * at[1])


@pytest.mark.parametrize("held", ["activations", "gates"])
def test_logits_are_affine_in_the_residual_stream_once_every_site_is_frozen(make_gpt2, held):
    original = make_gpt2(dtype=torch.float64)
    unmerged, constant = frozen(copy.deepcopy(original), merged=False), frozen(copy.deepcopy(original))
    assert constant.model.transformer.h[0].ln_2.constant
    assert not unmerged.model.transformer.h[0].ln_2.constant
    for sites in (unmerged, constant):
        assert distance_from_affine(sites.model, held) < 1e-12
    assert distance_from_affine(constant.to_plain(), held) < 1e-7  # √(var + 1e12) is not quite a constant
    assert distance_from_affine(original, held) > 0.01


@pytest.mark.parametrize("name", ["h.0.mlp", "h.1.qk", "h.1.v", "final"])
def test_logits_are_not_affine_with_one_site_live(make_gpt2, name):
    sites = frozen(make_gpt2(dtype=torch.float64), merged=False)
    sites[name].alpha.fill_(0)
    if name == "h.1.qk":  # its output is in the patterns alone, which are held
        assert distance_from_affine(sites.model, "gates") < 1e-12
    else:
        assert distance_from_affine(sites.model, "gates") > 1e-3


def test_running_means_are_the_weighted_means_of_the_stds(make_gpt2):
    model = make_gpt2()
    steps = [[TOKENS, OTHER_TOKENS], [WITHOUT_EOT], [OTHER_TOKENS, WITHOUT_EOT]]
    stds = [[norm_inputs_std(model, tokens) for tokens in batches] for batches in steps]
    sites = Sites(model, EOT)
    for batches in steps:
        for tokens in batches:
            logits(model, tokens)
            sites.observe()
        sites.update(0.7)
    for name in sites:
        for c in range(len(CLASSES)):
            values, weights, weight = [], [], 1.0
            for batches, found in reversed(list(zip(steps, stds, strict=True))):
                of_class = [std[norm_of(name)][masks(t)[c]] for t, std in zip(batches, found, strict=True)]
                values += of_class
                weights += [np.full(len(some), weight) for some in of_class]
                weight *= 0.7 if sum(map(len, of_class)) else 1.0  # no such token, nothing to make room for
            expected = np.average(np.concatenate(values), weights=np.concatenate(weights))
            assert sites[name].running_std()[c].item() == pytest.approx(expected, rel=1e-5)


def test_update_returns_the_mean_std_of_the_step(make_gpt2):
    model = make_gpt2()
    expected = norm_inputs_std(model, WITHOUT_EOT)
    sites = Sites(model, EOT)
    logits(model)
    sites.observe()
    sites.update(0.9)
    logits(model, WITHOUT_EOT)
    sites.observe()
    for name, found in zip(sites, sites.update(0.9), strict=True):
        of_site = expected[norm_of(name)]
        assert found[:2].tolist() == pytest.approx([of_site[:, 1:].mean(), of_site[:, 0].mean()], rel=1e-5)
        assert found[2].isnan()


def test_a_model_without_end_of_text_has_two_classes(make_gpt2):
    sites = frozen(make_gpt2(eos_token_id=None, bos_token_id=None), eot=None, merged=False)
    for name in sites:
        assert sites[name].frozen[CLASSES.index("eot")] == sites[name].frozen[0] != sites[name].frozen[1]
        assert sites[name].std_count.tolist() == [TOKENS.numel() - len(TOKENS), len(TOKENS), 0]


def test_gradient_checkpointing_changes_no_gradient_and_counts_once(make_gpt2):
    results = []
    for checkpointing in (False, True):
        sites = frozen(make_gpt2(dtype=torch.float64), merged=False)
        for name in ("h.0.v", "h.1.mlp", "final"):
            sites[name].alpha.fill_(0.4)
        model = sites.model.train()
        forwards = []
        model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_, count=forwards: count.append(1))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for tokens in (TOKENS, OTHER_TOKENS):
            head = objective.Head(model.transformer(tokens, use_cache=False).last_hidden_state, model.lm_head.weight)
            auxiliary = objective.auxiliary_loss(sites.norms[-1].live_std, sites.classes.index)
            (objective.next_token_loss(head, tokens).total + auxiliary).backward()
            sites.observe()
        assert len(forwards) == (4 if checkpointing else 2)
        live = sites.update(0.9)
        counts = torch.stack([sites[name].std_count for name in sites])
        results.append([live, counts, sites.constants(), *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert counts.sum(1).tolist() == pytest.approx([(0.9 + 2) * TOKENS.numel()] * 7)


def test_evaluation_leaves_every_buffer_as_it_was(make_gpt2):
    sites = frozen(make_gpt2(), merged=False)
    before = copy.deepcopy(dict(sites.model.named_buffers()))
    assert len(before) == 7 * len(list(sites))
    logits(sites.model, OTHER_TOKENS)
    sites.model.generate(TOKENS, max_new_tokens=2, do_sample=False, pad_token_id=1)
    for name, buffer in sites.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_site_freezes_at_the_running_mean_of_its_moment(make_gpt2):
    model = make_gpt2()
    batches = [WITHOUT_EOT, OTHER_TOKENS, TOKENS, TOKENS]
    stds = [norm_inputs_std(model, tokens)["h.0.ln_1"] for tokens in batches]
    sites = Sites(model, EOT)
    # Freezing in block 0 changes no std at its own ln_1.
    events = [Event(1, "qk", 0, 1), Event(2, "v", 0, 1), *resolve(Schedule(start=8, gap=Gaps()), gpt2_sites(2), 10)]
    for step, tokens in enumerate(batches):
        assert sites.advance(events, step) == [event for event in events if event.step == step]
        logits(model, tokens)
        sites.observe()
        sites.update(0.5)
    first = [stds[0][mask].mean() for mask in masks(WITHOUT_EOT)[:2]]
    assert sites["h.0.qk"].frozen.tolist() == pytest.approx([*first, first[0]])
    seen = [std[mask[1]] for std, mask in zip(stds, map(masks, batches[:2]), strict=False)]
    assert sites["h.0.v"].frozen[1].item() == pytest.approx((0.5 * seen[0].sum() + seen[1].sum()) / 3)
    assert sites["h.0.v"].frozen[2].item() == pytest.approx(stds[1][masks(OTHER_TOKENS)[2]].mean())
    assert {name for name in sites if sites[name].alpha} == {"h.0.qk", "h.0.v"}


def test_sites_fade_and_many_at_a_time(make_gpt2):
    sites = frozen(make_gpt2(), merged=False)
    for name in sites:
        sites[name].alpha.fill_(0)
    events = [Event(2, "mlp", 0, 4), Event(2, "qk", 0, 4), Event(3, "v", 1, 4), Event(4, "eot", None, 2)]
    found, constants = [], sites.constants()
    for step in range(8):
        sites.advance(events, step)
        if step == 2:
            sites["h.0.qk"].update(torch.full((3,), 1e6), torch.ones(3), 0.9)  # while it fades
        merged = [site.merged.tolist() for site in map(sites.__getitem__, sites)]
        assert merged == [merged[0]] * 7
        found.append([sites[name].alpha.item() for name in ("h.0.mlp", "h.0.qk", "h.1.v", "final")] + merged[0])
    assert found == [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0],
        [0.75, 0.75, 0.5, 0.0, 0.0, 0.0, 0.5],
        [1.0, 1.0, 0.75, 0.0, 0.0, 0.0, 1.0],
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
        [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0],
    ]
    torch.testing.assert_close(sites.constants()[:, :2], constants[:, :2])


def test_merging_moves_a_class_to_the_ordinary_constant(make_gpt2):
    sites = frozen(make_gpt2(dtype=torch.float64), merged=False)
    before = sites.constants()
    events = [Event(5, "eot", None, 2)]
    sites.advance(events, 5)
    half = sites.constants()
    torch.testing.assert_close(half[:, 2], (before[:, 2] * before[:, 0]).sqrt())
    sites.advance(events, 6)
    torch.testing.assert_close(sites.constants()[:, 2], before[:, 0])
    torch.testing.assert_close(sites.constants()[:, :2], before[:, :2])


def test_norms_are_live_until_their_first_site_begins_to_freeze(make_gpt2):
    sites = Sites(make_gpt2(), 0)
    events = [Event(2 + layer, "v", layer, 2) for layer in (0, 1)]
    before_attention = [block.ln_1 for block in sites.model.transformer.h]
    for step in (0, 1, 2, 3, 9):  # from one to the next, or where a run is taken up
        sites.advance(events, step)
        assert [norm.live for norm in before_attention[:2]] == [step < 2, step < 3]
        assert all(block.ln_2.live for block in sites.model.transformer.h)
    sites.advance([], 10)
    assert not any(norm.live for norm in before_attention)


def test_norms_become_constants_at_the_last_events_end_and_not_before(make_gpt2):
    sites = frozen(make_gpt2(), merged=False)
    schedule = Schedule(start=1, gap=Gaps(mlp=1, qk=1, v=1, final=1, eot=1), fade=3)
    events = resolve(schedule, gpt2_sites(2), 20)
    norms = [norm for norm in sites.norms if norm.has_readers]
    assert len(norms) == 4
    for step in range(20):
        sites.advance(events, step)
        assert {norm.constant for norm in norms} == {step >= events[-1].end}
    sites.advance([], 20)
    assert not any(norm.constant for norm in norms)


def test_steps_after_the_schedule_change_nothing(make_gpt2):
    sites = frozen(make_gpt2())
    events = resolve(AT_ONCE, gpt2_sites(2), 2)
    before = copy.deepcopy(sites.model.state_dict())
    logits(sites.model, OTHER_TOKENS)
    sites.observe()
    sites.update(0.9)
    assert sites.advance(events, 2) == []
    for name, tensor in sites.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or "std_" in name, name


def test_state_dict_holds_the_schedule(make_gpt2):
    sites = frozen(make_gpt2(), merged=False)
    again = Sites(make_gpt2(seed=1), EOT)
    again.model.load_state_dict(sites.model.state_dict())
    torch.testing.assert_close(logits(again.model), logits(sites.model), rtol=0, atol=0)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_an_untouched_model_comes_back_as_it_was(make_gpt2, config):
    original = make_gpt2(**config)
    original.config.name_or_path = "someone/model"
    original.generation_config.max_new_tokens = 17
    sites = Sites(copy.deepcopy(original), EOT)
    sites.advance([], 0)
    plain = sites.to_plain()
    assert plain.config.to_dict() | {"dtype": None} == original.config.to_dict() | {"dtype": None}
    assert plain.generation_config == original.generation_config
    assert plain.state_dict().keys() == original.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[name]), name
    assert torch.equal(logits(plain), logits(original))


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_ln_free_models_have_the_training_models_logits(make_gpt2, config):
    sites = frozen(make_gpt2(**config))
    sites["h.0.v"].frozen.mul_(1.7)
    sites["h.1.qk"].frozen.mul_(1.3)
    expected, plain = logits(sites.model), sites.to_plain()
    assert plain.config.layer_norm_epsilon == 1e12
    assert torch.equal(logits(sites.model), expected)  # it is left as it was
    for model in (plain, convert(plain, "h24"), to_identity(plain)):
        assert error(logits(model), expected) < 1e-4


def test_ln_free_models_have_the_training_models_logits_after_the_shipped_schedule():
    schedule = recipe.load("micro").schedule
    sites = Sites(load("micro", dtype=torch.float64), EOT)
    events = resolve(schedule, gpt2_sites(6), 120)
    for step in range(events[-1].end + 1):
        sites.advance(events, step)
        logits(sites.model, TOKENS * 100)
        sites.observe()
        sites.update(0.9)
    expected = logits(sites.model)
    assert error(logits(sites.to_plain()), expected) < 1e-9
    assert error(logits(load("micro", dtype=torch.float64)), expected) > 1e-3


def test_half_way_states_are_refused_by_the_names_of_what_is_left(make_gpt2):
    events = resolve(Schedule(start=1, gap=Gaps(*[1.0] * 8)), gpt2_sites(2), 20)
    for i, event in itertools.pairwise(events):
        sites = frozen(make_gpt2(), merged=False)
        for name in sites:
            sites[name].alpha.fill_(0)
        for step in range(1, i.step + 1):
            sites.advance(events, step)
        with pytest.raises(CheckpointError, match=event.name if event.layer is not None else "final"):
            sites.to_plain()


def test_a_faded_site_is_half_way(make_gpt2):
    sites = frozen(make_gpt2())
    sites["h.1.v"].alpha.fill_(0.9)
    with pytest.raises(CheckpointError, match=r"not yet frozen and merged: h\.1\.v\."):
        sites.to_plain()


def test_models_without_live_norms_are_refused(make_gpt2):
    plain = frozen(make_gpt2()).to_plain()
    for model in (plain, to_identity(plain)):
        with pytest.raises(CheckpointError, match="already"):
            Sites(model, EOT)
    with pytest.raises(CheckpointError, match=r"Identity|FakeNorm|different states"):
        Sites(frozen(make_gpt2()).model, EOT)


def test_compiled_norms_are_the_norms_and_freezing_does_not_recompile(make_gpt2):
    sites = frozen(make_gpt2(), merged=False)
    compilations = []

    def backend(graph, _):
        compilations.append(graph)
        return graph

    block = sites.model.transformer.h[0]
    module = nn.Sequential(block.ln_1, block.attn.c_attn)
    compiled = torch.compile(module, backend=backend)
    x = torch.randn(*TOKENS.shape, 12)
    for step in range(3):
        sites["h.0.v"].alpha.fill_(step / 2)
        torch.testing.assert_close(compiled(x), module(x))
    assert len(compilations) == 1
