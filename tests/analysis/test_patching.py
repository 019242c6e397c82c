import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from contract import TL4, assert_plots_by_model, assert_same, trio
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from analysis import load_bridge, patching, prompts
from analysis.prompts import Pair, PairError
from finetune.checkpoint import load_tokenizer
from finetune.errors import NolnError

PAIRS = [
    Pair("a b c d e", "a b f d e", " g", " h"),
    Pair("b b a", "c b a", " a", " i"),
]


def word_level(words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def tokenizer():
    return word_level("a b c d e f g h i j k l m n o p q r s t u v")


@pytest.fixture(scope="module")
def micro_tokenizer():
    return load_tokenizer("micro")


@torch.no_grad()
def by_hand(plain, pair, tokenizer, hook_point, layer, position, head, share=1.0):
    """The metric of the corrupt prompt with one activation moved by `share` towards the clean one's."""
    clean, corrupt = (torch.tensor([tokenizer.encode(text)]) for text in (pair.clean, pair.corrupt))
    correct, wrong = tokenizer.encode(pair.correct)[0], tokenizer.encode(pair.wrong)[0]
    block = plain.transformer.h[layer]
    module, is_input = {
        "hook_resid_pre": (block, True),
        "hook_attn_out": (block.attn, False),
        "hook_mlp_out": (block.mlp, False),
        "attn.hook_z": (block.attn.c_proj, True),
    }[hook_point]
    kept = {}

    def keep(activation):
        kept["clean"] = activation.clone()

    def patch(activation):
        width = slice(None) if head is None else slice(head * 4, head * 4 + 4)
        moved = activation.clone()
        moved[0, position, width] += share * (kept["clean"] - activation)[0, position, width]
        return moved

    def run(tokens, edit=None):
        def pre(_, inputs):
            edited = edit(inputs[0])
            return None if edited is None else (edited, *inputs[1:])

        def post(_, inputs, output):
            if not isinstance(output, tuple):
                return edit(output)
            edited = edit(output[0])
            return None if edited is None else (edited, *output[1:])

        handles = []
        if edit is not None:
            handles = [module.register_forward_pre_hook(pre) if is_input else module.register_forward_hook(post)]
        logits = plain(tokens).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits[correct] - logits[wrong]

    high, low = run(clean, keep), run(corrupt)
    return ((run(corrupt, patch) - low) / (high - low)).item()


def head_of(row):
    return None if row.hook_point != "attn.hook_z" else int(row.head)


@pytest.fixture
def measured(make_gpt2, tokenizer):
    """A model in float64 and every place of it."""
    plain = make_gpt2(dtype=torch.float64)
    return plain, patching.measure({"m": load_bridge(plain)}, PAIRS, tokenizer, batch_size=4)


def test_activation_patching_against_a_forward_by_hand(measured, tokenizer):
    plain, frame = measured
    assert len(frame) == 2 * (3 + 3) * (3 + 3)  # layers, positions of both pairs, hook points with and without heads
    for row in frame.itertuples():
        place = PAIRS[row.pair - 1], tokenizer, row.hook_point, row.layer, row.position, head_of(row)
        assert row.activation == pytest.approx(by_hand(plain, *place), abs=1e-9)


def test_attribution_patching_against_finite_differences(measured, tokenizer):
    plain, frame = measured
    for row in frame.itertuples():
        place = PAIRS[row.pair - 1], tokenizer, row.hook_point, row.layer, row.position, head_of(row)
        step = 1e-5
        slope = (by_hand(plain, *place, step) - by_hand(plain, *place, -step)) / (2 * step)
        assert row.attribution == pytest.approx(slope, abs=1e-6)
    assert np.allclose(frame["error"], np.abs(frame["attribution"] - frame["activation"]))
    assert frame["error"].max() > 0.1


def test_a_prefix_stands_before_each_prompt(make_gpt2, tokenizer):
    model = load_bridge(make_gpt2())
    frame = patching.measure({"m": model}, PAIRS, tokenizer, prefix="v")
    assert frame.groupby("pair")["position"].unique().map(list).to_dict() == {1: [3, 4, 5], 2: [1, 2, 3]}
    first = patching.measure_pairs({"m": model}, PAIRS, tokenizer, prefix="v").iloc[0]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(f"v {PAIRS[0].clean}")]))[0, -1]
    correct, wrong = (tokenizer.encode(text)[0] for text in (PAIRS[0].correct, PAIRS[0].wrong))
    assert first["clean_difference"] == pytest.approx((logits[correct] - logits[wrong]).item(), abs=1e-5)
    assert len(prompts.encode_pairs(PAIRS, tokenizer, 6, "v")[0].clean) == 6
    with pytest.raises(PairError, match="5 tokens; for this model they must have from 1 to 4"):
        prompts.encode_pairs(PAIRS, tokenizer, 5, "v")


