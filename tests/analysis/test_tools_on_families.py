"""The contract of a family in `analysis`: what is held for every entry of `finetune.families.FAMILIES`."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from contract import TL4, TOKENS, TOOLS
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES as FACTORY
from models import random_model
from test_patching import PAIRS, word_level
from torch import Tensor

from analysis import (
    attention,
    batches,
    confidence_neurons,
    faithfulness,
    generation,
    load_bridge,
    load_hooked,
    load_nnsight,
    load_transformers,
    load_trio,
    logit_attribution,
    loss,
    other_text,
    outlier_features,
    patching,
    report,
    residual_norms,
)
from analysis.stream import Stream
from analysis.texts import read_text
from finetune.checkpoint import load_tokenizer
from finetune.errors import CheckpointError
from finetune.families import FAMILIES, family_of
from finetune.folding import norms_of, part_of_column

each_family = pytest.mark.parametrize("name", FAMILIES)
each_state = pytest.mark.parametrize("frozen", [True, False], ids=["ln_free", "live"])
make = functools.cache(random_model)


@functools.cache
def loaded(name: str, tool: str = "bridge", **config: Any) -> Any:
    return TOOLS[tool](make(name, **config))


@functools.cache
def trio(name: str, tool: str) -> dict[str, Any]:
    return load_trio(make(name, seed=1), make(name, seed=2), make(name, seed=3, frozen=True), tool=tool)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


class Paths:
    """Where a plain model has what the hooks of a layer see: (module, whether its input is meant)."""

    def __init__(self, model: Any) -> None:
        self.family, self.n_layer = family_of(model), model.config.num_hidden_layers
        norms = norms_of(model)
        self.final, post = norms[-1].path, {norm.writer: norm.path for norm in norms if norm.writer}
        writers = {(layer, part): path for layer, part, path in self.family.writers_of(self.n_layer)}
        self.of_hook = {"hook_embed": (writers[None, "embed"], False)}
        for layer in range(self.n_layer):
            block, o, out = f"{self.family.blocks}.{layer}", writers[layer, "o"], writers[layer, "out"]
            self.of_hook |= {
                f"blocks.{layer}.hook_resid_pre": (block, True),
                f"blocks.{layer}.hook_resid_post": (block, False),
                f"blocks.{layer}.attn.hook_z": (o, True),
                f"blocks.{layer}.hook_attn_out": (post.get(o, o), False),
                f"blocks.{layer}.mlp.hook_post": (out, True),
                f"blocks.{layer}.hook_mlp_out": (post.get(out, out), False),
            }


@contextmanager
def hooked(model: Any, path: str, is_input: bool, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Show `see` what goes into or comes out of a module; what it returns takes its place."""

    def pre(_: Any, inputs: Any) -> Any:
        seen = see(inputs[0])
        return None if seen is None else (seen, *inputs[1:])

    def post(_: Any, inputs: Any, output: Any) -> Any:
        seen = see(output[0] if isinstance(output, tuple) else output)
        return (seen, *output[1:]) if isinstance(output, tuple) and seen is not None else seen

    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(pre) if is_input else module.register_forward_hook(post)
    yield
    handle.remove()


@torch.no_grad()
def plain_activations(model: Any, tokens: Tensor = TOKENS) -> dict[str, Tensor]:
    """The activations of plain transformers under TransformerLens's names."""
    model, found, handles = copy.deepcopy(model), {}, []
    model.set_attn_implementation("eager")
    config, paths = model.config, Paths(model)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads

    def keep(name: str, path: str, which: str | int) -> None:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            found[name] = inputs[0] if which == "in" else output[which] if isinstance(output, tuple) else output

        handles.append(model.get_submodule(path).register_forward_hook(hook))

    for name, (path, is_input) in paths.of_hook.items():
        keep(name, path, "in" if is_input else 0)
    for layer in range(paths.n_layer):
        keep(f"blocks.{layer}.attn.hook_pattern", f"{paths.family.blocks}.{layer}.{paths.family.attention}", 1)
    readers = {reader.path: (norm.layer, reader) for norm in norms_of(model) for reader in norm.readers}
    for path in readers:
        keep(path, path, 0)
    found["logits"] = model(tokens).logits
    gated = any("gate" in reader.parts for _, reader in readers.values())
    mlp = {"in": "hook_pre_linear", "gate": "hook_pre"} if gated else {"in": "hook_pre"}
    for path, (layer, reader) in readers.items():
        output, columns = found.pop(path), part_of_column(model, reader)
        for i, part in enumerate(reader.parts):
            if part in mlp:
                found[f"blocks.{layer}.mlp.{mlp[part]}"] = output[..., columns == i]
            elif part != "unembed":
                found[f"blocks.{layer}.attn.hook_{part}"] = output[..., columns == i].unflatten(-1, (-1, width))
            else:
                found["uncapped"] = output
    for layer in range(paths.n_layer):
        found[f"blocks.{layer}.attn.hook_z"] = found[f"blocks.{layer}.attn.hook_z"].unflatten(-1, (heads, -1))
        if not getattr(config, "use_parallel_residual", False):
            attended = found[f"blocks.{layer}.hook_attn_out"]
            found[f"blocks.{layer}.hook_resid_mid"] = found[f"blocks.{layer}.hook_resid_pre"] + attended
    return found


