import json
import lzma

import datasets
import pytest

from analysis import load_bridge
from analysis.texts import read_text
from finetune.bundled import resolve_text
from finetune.recipe import Text
from finetune.text import TextError, load_blocks


@pytest.fixture(scope="module")
def micro():
    return load_bridge("micro")


def test_blocks_are_packed_as_in_training_and_spread_over_the_text(micro):
    sample = read_text("books-validation", micro, 1024)
    few = read_text("books-validation", micro, 1)
    assert sample.tokens.shape == sample.documents.shape == (4, 256)
    assert few.tokens.equal(sample.tokens[:1])
    assert sample.documents[-1, -1] > 20
    documents = load_blocks(Text("books-validation"), micro.tokenizer, 256, 4096)
    assert sample.tokens[0].equal(documents[0]["input_ids"])


def test_a_context_and_a_prefix(micro):
    sample = read_text("books-validation", micro, 1024, context=64, prefix="<|endoftext|>")
    packed = load_blocks(Text("books-validation", prefix="<|endoftext|>"), micro.tokenizer, 64, 4096)
    assert sample.tokens.shape == (16, 64)
    assert set(sample.tokens[:, 0].tolist()) == {micro.tokenizer.eos_token_id}
    assert sample.tokens[0].equal(packed[0]["input_ids"])
    for context in (1, 257):
        with pytest.raises(TextError, match=rf"context is {context}; it must be from 2 to 256 tokens"):
            read_text("books-validation", micro, context=context)
    with pytest.raises(TextError, match="does not have the token"):
        read_text("books-validation", micro, prefix="<|nothing|>")


def test_a_block_is_at_most_1024_tokens_unless_asked_for(micro, monkeypatch):
    monkeypatch.setattr(micro.cfg, "n_ctx", 131_072)
    assert read_text("books-validation", micro, 2048).tokens.shape == (2, 1024)
    assert read_text("books-validation", micro, 2048, context=2048).tokens.shape == (1, 2048)


def test_a_hub_data_set_is_read_no_farther_than_is_needed(micro, monkeypatch):
    books, read = read_documents("books-validation"), []

    def load_dataset(name, subset, *, split, streaming, revision):
        assert (name, streaming) == ("somebody/books", True)
        return datasets.IterableDataset.from_generator(lambda: ({"text": read.append(i) or t} for i, t in books))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sample = read_text("somebody/books", micro, 1024)
    first = load_blocks(Text("books-validation"), micro.tokenizer, 256, 4096, most=4)
    assert sample.tokens.tolist() == first.blocks.tolist()
    assert max(read) < 3
    assert "its first 1,024 tokens" in sample.description


def read_documents(name: str) -> list[tuple[int, str]]:
    with lzma.open(resolve_text(name), "rt") as file:
        return [(i, json.loads(line)["text"]) for i, line in enumerate(file)]


def test_a_model_without_a_tokenizer_is_refused(make_gpt2):
    with pytest.raises(TextError, match="no tokenizer"):
        read_text("books-validation", load_bridge(make_gpt2()))


def test_documents_in_memory_and_a_home_directory(micro, tmp_path, monkeypatch):
    documents = [f"Document {i} is about {i} things, and ends here." for i in range(200)]
    data = datasets.Dataset.from_dict({"text": documents})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = read_text("~/a.jsonl", micro, 512)
    for given in (documents, iter(documents), data):
        sample = read_text(given, micro, 512)
        assert sample.tokens.equal(expected.tokens)
        assert sample.description == expected.description.replace("~/a.jsonl", "text in memory")
    with pytest.raises(TextError, match="is empty"):
        read_text([], micro)