def test_positions_left_out_have_no_effect(measured, tokenizer):
    plain, frame = measured
    assert frame.groupby("pair")["position"].unique().map(list).to_dict() == {1: [2, 3, 4], 2: [0, 1, 2]}
    assert list(frame.drop_duplicates(["pair", "position"])["token"]) == ["c", "d", "e", "b", "b", "a"]
    for position in (0, 1):
        assert by_hand(plain, PAIRS[0], tokenizer, "hook_resid_pre", 1, position, None) == pytest.approx(0, abs=1e-12)


def test_activation_patching_against_transformer_lens(measured, tokenizer):
    from transformer_lens.patching import get_act_patch_attn_head_out_by_pos, get_act_patch_resid_pre

    plain, frame = measured
    model = load_bridge(plain)
    clean, corrupt, correct, wrong = prompts.encode_pairs(PAIRS[1:], tokenizer, 11)[0]

    def difference(logits):
        return logits[0, -1, correct] - logits[0, -1, wrong]

    with torch.no_grad():
        logits, cache = model.run_with_cache(clean[None])
        high, low = difference(logits), difference(model(corrupt[None]))

        def metric(logits):
            return (difference(logits) - low) / (high - low)

        for point, patch in (
            ("hook_resid_pre", get_act_patch_resid_pre),
            ("attn.hook_z", get_act_patch_attn_head_out_by_pos),
        ):
            ours = frame[(frame["pair"] == 2) & (frame["hook_point"] == point)]["activation"]
            theirs = patch(model, corrupt[None], cache, metric)
            assert np.allclose(ours, theirs.flatten(), atol=1e-6)


@pytest.fixture
def make_double(make_gpt2):
    """Make models in float64: where both prompts have nearly the same LD, little rounding makes a large effect."""
    return partial(make_gpt2, dtype=torch.float64)


def test_last_mlp_is_linear_without_ln_alone(make_double, tokenizer):
    frame = patching.measure(trio(make_double), PAIRS, tokenizer)
    last = frame[(frame["hook_point"] == "hook_mlp_out") & (frame["layer"] == 1)]
    errors = last.groupby("model")["error"].max()
    assert errors["ln_free"] < 1e-9
    assert errors["original"] > 1e-3


def test_contract(make_double, tokenizer):
    models = trio(make_double)
    frame = patching.measure(models, PAIRS, tokenizer)
    assert list(frame["model"].unique()) == list(models)
    for batch_size in (2, 7):
        assert_same(patching.measure(models, PAIRS, tokenizer, batch_size=batch_size), frame)
    one = {"ln_free": models["ln_free"]}
    assert_same(patching.measure(one, PAIRS, tokenizer), frame[frame["model"] == "ln_free"])
    pairs = patching.measure_pairs(models, PAIRS, tokenizer)
    assert_same(patching.measure_pairs(one, PAIRS, tokenizer), pairs[pairs["model"] == "ln_free"])
    if not TL4:
        for measure, bridges in ((patching.measure, frame), (patching.measure_pairs, pairs)):
            assert_same(measure(trio(make_double, "hooked"), PAIRS, tokenizer), bridges)


def test_works_on_a_model_whose_weights_want_no_gradient(make_gpt2, tokenizer):
    model = load_bridge(make_gpt2())
    expected = patching.measure({"m": model}, PAIRS, tokenizer)
    model.requires_grad_(False)
    with torch.no_grad():
        assert_same(patching.measure({"m": model}, PAIRS, tokenizer), expected)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_summary_against_a_loop(measured):
    _, frame = measured
    for row in patching.summarise(frame).itertuples():
        errors = [r.error for r in frame.itertuples() if (r.hook_point, r.layer) == (row.hook_point, row.layer)]
        assert row.places == len(errors)
        assert row.mean_error == pytest.approx(np.mean(errors))
        assert row.error_spread == pytest.approx(np.std(errors, ddof=1))


def test_pairs_that_every_model_solves():
    frame = pd.DataFrame(
        {
            "model": ["a", "a", "a", "b", "b", "b"],
            "pair": [1, 2, 3, 1, 2, 3],
            "clean_difference": [1.0, 1.0, 1.0, -1.0, 2.0, 0.5],
            "corrupt_difference": [-1.0, -1.0, -1.0, -1.0, 1.0, -0.5],
        }
    )
    assert patching.solved_by_all(frame) == [3]
    assert patching.solved_by_all(frame[:3]) == [1, 2, 3]
    assert patching.describe_pairs(frame).startswith("1 of 3 pairs are patched")


def test_some_pairs_alone_keep_their_numbers(measured, tokenizer):
    plain, frame = measured
    second = patching.measure({"m": load_bridge(plain)}, PAIRS, tokenizer, only=[2])
    assert_same(second, frame[frame["pair"] == 2])