@torch.no_grad()
def nnsight_activations(model: Any, paths: Paths) -> dict[str, Tensor]:
    at = lambda path: functools.reduce(  # noqa: E731
        lambda module, step: module[int(step)] if step.isdigit() else getattr(module, step), path.split("."), model
    )
    names = ["hook_embed", *(f"blocks.{i}.{x}" for i in range(paths.n_layer) for x in ("attn.hook_z", "mlp.hook_post"))]
    found = {}
    with model.trace(TOKENS):
        for name in names:
            module = at(paths.of_hook[name][0])
            found[name] = (module.input if paths.of_hook[name][1] else module.output).save()
        found["logits"] = model.output.logits.save()
    return found


@torch.no_grad()
def check_activations(models: dict[str, Any], expected: dict[str, Tensor]) -> None:
    """Each tool's model has the logits and every activation of plain transformers."""
    for tool, made in models.items():
        logits, cache = made.run_with_cache(TOKENS, return_cache_object=False)
        for hook in expected.keys() - {"logits", "uncapped"}:
            assert error(cache[hook], expected[hook]) < 1e-4, (tool, hook)
        assert error(logits, expected["logits"]) < 1e-4, tool
        assert not {*Stream(made).points} - expected.keys(), tool


@each_state
@each_family
def test_every_tool_agrees_with_plain_transformers(name, frozen):
    model = make(name, frozen=frozen)
    expected = plain_activations(model)
    centred = FAMILIES[name].style.centred
    models = {tool: loaded(name, tool, frozen=frozen) for tool in TOOLS}
    for made in models.values():
        assert made.cfg.normalization_type == (None if frozen else "LNPre" if centred else "RMSPre")
    check_activations(models, expected)
    found = nnsight_activations(load_nnsight(model, load_tokenizer("micro")), Paths(model))
    for hook, activation in found.items():
        assert error(activation, expected[hook].flatten(2)) < 1e-4, hook
    with torch.no_grad():
        assert error(load_transformers(model)(TOKENS).logits, expected["logits"]) < 1e-4


VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gpt_neox", {"tie_word_embeddings": True, "rotary_pct": 0.25}),
    (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    ("llama", {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": None, "head_dim": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "num_key_value_heads": 1}),
]


@each_state
@pytest.mark.parametrize(("name", "config"), VARIANTS)
def test_variants(name, config, frozen):
    model = random_model(name, frozen=frozen, **config)
    check_activations({tool: load(model) for tool, load in TOOLS.items()}, plain_activations(model))


def test_biases_into_gated_mlps_are_the_bridges_alone():
    model = random_model("llama", mlp_bias=True)
    with torch.no_grad():
        assert error(load_bridge(model)(TOKENS), model(TOKENS).logits) < 1e-4
    if not TL4:
        with pytest.raises(CheckpointError, match=r"does not have biases into gated MLPs. Use load_bridge"):
            load_hooked(model)


@torch.no_grad()
def written(model: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """What components write to the stream of a plain model; a head its share of what a norm makes of all."""
    parts = {"embed": found["hook_embed"]}
    norms = {norm.writer: model.get_submodule(norm.path) for norm in norms_of(model) if norm.writer}
    for layer, part, path in family_of(model).writers_of(model.config.num_hidden_layers):
        if part == "out":
            parts[f"L{layer} MLP"] = found[f"blocks.{layer}.hook_mlp_out"]
        if part == "o":
            weight = model.get_submodule(path).weight
            z = found[f"blocks.{layer}.attn.hook_z"]
            W_O = (weight if type(model.get_submodule(path)).__name__ == "Conv1D" else weight.T).unflatten(
                0, z.shape[-2:]
            )
            heads = torch.einsum("bphd,hdm->bphm", z, W_O)
            if path in norms:
                both = heads.sum(2, keepdim=True)
                variance = both.square().mean(-1, keepdim=True) + model.config.rms_norm_eps
                heads = heads * (norms[path].weight + 1) / variance.sqrt()
            parts |= {f"L{layer}H{i}": head for i, head in enumerate(heads.unbind(2))}
    return parts


def check_attributions(models: dict[str, Any], model: Any, found: dict[str, Tensor], frozen: bool) -> None:
    """What is attributed is the logit before soft-capping: parts add up, and an effect is that of a forward without."""
    tokens = TOKENS[:1]

    def target(logits: Tensor) -> np.ndarray:
        return logits[0, :-1].gather(-1, tokens[0, 1:, None]).flatten().double().numpy()

    expected = target(found["uncapped"])
    scale = np.abs(expected).max()
    parts = written(model, found)
    effects = {}
    for label, part in parts.items():
        without = {}
        with (
            torch.no_grad(),
            hooked(model, Paths(model).final, True, lambda x, part=part: x - part[:1]),
            hooked(model, "lm_head", False, lambda logits, kept=without: kept.__setitem__("logits", logits)),
        ):
            model(tokens)
        effects[label] = expected - target(without["logits"])
    biases = {f"L{layer} b_O" for layer in range(model.config.num_hidden_layers)}
    for made in models.values():
        frame = logit_attribution.measure_prompt({"m": made}, tokens[0], centre_unembedding=False).set_index("label")
        assert np.allclose(frame.loc["logit", "dla"], expected, atol=1e-4 * scale)
        assert frame.loc["residue", "dla"].abs().max() < 1e-4 * scale
        assert {*frame.index} - {*parts} <= {"pos_embed", "b_U", "logit", "residue"} | biases
        for label, effect in effects.items():
            assert np.allclose(frame.loc[label, "direct_effect"], effect, atol=2e-4 * scale), label
            assert np.allclose(frame.loc[label, "dla"], effect, atol=2e-4 * scale) == frozen, label


@each_state
@each_family
def test_attributions_against_a_forward_without_the_component(name, frozen):
    model = make(name, frozen=frozen)
    check_attributions(
        {tool: loaded(name, tool, frozen=frozen) for tool in TOOLS}, model, plain_activations(model), frozen
    )


@torch.no_grad()
@each_family
def test_neurons_add_up_to_their_mlp(name):
    for frozen in (True, False):
        model = loaded(name, frozen=frozen)
        stream = Stream(model)
        _, cache = model.run_with_cache(TOKENS, return_cache_object=False)
        for neurons in stream.neurons:
            out = cache[neurons.hook] @ stream.weight(neurons)
            out = out / cache[neurons.scale] if neurons.scale else out
            bias = model.blocks[neurons.layer].mlp.b_out
            out = out if bias is None else out + bias
            assert error(out, cache[f"blocks.{neurons.layer}.hook_mlp_out"]) < 1e-4


def check_patching(models: dict[str, Any], model: Any) -> None:
    """Patching, and its slope, are those of whole forwards of plain transformers."""
    tokenizer, pair = word_level("a b c d e f g h i j k l m n o p q r s t u v"), PAIRS[0]
    model.set_attn_implementation("eager")
    clean, corrupt = (torch.tensor([tokenizer.encode(text)]) for text in (pair.clean, pair.corrupt))
    correct, wrong = (tokenizer.encode(text)[0] for text in (pair.correct, pair.wrong))

    def run(tokens: Tensor) -> Tensor:
        logits = model(tokens).logits[0, -1].double()
        return logits[correct] - logits[wrong]

    rounding = 1e-5 * model(corrupt).logits.abs().max()
    for made in models.values():
        frame = patching.measure({"m": made}, [pair], tokenizer)
        scale = frame["activation"].abs().max()
        for row in frame.iloc[::7].itertuples():
            path, is_input = Paths(model).of_hook[f"blocks.{row.layer}.{row.hook_point}"]
            kept, share = {}, torch.zeros((), requires_grad=True)

            def patch(activation: Tensor, row: Any = row, kept: Any = kept, share: Tensor = share) -> Tensor | None:
                if not kept:
                    kept["clean"] = activation.detach()
                    return None
                where = torch.zeros_like(activation)
                columns = slice(None)
                if not pd.isna(row.head):
                    width = activation.shape[-1] // model.config.num_attention_heads
                    columns = slice(int(row.head) * width, (int(row.head) + 1) * width)
                where[0, row.position, columns] = 1
                return activation + share * where * (kept["clean"] - activation.detach())

            with hooked(model, path, is_input, patch):
                high, low = run(clean), run(corrupt)
                (slope,) = torch.autograd.grad(low, share)
                share.data.fill_(1)
                patched = run(corrupt)
            # What rounding does to the difference that all are divided by, it does to each.
            close = max(1.0, scale) * (1e-3 + (rounding / (high - low).abs()).item())
            assert row.activation == pytest.approx(((patched - low) / (high - low)).item(), abs=close)
            assert row.attribution == pytest.approx((slope / (high - low)).item(), abs=close)


@each_state
@each_family
def test_patching_against_a_whole_forward_of_plain_transformers(name, frozen):
    check_patching({tool: loaded(name, tool, frozen=frozen) for tool in TOOLS}, make(name, frozen=frozen))


@each_family
@settings(max_examples=4, deadline=None)
@given(st.data())
def test_awkward_shapes(name, data):
    frozen, seed = data.draw(st.booleans()), data.draw(st.integers(0, 9))
    # Smaller weights than elsewhere: three gated layers without norms leave nothing of float32 otherwise.
    model = random_model(name, seed=seed, std=0.15, frozen=frozen, **data.draw(FACTORY[name].shapes))
    models = {tool: load(model) for tool, load in TOOLS.items()}
    found = plain_activations(model)
    check_activations(models, found)
    check_attributions(models, model, found, frozen)
    check_patching(models, model)


def entropies(logits: Tensor) -> Tensor:
    log_probs = logits[:, :-1].log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1).mean()


@torch.no_grad()
@each_state
@each_family
def test_confidence_neurons_against_a_forward_of_plain_transformers(name, frozen):
    model, neurons = make(name, frozen=frozen), [2, 5]
    path, is_input = Paths(model).of_hook["blocks.1.mlp.hook_post"]
    mean = plain_activations(model)["blocks.1.mlp.hook_post"].mean((0, 1))

    def ablate(activation: Tensor) -> Tensor:
        activation = activation.clone()
        activation[..., neurons] = mean[neurons]
        return activation

    clean = entropies(model(TOKENS).logits)
    with hooked(model, path, is_input, ablate):
        change = (entropies(model(TOKENS).logits) - clean).item()
    frame = confidence_neurons.measure({"m": loaded(name, frozen=frozen)}, TOKENS, neurons)
    both = frame[(frame["ablated"] == 2) & (frame["measure"] == "entropy")].iloc[0]
    assert both["total"] == pytest.approx(change, abs=2e-5)
    assert abs(change) > 2e-4
    assert (both["through_ln"] == 0) == frozen


@torch.no_grad()
@pytest.mark.parametrize("tool", TOOLS)
@each_state
@each_family
def test_confidence_neurons_against_a_forward_for_each(name, frozen, tool):
    """A forward with a group of neurons at their means, and its final stream at the scale of the forward without."""
    model, neurons = loaded(name, tool, frozen=frozen), [2, 5, 0]
    stream, post = Stream(model), "blocks.1.mlp.hook_post"
    _, cache = model.run_with_cache(TOKENS, return_cache_object=False)
    scale = stream.scale(stream.centre(cache[stream.final]).square().sum(-1, keepdim=True))

    def measured(logits: Tensor) -> dict[str, float]:
        log_probs = logits[:, :-1].double().log_softmax(-1)
        of_next = log_probs.gather(-1, TOKENS[:, 1:, None])
        return {"entropy": float(-(log_probs.exp() * log_probs).sum(-1).mean()), "loss": float(-of_next.mean())}

    def ablate(activation: Tensor, hook: Any, group: list[int]) -> Tensor:
        activation = activation.clone()
        activation[..., group] = cache[post][..., group].mean((0, 1))
        return activation

    def ablated(group: list[int]) -> tuple[dict[str, float], dict[str, float]]:
        hooks, seen = [(post, functools.partial(ablate, group=group))], []
        keep = (stream.final, lambda resid, hook: seen.append(resid))
        total = measured(model.run_with_hooks(TOKENS, fwd_hooks=[*hooks, keep]))
        (resid,) = seen
        return total, measured(stream.cap(stream.centre(resid) / scale @ model.W_U + model.b_U))

    clean = measured(model(TOKENS))
    frame = confidence_neurons.measure({"m": model}, TOKENS, neurons)
    assert len(frame) == 12
    for row in frame.itertuples():
        total, direct = ablated(neurons[: row.ablated] if row.ablation == "together" else [row.neuron])
        assert row.clean == pytest.approx(clean[row.measure], abs=1e-5)
        assert row.total == pytest.approx(total[row.measure] - clean[row.measure], abs=1e-5)
        assert row.direct == pytest.approx(direct[row.measure] - clean[row.measure], abs=1e-5)
    assert frame[["total", "direct"]].abs().max().min() > 1e-3
    assert (frame["through_ln"].abs().max() > 1e-4) == (not frozen)


MEASURES: dict[str, Callable[..., pd.DataFrame]] = {
    "loss": loss.measure,
    "residual_norms": residual_norms.measure,
    "attention": attention.measure_heads,
    "components": functools.partial(logit_attribution.measure_components, neurons=True),
    "lens": logit_attribution.measure_lens,
    "predictions": faithfulness.measure,
    "layers": faithfulness.measure_layers,
    "heads": faithfulness.measure_heads,
    "neurons": faithfulness.measure_neurons,
    "confidence_neurons": functools.partial(confidence_neurons.measure, neurons=[1, 4]),
    "other_text": other_text.measure,
    "outlier_features": outlier_features.measure,
    "generation": generation.measure,
}


def assert_close(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    assert list(found) == list(expected)
    assert len(found) == len(expected)
    for column in found:
        if pd.api.types.is_float_dtype(expected[column]):
            scale = expected[column].abs().max()
            assert np.allclose(found[column], expected[column], rtol=1e-3, atol=2e-4 * scale, equal_nan=True), column
        else:
            assert list(found[column].astype(str)) == list(expected[column].astype(str)), column


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """Without biases of zeros, which a `HookedTransformer` has where a family has none, and errors of effects of 0."""
    if "component" in frame:
        frame = frame[(frame["component"] != "b_O") | (frame["dla_max"] > 0)].drop(columns=["nmae"])
        frame = frame[frame["component"] != "residue"]
    return frame.reset_index(drop=True)


@pytest.mark.slow
@each_family
def test_every_analysis(name, monkeypatch):
    """Numbers depend neither on the batch size nor on the tool nor on how much is computed at once."""
    for analysis, measure in MEASURES.items():
        frame = comparable(measure(trio(name, "bridge"), TOKENS))
        assert list(frame["model"].unique()) == ["original", "control", "ln_free"], analysis
        assert frame.select_dtypes("number").notna().any().all(), analysis
        with monkeypatch.context() as patched:
            patched.setattr(batches, "_LOGITS_IN_A_PIECE", 3 * 23)
            assert_close(comparable(measure(trio(name, "bridge"), TOKENS, batch_size=2)), frame)
        if not TL4:
            assert_close(comparable(measure(trio(name, "hooked"), TOKENS)), frame)


@torch.no_grad()
@each_family
def test_a_trio_is_centred_where_the_norm_centres(name):
    model = make(name, seed=3, frozen=True)
    expected = plain_activations(model)
    for tool in TOOLS:
        made = trio(name, tool)["ln_free"]
        logits, cache = made.run_with_cache(TOKENS, return_cache_object=False)
        assert error(logits, expected["logits"]) < 1e-4
        for point in Stream(made).points:
            stream = expected[point]
            if FAMILIES[name].style.centred:
                stream = stream - stream.mean(-1, keepdim=True)
            assert error(cache[point], stream) < 1e-4


def test_a_trio_of_two_families_is_refused():
    with pytest.raises(CheckpointError, match=r"ln_free is a GPTNeoForCausalLM, unlike the original"):
        load_trio(make("gpt2"), None, make("gpt_neo", frozen=True))


@pytest.mark.slow
@each_family
def test_the_whole_report(name, tmp_path):
    positions = {"n_positions" if name == "gpt2" else "max_position_embeddings": 32, "vocab_size": 4096}
    models = load_trio(
        *(random_model(name, seed=seed, frozen=seed == 3, std=0.1, **positions) for seed in (1, 2, 3)),
        load_tokenizer("micro"),
    )
    samples = {"books-report": read_text("books-report", models["original"], 32, prefix="<|endoftext|>")}
    page = report.write(models, samples, tmp_path / "report", prefix="<|endoftext|>").read_text()
    removed, kept = ("LayerNorm", "are centred") if FAMILIES[name].style.centred else ("RMSNorm", "are not centred")
    assert f"What removing {removed} changed" in page
    assert kept in page
    assert "32 tokens, with &#39;&lt;|endoftext|&gt;&#39; prepended" in page
