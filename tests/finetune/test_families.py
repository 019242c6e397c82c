"""The contract of a family: what is held for every entry of `finetune.families.FAMILIES`."""

import copy
import json
import math

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from torch import nn
from transformers import AutoModelForCausalLM

from finetune import checkpoint, folding
from finetune.errors import CheckpointError
from finetune.families import FAMILIES, family_of
from finetune.recipe import Gaps, Layers, Schedule
from finetune.schedule import resolve
from finetune.sites import Sites

TOKENS = torch.randint(23, (3, 9), generator=torch.Generator().manual_seed(0))
each_family = pytest.mark.parametrize("name", FAMILIES)
RMS = [name for name, family in FAMILIES.items() if not family.style.centred]


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens, use_cache=False).logits


def error(found, expected) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def frozen(model, shortcut: bool = True) -> Sites:
    """Freeze and merge every site, each at another constant than its neighbours'."""
    sites = Sites(model, 0)
    logits(model)
    sites.observe()
    sites.update(0.9)
    events = resolve(Schedule(start=1, gap=Gaps()), family_of(model).sites_of(model.config.num_hidden_layers), 9)
    sites.advance(events, 1)
    for i, name in enumerate(sites):
        sites[name].frozen.mul_(1 + 0.1 * i)
    for norm in sites.norms:
        norm.constant = shortcut and norm.has_readers
    return sites


def test_the_factory_of_random_models_has_every_family():
    assert {*FAMILIES} == {*models.FAMILIES} - {"blocks"}


@each_family
def test_norms_readers_and_writers_are_where_the_table_says(name):
    model, family = random_model(name), FAMILIES[name]
    n_layer = model.config.num_hidden_layers
    norms = family.norms_of(n_layer)
    of_class = [path for path, module in model.named_modules() if type(module).__name__ == family.norm_class]
    assert sorted(of_class) == sorted(norm.path for norm in norms)
    assert len({site.name for site in family.sites_of(n_layer)}) == sum(len(norm.sites) for norm in norms)
    modules = model.named_modules()
    has_weight = [path for path, module in modules if isinstance(getattr(module, "weight", None), nn.Parameter)]
    readers = {reader.path for norm in norms for reader in norm.readers}
    writers = {path for _, _, path in family.writers_of(n_layer)}
    assert readers | writers | {*of_class} == {*has_weight}
    assert {norm.writer for norm in norms if norm.writer} <= writers


@each_family
@pytest.mark.parametrize("general", [True, False])
def test_live_sites_change_no_logits(name, general):
    model = random_model(name)
    expected = logits(model)
    sites = Sites(model, 0)
    if not general:
        sites.advance([], 0)
    assert error(logits(model), expected) < 1e-5


class Norm64(nn.Module):
    """RMSNorm in float64: transformers' own compute in float32."""

    def __init__(self, norm: nn.Module, style) -> None:
        super().__init__()
        self.gain, self.eps = norm.weight.data + style.gain_offset, getattr(norm, style.eps)

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.gain


@each_family
@pytest.mark.parametrize("general", [True, False])
def test_live_sites_change_no_logits_in_float64(name, general):
    model, family = random_model(name, dtype=torch.float64), FAMILIES[name]
    plain = copy.deepcopy(model)
    if name in RMS:
        for norm in folding.norms_of(plain):
            plain.set_submodule(norm.path, Norm64(plain.get_submodule(norm.path), family.style))
    sites = Sites(model, 0)
    if not general:
        sites.advance([], 0)
    assert error(logits(model), logits(plain)) < 1e-12


@each_family
def test_parameters_keep_their_values_and_names(name):
    model = random_model(name)
    before = dict(model.named_parameters())
    sites = Sites(model, 0)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    plain = sites.to_plain()
    assert type(plain) is type(model)
    assert plain.state_dict().keys() == random_model(name).state_dict().keys()


@each_family
def test_every_form_has_the_logits_of_the_training_model(name):
    model = random_model(name)
    live = logits(model)
    sites = frozen(model, shortcut=False)
    expected = logits(model)
    assert error(expected, live) > 0.01
    for norm in sites.norms:
        norm.constant = norm.has_readers
    assert error(logits(model), expected) < 1e-5
    plain = sites.to_plain()
    assert folding.norm_state(plain) == "frozen"
    assert getattr(plain.config, FAMILIES[name].eps) == folding.FROZEN_EPS
    for form in (plain, folding.to_identity(plain), folding.to_identity(folding.to_identity(plain))):
        assert error(logits(form), expected) < 1e-4
    if name == "gpt_neo":
        with pytest.raises(CheckpointError, match=r"q_proj has no bias.*b25"):
            folding.convert(plain, "h24")
    else:
        assert error(logits(folding.convert(plain, "h24")), expected) < 1e-4


@each_family
def test_a_frozen_checkpoint_reloads_in_plain_transformers(name, tmp_path):
    sites = frozen(random_model(name))
    expected = logits(sites.model)
    checkpoint.save(sites.to_plain(), tmp_path / "model")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(plain).__name__ == FAMILIES[name].architecture
    assert not any(info.values()), info
    assert error(logits(plain.eval()), expected) < 1e-4
    assert error(logits(checkpoint.load(tmp_path / "model")), expected) < 1e-4


@each_family
def test_unit_gains_are_the_same_function(name):
    model = random_model(name)
    unit = folding.to_unit_gain(model)
    assert error(logits(unit), logits(model)) < 1e-5
    offset = FAMILIES[name].style.gain_offset
    for norm in folding.norms_of(unit):
        if norm.readers:
            assert (unit.get_submodule(norm.path).weight + offset == 1).all()


