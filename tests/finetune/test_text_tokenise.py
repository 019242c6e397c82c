"""What a tokenizer does not know, and tokenizers in every form."""

import gzip
import json
import random
import warnings
from itertools import islice

import pytest
from tokenizers_of_forms import FORMS, LINES, characters

from finetune.checkpoint import load_tokenizer
from finetune.recipe import Text
from finetune.text import TextError, load_blocks, load_text, packing, tokenise

DRAWN = random.Random(0)


def jsonl(path, documents):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    return str(path)


def draw(letters, count=100, length=200):
    return ["".join(DRAWN.choice(letters) for _ in range(length)) for _ in range(count)]


TOKENIZERS = {
    "unknown token": characters("ACGT", unknown="<unk>"),
    "no unknown token": characters("ACGT"),
    "end-of-text is the unknown token": characters("ACGT", unknown="</s>", eos_token="</s>"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_the_tokenizer_does_not_know_is_refused(name, streaming, tmp_path):
    tokenizer = TOKENIZERS[name]
    source = jsonl(tmp_path / "lower.jsonl", draw("acgtA"))
    text = Text(source, streaming=streaming, held_out_blocks=3)
    for load in (lambda: load_text(text, tokenizer, 16, 9), lambda: load_blocks(text, tokenizer, 16, 9, most=3)):
        with pytest.raises(
            TextError,
            match=r"lower\.jsonl: the tokenizer does not know \d\d% of the text .*, for example in '[acgtA]{9}",
        ):
            load()
    with pytest.raises(TextError, match="does not know"):  # the same from the cache
        load_text(text, tokenizer, 16, 9)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_that_the_tokenizer_does_not_know_all_of_is_said(name, streaming, tmp_path):
    tokenizer = TOKENIZERS[name]
    text = Text(jsonl(tmp_path / "a.jsonl.gz", draw("ACGT" * 6 + "N")), streaming=streaming, held_out_blocks=3)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"a\.jsonl\.gz: the tokenizer does not know [2-7]% of the text"):
            splits = load_text(text, tokenizer, 16, 9)
    with pytest.warns(UserWarning, match="does not know") if streaming else warnings.catch_warnings():
        assert len(list(islice(splits.train, 2000))) >= 900


def test_no_word_of_a_few_unknown_tokens_or_of_what_the_text_says_itself(tmp_path, tokenizer):
    source = jsonl(tmp_path / "a.jsonl", draw("ACGT" * 100 + "N"))
    ends = jsonl(tmp_path / "b.jsonl", ["One.<|endoftext|>Two.<|endoftext|>"] * 300)
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's is
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_text(Text(source), TOKENIZERS["unknown token"], 16, 9)
        load_text(Text(ends), tokenizer, 16, 4096)


def test_a_stream_whose_later_documents_are_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_ENOUGH_TOKENS", 10_000)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1000)
    source = jsonl(tmp_path / "a.jsonl", [*draw("ACGT", 10), *draw("acgt", 400)])
    stream = load_text(Text(source, streaming=True, held_out_blocks=3), TOKENIZERS["unknown token"], 16, 9).train
    with pytest.raises(TextError, match="does not know 9"):
        list(islice(stream, 3000))


@pytest.mark.parametrize("form", FORMS)
def test_tokenizers_of_every_form(form, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(FORMS[form](tmp_path / "tokenizer"))
    assert tokenizer.is_fast != form.startswith("slow")
    source = jsonl(tmp_path / "a.jsonl", LINES)
    text = Text(source, held_out_fraction=0.1)
    splits = load_text(text, tokenizer, 16, len(tokenizer))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    expected = [token for line in LINES for token in [*tokenizer.encode(line, add_special_tokens=False), *end]]
    blocks = load_blocks(text, tokenizer, 16, len(tokenizer))
    assert blocks.blocks.ravel().tolist() == expected[: blocks.blocks.size]
    streamed = load_blocks(Text(source, streaming=True), tokenizer, 16, len(tokenizer), most=9)
    assert (streamed.blocks == blocks.blocks[:9]).all()
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(LINES[0]) == tokenizer.encode(LINES[0])
    monkeypatch.setattr(tokenise.Encoder, "encode", None)  # it is in the cache
    again = load_text(text, load_tokenizer(tmp_path / "tokenizer"), 16, len(tokenizer))
    assert (again.train.blocks == splits.train.blocks).all()


def test_slow_tokenizers_that_differ_in_merges_alone_do_not_share_a_cache(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", LINES)
    directory = FORMS["slow BPE"](tmp_path / "tokenizer")
    first = load_blocks(Text(source), load_tokenizer(directory), 16, 99)
    (directory / "merges.txt").write_text("#version: 0.2\nt h\n")
    assert len(load_blocks(Text(source), load_tokenizer(directory), 16, 99)) > len(first)


def test_a_tokenizer_that_fails_on_a_text(tmp_path):
    tokenizer = characters("ACGT", unknown="<unk>")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["vocab"]["<unk>"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    source = jsonl(tmp_path / "a.jsonl", draw("ACGTN"))
    for streaming in (False, True):
        with pytest.raises(TextError, match=r"a\.jsonl: the tokenizer failed.*<unk>|a\.jsonl.*Missing"):
            load_text(Text(source, streaming=streaming), tokenizer, 16, 9)
