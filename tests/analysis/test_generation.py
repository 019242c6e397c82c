import torch
from contract import TOKENS, assert_keeps_contract, assert_plots_by_model, trio
from models import random_model

from analysis import generation, load_bridge


def test_contract(make_gpt2):
    assert_keeps_contract(generation.measure, make_gpt2)


def test_is_what_transformers_generates():
    """With a cache, from prompts of two lengths; of a family whose tool is the bridge."""
    plain = random_model("llama", max_position_embeddings=32)
    prompts = [TOKENS[0, :5], TOKENS[1, :3], TOKENS[3, :5]]
    frame = generation.measure_prompts({"original": load_bridge(plain)}, prompts, new_tokens=7, batch_size=2)
    for prompt, row in zip(prompts, frame.itertuples(), strict=True):
        mask = torch.ones_like(prompt)[None]
        options = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
        expected = plain.generate(prompt[None], attention_mask=mask, **options)[0]
        assert row.prompt_text == " ".join(map(str, prompt.tolist()))
        assert row.text == " ".join(map(str, expected[len(prompt) :].tolist()))
        assert row.new_tokens == row.agreed == 7
        losses = torch.nn.functional.cross_entropy(plain(expected[None]).logits[0, :-1], expected[1:], reduction="none")
        assert abs(row.reference_loss - losses[len(prompt) - 1 :].mean().item()) < 1e-4


def test_agreed_tokens_are_counted_to_the_first_difference(make_gpt2):
    models = trio(make_gpt2)
    frame = generation.measure(models, TOKENS)
    texts = frame.set_index(["model", "prompt"])["text"]
    for row in frame.itertuples():
        own, reference = row.text.split(), texts["original", row.prompt].split()
        same = [one == other for one, other in zip(own, reference, strict=True)]
        assert row.agreed == (same.index(False) if False in same else len(own))
    agreed = frame.groupby("model")["agreed"].mean()
    assert agreed["original"] > agreed["ln_free"]
    losses = frame.groupby("model")["reference_loss"].mean()
    assert losses["original"] < losses["ln_free"]


def test_prompts_are_spread_over_the_blocks_and_begin_with_the_prefix(make_gpt2):
    models = {"original": trio(make_gpt2)["original"]}
    tokens = torch.arange(22).view(2, 11)
    frame = generation.measure(models, tokens)
    starts = [int(text.split()[0]) for text in frame["prompt_text"]]
    assert starts == [0, 2, 4, 6, 11, 13, 15, 17]
    tokens[:, 0] = 22
    prefixed = generation.measure(models, tokens, prefix="bos")
    assert [text.split()[:2] for text in prefixed["prompt_text"][1:3]] == [["22", "2"], ["22", "4"]]
    assert {len(text.split()) for text in prefixed["prompt_text"]} == {5}


def test_text_ends_at_end_of_text_and_stands_side_by_side(micro_trio):
    frame = generation.measure_prompts(micro_trio, ["It is a truth <b>", "universally acknowledged"], new_tokens=5)
    assert list(frame["model"]) == [name for name in micro_trio for _ in range(2)]
    wide = generation.side_by_side(frame)
    assert list(wide.columns) == ["prompt", "prompt_text", *micro_trio]
    assert list(wide["prompt_text"]) == ["It is a truth <b>", "universally acknowledged"]
    assert list(wide["original"]) == list(frame[frame["model"] == "original"]["text"])
    model = micro_trio["original"]
    second = model.tokenizer.encode(frame["text"][0])[1]
    model.tokenizer.eos_token, before = model.tokenizer.convert_ids_to_tokens(second), model.tokenizer.eos_token
    short = generation.measure_prompts({"original": model}, ["It is a truth <b>"], new_tokens=5)
    model.tokenizer.eos_token = before
    assert short["new_tokens"].item() == 2
    assert_plots_by_model(generation.plot(frame), list(micro_trio))