@each_family
def test_linear_maps_read_the_stream(name):
    """An LN-free model's readers are linear in the stream: what the map gives is what the module computed."""
    model = random_model(name, frozen=True)
    seen, handles = {}, []
    for norm in folding.norms_of(model):
        module = model.get_submodule(norm.path)
        handles.append(module.register_forward_pre_hook(lambda _, args, at=norm.path: seen.__setitem__(at, args[0])))
        for reader in norm.readers:
            module = model.get_submodule(reader.path)
            handles.append(module.register_forward_hook(lambda *args, at=reader.path: seen.__setitem__(at, args[2])))
    logits(model)
    maps = {path: (weight, bias) for path, weight, bias in folding.linear_maps(model)}
    for norm in folding.norms_of(model):
        for reader in norm.readers:
            weight, bias = maps[reader.path]
            found = seen[norm.path] @ weight + (0 if bias is None else bias)
            torch.testing.assert_close(found, seen[reader.path], rtol=1e-3, atol=1e-3)


@each_family
def test_every_parameter_learns_while_sites_are_live_half_way_and_constant(name):
    for alpha in (0.0, 0.5, 1.0):
        sites = frozen(random_model(name), shortcut=alpha == 1)
        for site in sites:
            sites[site].alpha.fill_(alpha)
        if alpha < 1:
            for norm in sites.norms:
                norm.constant = False
        sites.model(TOKENS, use_cache=False).logits.square().sum().backward()
        gradients = {path: parameter.grad for path, parameter in sites.model.named_parameters()}
        assert not [path for path, gradient in gradients.items() if gradient is None or not gradient.any()]


@each_family
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_awkward_shapes(name, data):
    model = random_model(name, seed=data.draw(st.integers(0, 9)), **data.draw(models.FAMILIES[name].shapes))
    expected = logits(model)
    sites = Sites(copy.deepcopy(model), 0)
    assert error(logits(sites.model), expected) < 2e-5  # of nine numbers, one may be rounded the other way
    ours = frozen(copy.deepcopy(model), shortcut=data.draw(st.booleans()))
    plain = ours.to_plain()
    for form in (plain, folding.to_identity(plain)):
        assert error(logits(form), logits(ours.model)) < 1e-4
    assert error(logits(folding.to_unit_gain(model)), expected) < 1e-5


def test_the_order_of_a_schedule_passes_over_kinds_that_a_model_lacks():
    schedule = Schedule(start=2, gap=Gaps(attn_out=1, mlp_out=2), layers=Layers(mlp_out="down"))
    steps = {event.name: event.step for event in resolve(schedule, FAMILIES["gemma2"].sites_of(2), 20)}
    assert [steps[f"h.{i}.attn_out"] for i in (0, 1)] == [2, 3]
    assert [steps[f"h.{i}.mlp_out"] for i in (1, 0)] == [4, 6]
    assert steps["final"] == steps["merge position_0"] == 8
    assert len(resolve(schedule, FAMILIES["gpt2"].sites_of(2), 20)) == 3 * 2 + 1 + 2


@each_family
def test_the_activation_is_the_one_that_the_mlp_has(name):
    """A config may hold several: Gemma 2 goes by `hidden_activation`, not `hidden_act`."""
    activation = getattr(random_model(name).config, FAMILIES[name].activation)
    other = next(function for function in ("relu", "gelu_new") if function != activation)
    assert not torch.equal(logits(random_model(name)), logits(random_model(name, **{FAMILIES[name].activation: other})))


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_attention_that_is_not_causal_is_refused(name):
    with pytest.raises(CheckpointError, match="bidirectional attention"):
        Sites(random_model(name, use_bidirectional_attention=True), 0)


def test_neox_without_biases_of_attention_is_refused():
    with pytest.raises(CheckpointError, match="attention without biases"):
        Sites(random_model("gpt_neox", attention_bias=False), 0)


@pytest.mark.parametrize(
    ("model_type", "architecture", "more", "reason"),
    [
        ("qwen3", "Qwen3ForCausalLM", {}, "norms of queries and keys"),
        ("olmo2", "Olmo2ForCausalLM", {}, "norms of queries and keys"),
        ("gemma3_text", "Gemma3ForCausalLM", {}, "norms of queries and keys"),
        ("opt", "OPTForCausalLM", {}, "no eps in its config"),
        ("mixtral", "MixtralForCausalLM", {"num_local_experts": 8}, "mixture of experts"),
        ("t5", "T5ForConditionalGeneration", {"is_encoder_decoder": True}, "an encoder"),
        ("llava", "LlavaForConditionalGeneration", {"vision_config": {}}, "a vision tower"),
        ("llama", "LlamaForSequenceClassification", {}, ""),
    ],
)
def test_others_are_refused_by_name_with_the_reason(model_type, architecture, more, reason, tmp_path):
    config = {"model_type": model_type, "architectures": [architecture]} | more
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"{architecture}.*{reason}.*architectures: GPT2LMHeadModel"):
        checkpoint.load_config(tmp_path)


def test_the_frozen_form_is_as_exact_as_its_eps():
    """The relative error of dividing by √(σ² + eps) in place of √eps is σ²/(2·eps): half of 1e-4 at σ = 1e4."""
    assert math.sqrt(1e4**2 + folding.FROZEN_EPS) / math.sqrt(folding.FROZEN_EPS) - 1 == pytest.approx(5e-5, rel=1e-3)
