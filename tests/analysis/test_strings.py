"""Texts in every tool, with tokenizers that put what they like around them."""

import copy

import pytest
import torch
from contract import TOOLS
from models import random_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers_of_forms import FORMS, LINES
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import analysis
from finetune.blocks import BlocksForCausalLM, block_config
from finetune.errors import NolnError

EACH = [(family, tool) for family in ("gpt2", "llama") for tool in TOOLS]
TEXT, LONGER = "the best of times", "it was the worst of times"
KINDS = {
    "neither": ([], {"eos_token": "<e>"}),
    "prepends": (["<b>", "$A"], {"bos_token": "<b>"}),
    "appends": (["$A", "<e>"], {"eos_token": "<e>"}),
    "both": (["<b>", "$A", "<e>"], {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>"}),
    "both the same": (["<e>", "$A", "<e>"], {"bos_token": "<e>", "eos_token": "<e>"}),
    "prepends what it does not name": (["<b>", "$A"], {"eos_token": "<e>"}),
    "pads on the left": (["<b>", "$A"], {"bos_token": "<b>", "pad_token": "<p>", "padding_side": "left"}),
    "no special tokens": ([], {}),
}
BOS = dict.fromkeys(KINDS, "<b>") | {"neither": "<e>", "appends": "<e>", "both the same": "<e>"}
BOS |= {"no special tokens": None}


def words(kind: str, sentencepiece: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of words, or one whose words begin with ▁, that puts around a text what its kind says."""
    template, names = KINDS[kind]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Metaspace() if sentencepiece else pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Metaspace() if sentencepiece else decoders.ByteLevel()
    alphabet = [] if sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    special = ["<b>", "<e>", "<p>"] if names else []
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, LONGER] * 10, trainer)
    if template:
        of = [(token, tokenizer.token_to_id(token)) for token in ("<b>", "<e>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=of)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def letters(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of letters without a special token."""
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make(family: str, tokenizer: PreTrainedTokenizerFast):
    positions = {"n_positions": 40} if family == "gpt2" else {"max_position_embeddings": 40}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"))
    return random_model(family, vocab_size=len(tokenizer), frozen=True, **positions, **ids)


@pytest.mark.parametrize("sentencepiece", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "tool"), EACH)
@torch.no_grad()
def test_a_text_is_its_tokens_behind_bos(family, tool, kind, sentencepiece):
    tokenizer = words(kind, sentencepiece)
    before = copy.deepcopy(tokenizer)
    plain = make(family, tokenizer)
    model = TOOLS[tool](plain, tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    bos = [] if BOS[kind] is None else [tokenizer.convert_tokens_to_ids(BOS[kind])]
    assert model.to_tokens(TEXT, prepend_bos=False).tolist() == [ids]
    assert model.to_tokens(TEXT, prepend_bos=True).tolist() == [bos + ids]
    assert model.to_tokens(TEXT).tolist() == [bos + ids]
    assert "".join(model.to_str_tokens(TEXT, prepend_bos=False)).replace(" ", "") == TEXT.replace(" ", "")
    assert len(model.to_str_tokens(TEXT)) == len(bos + ids)
    one = tokenizer.decode(ids[1:2]) if sentencepiece else " best"
    assert model.to_single_token(one) == tokenizer.encode(one, add_special_tokens=False)[0]
    torch.testing.assert_close(model(TEXT), plain(torch.tensor([bos + ids])).logits, rtol=1e-4, atol=1e-4)
    assert model.to_tokens(TEXT * 20).shape == (1, 40)
    assert (tokenizer.bos_token, tokenizer.pad_token) == (before.bos_token, before.pad_token), "the caller's changed"


@pytest.mark.parametrize("tokenizer", [words("appends"), words("both"), words("no special tokens")])
@pytest.mark.parametrize("tool", TOOLS)
@torch.no_grad()
def test_an_attribution_is_that_of_the_token_named(tool, tokenizer):
    plain = make("gpt2", tokenizer)
    model = TOOLS[tool](plain, tokenizer)
    logits, cache = model.run_with_cache(TEXT)
    parts = cache.decompose_resid(pos_slice=-1)
    token = tokenizer.encode(" worst", add_special_tokens=False)[-1]
    shares = cache.logit_attrs(parts, " worst", pos_slice=-1)[:, 0]
    assert (shares.sum() + model.b_U[token]).item() == pytest.approx(logits[0, -1, token].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (words("neither"), [TEXT, LONGER]),
        (words("both"), [TEXT, LONGER]),
        (words("pads on the left"), [TEXT, LONGER]),
        (words("no special tokens"), [TEXT, LONGER]),
        (letters("ACGT"), ["TTAC", "T", "GATTACA", "CC"]),
        (letters("tsebhofi wramTABX."), [TEXT, LONGER]),
    ],
)
@pytest.mark.parametrize(("family", "tool"), EACH)
@torch.no_grad()
def test_texts_of_different_lengths_are_as_each_by_itself(family, tool, tokenizer, texts):
    model = TOOLS[tool](make(family, tokenizer), tokenizer)
    logits = model(texts)
    assert len(logits) == len(texts)
    for text, found in zip(texts, logits, strict=True):
        alone = model(text)[0]
        torch.testing.assert_close(found[: len(alone)], alone, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 3, "do_sample": False, "verbose": False}
    assert model.generate(texts, **options) == [model.generate(text, **options) for text in texts]
    *_, last = model.generate_stream(texts[0], max_new_tokens=3, do_sample=False, verbose=False)
    assert last is not None


@pytest.mark.parametrize("tokenizer", [words("neither"), words("no special tokens"), letters(" tsebhofiwram")])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_texts_in_nnsight(family, tokenizer):
    plain = make(family, tokenizer)
    model = analysis.load_nnsight(plain, tokenizer)
    ids = tokenizer.encode(TEXT)
    with model.trace([TEXT, LONGER]):
        logits = model.output.logits.save()
    alone = plain(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits[0, -len(ids) :], alone, rtol=1e-4, atol=1e-4)
    with model.generate(TEXT, max_new_tokens=2, do_sample=False) as tracer:
        made = tracer.result.save()
    assert made.shape == (1, len(ids) + 2)
    greedy = analysis.load_transformers(plain).generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)
    assert torch.equal(made, greedy)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_texts_in_hooked_blocks(kind):
    tokenizer = words(kind)
    source = BlocksForCausalLM(
        block_config("op", vocab_size=len(tokenizer), n_positions=40, n_embd=12, n_layer=1, n_head=3)
    )
    model = analysis.load_hooked_blocks(source, tokenizer)
    logits = model([TEXT, LONGER])
    alone = model(TEXT)[0]
    torch.testing.assert_close(logits[0, : len(alone)], alone)
    assert model.to_tokens(TEXT, prepend_bos=False).tolist() == [tokenizer.encode(TEXT, add_special_tokens=False)]


def test_padding_that_is_text_is_not_guessed():
    tokenizer = letters("ACGT")
    model = analysis.load_bridge(make("gpt2", tokenizer), tokenizer)
    assert model.to_tokens(["AC", "A"], padding_side="left").tolist() == [[0, 1], [3, 0]]
    with pytest.raises(NolnError, match=r"'T' begins with the token that is used for padding"):
        model.to_tokens(["AC", "T"], padding_side="left")


def test_special_tokens_beyond_the_vocabulary_are_not_used():
    tokenizer = words("no special tokens")
    size = len(tokenizer)
    model = make("gpt2", tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<later>", "pad_token": "<latest>"})
    loaded = analysis.load_bridge(model, tokenizer)
    assert loaded([TEXT, LONGER]).shape[-1] == size
    assert loaded.generate([TEXT, LONGER], max_new_tokens=2, do_sample=False, verbose=False)


@pytest.mark.parametrize("form", FORMS)
def test_tokenizers_of_every_form(form, tmp_path):
    """Read by name, and a text becomes the tokens that training would make of it."""
    directory = FORMS[form](tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for load in TOOLS.values():
        model = load(random_model(vocab_size=len(tokenizer)), str(directory))
        tokens = model.to_tokens(LINES[0], prepend_bos=False)
        assert tokens[0].tolist() == tokenizer.encode(LINES[0], add_special_tokens=False)[: model.cfg.n_ctx]
        assert model.to_tokens([LINES[0], "It"]).shape == model.to_tokens(LINES[0])[[0, 0]].shape
        assert model(LINES[1]).shape[-1] == len(tokenizer)
        assert isinstance(model.generate("It was", max_new_tokens=2, verbose=False), str)