@pytest.mark.slow
def test_micro_can_do_its_pairs(micro_tokenizer):
    pairs = prompts.read_pairs(prompts.MICRO)
    frame = patching.measure_pairs({"micro": load_bridge("micro")}, pairs, micro_tokenizer)
    assert len(frame) == len(pairs) >= 8
    assert (frame["clean_difference"] > 0.5).all()
    assert (frame["corrupt_difference"] < -0.5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corrupt": "a b f d e e"}, "5 and 6 tokens"),
        ({"clean": "", "corrupt": ""}, "0 tokens"),
        ({"clean": "a " * 12, "corrupt": "b " * 12}, "12 tokens; for this model they must have from 1 to 11"),
        ({"corrupt": "a b c d e"}, "the same tokens"),
        ({"correct": " zebra"}, "' zebra' is not one token"),
        ({"wrong": " a b"}, "' a b' is not one token"),
        ({"wrong": ""}, "'' is not one token"),
        ({"wrong": " g"}, "both answers"),
    ],
)
def test_pairs_that_cannot_be_patched(make_gpt2, tokenizer, change, message):
    pairs = [PAIRS[1], replace(PAIRS[0], **change)]
    for measure in (patching.measure, patching.measure_pairs):
        with pytest.raises(PairError, match=message) as error:
            measure({"m": load_bridge(make_gpt2())}, pairs, tokenizer)
        assert f"Prompt pair 2 ({pairs[1].clean!r}" in str(error.value)
    assert issubclass(PairError, NolnError)


def test_pairs_are_read_as_written(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([vars(pair) for pair in PAIRS]), encoding="utf-8")
    assert prompts.read_pairs(path) == PAIRS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[{", "cannot be read"),
        ("{}", "not contain a list"),
        ("[]", "not contain a list"),
        ('[{"clean": "a", "corrupt": "b", "correct": "c"}]', "Pair 1 .*clean, corrupt, correct, wrong"),
        ('[{"clean": "a", "corrupt": "b", "correct": "c", "wrong": 3}]', "Pair 1 "),
        ("[3]", "Pair 1 "),
    ],
)
def test_files_that_hold_no_pairs(tmp_path, text, message):
    path = tmp_path / "pairs.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(PairError, match=message) as error:
        prompts.read_pairs(path)
    assert str(path) in str(error.value)


def test_indirect_objects_for_any_tokenizer(micro_tokenizer):
    words = "When Mary Tom John and went to the shop garden house school station church , gave a book letter"
    for tokenizer in (micro_tokenizer, word_level(words)):
        pairs = prompts.indirect_object_pairs(tokenizer, count=20)
        assert len(set(pairs)) == 20
        encoded = prompts.encode_pairs(pairs, tokenizer, n_ctx=256)
        for pair, tokens in zip(pairs, encoded, strict=True):
            assert (pair.clean.count(pair.correct), pair.clean.count(pair.wrong)) == (1, 2)
            assert (pair.corrupt.count(pair.correct), pair.corrupt.count(pair.wrong)) == (2, 1)
            assert (tokens.clean != tokens.corrupt).sum() == 1
            names = tokens.correct, tokens.wrong
            assert [(tokens.clean == name).sum() for name in names] == [1, 2]
        assert prompts.indirect_object_pairs(tokenizer, count=20) == pairs
        assert prompts.indirect_object_pairs(tokenizer, count=20, seed=1) != pairs


def test_pairs_are_chosen_for_the_tokenizer(micro_tokenizer, tmp_path):
    assert prompts.choose_pairs(micro_tokenizer) == prompts.read_pairs(prompts.MICRO)
    names = word_level("When Mary Tom John and went to the shop")
    assert prompts.choose_pairs(names) == prompts.indirect_object_pairs(names)
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([vars(pair) for pair in PAIRS]), encoding="utf-8")
    assert prompts.choose_pairs(names, path) == PAIRS


def test_no_indirect_objects_without_names():
    with pytest.raises(PairError, match="Only 1 of"):
        prompts.indirect_object_pairs(word_level("When Mary and"))


def test_plots(make_gpt2, tokenizer):
    models = trio(make_gpt2)
    frame = patching.measure(models, PAIRS, tokenizer)
    figure = patching.plot(frame)
    assert_plots_by_model(figure, list(models))
    assert [annotation.text for annotation in figure.layout.annotations] == list(patching.HOOK_POINTS)
    figure = patching.plot_effects(frame)
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    assert sum(len(trace.x) for trace in dots) == len(frame)
    one_point = patching.measure(models, PAIRS, tokenizer, hook_points=["mlp.hook_post"])
    assert len(patching.plot(one_point).data) == len(models)
    assert_plots_by_model(patching.plot_pairs(patching.measure_pairs(models, PAIRS, tokenizer)), list(models))
