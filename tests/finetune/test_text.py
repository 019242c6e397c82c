import gzip
import json
import lzma
import multiprocessing
import threading
import time
from array import array
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune.bundled import MODELS, resolve_text
from finetune.recipe import Text
from finetune.text import (
    Blocks,
    ReadAhead,
    StreamedBlocks,
    TextError,
    load_blocks,
    load_text,
    packing,
    sources,
    tokenise,
)

VOCAB = 4096
EOT = 0
DOCUMENTS = [f"Document {i} tells of {i * 37} things.\n\n" + "It goes on. " * (5 + i % 7) for i in range(60)]


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache/downloads")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODELS["micro"])


@pytest.fixture(scope="module")
def tokenizer_without_eot():
    fast = PreTrainedTokenizerFast(tokenizer_file=f"{MODELS['micro']}/tokenizer.json")
    assert fast.eos_token_id is None
    return fast


def encode(tokenizer, document):
    return tokenizer.backend_tokenizer.encode(document, add_special_tokens=False).ids


def join(tokenizer, documents):
    return [token for document in documents for token in [*encode(tokenizer, document), EOT]]


def flat(blocks):
    return [token for block in blocks for token in block["input_ids"].tolist()]


def write_jsonl(path, documents=DOCUMENTS, opener=open, **columns):
    with opener(path, "wt") as file:
        for i, document in enumerate(documents):
            file.write(json.dumps({"number": i, "text": document, **columns}) + "\n")
    return str(path)


def held_out_numbers(n, fraction):
    """By the definition in exact arithmetic, for a fraction of 1 / an integer."""
    every = round(1 / fraction)
    return [i for i in range(n) if (i + 1) % every == 0]


def test_packing_by_hand(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl")
    splits = load_text(Text(source=source, held_out_fraction=0.05), tokenizer, 16, VOCAB)
    chosen = held_out_numbers(60, 0.05)
    assert chosen == [19, 39, 59]
    held_out = join(tokenizer, [DOCUMENTS[i] for i in chosen])
    train = join(tokenizer, [document for i, document in enumerate(DOCUMENTS) if i not in chosen])
    assert len(train) % 16  # so that there is a tail to drop
    assert flat(splits.train) == train[: len(train) // 16 * 16]
    assert flat(splits.held_out) == held_out[: len(held_out) // 16 * 16]
    block = splits.train[3]["input_ids"]
    assert block.dtype == torch.int64
    assert block.tolist() == train[48:64]
    with pytest.raises(IndexError):
        splits.train[len(splits.train)]

    document, expected = 0, []
    for token in held_out:
        expected.append(document)
        document += token == EOT
    ids = splits.held_out.document_ids()
    assert ids.shape == (len(splits.held_out), 16)
    assert ids.ravel().tolist() == expected[: ids.size]


def test_blocks_are_a_view_of_the_tokens():
    tokens = np.arange(100, dtype=np.uint16)
    assert np.shares_memory(Blocks(tokens, 16).blocks, tokens)


def test_a_few_blocks_to_train_on_are_spread_through_the_source(tmp_path, tokenizer):
    source = str(tmp_path / "text.txt")
    Path(source).write_text("\n".join(f"{i} bottles of beer on the wall" for i in range(200)))
    whole = load_text(Text(source=source, held_out_fraction=0.1), tokenizer, 16, VOCAB).train.blocks
    few = load_text(Text(source=source, held_out_fraction=0.1, train_blocks=5), tokenizer, 16, VOCAB).train.blocks
    rows = [next(i for i, block in enumerate(whole) if (block == row).all()) for row in few]
    assert rows[0] == 0
    assert rows[-1] == len(whole) - 1
    assert np.ptp(np.diff(rows)) <= 1
    many = load_text(Text(source=source, held_out_fraction=0.1, train_blocks=9999), tokenizer, 16, VOCAB).train
    np.testing.assert_array_equal(many.blocks, whole)


def test_held_out_blocks_are_the_first(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl")
    few, all_ = (
        load_text(Text(source=source, held_out_fraction=0.5, held_out_blocks=n), tokenizer, 16, VOCAB) for n in (3, 999)
    )
    assert len(few.held_out) == 3 < len(all_.held_out)
    assert flat(few.held_out) == flat(all_.held_out)[:48]
    assert few.held_out.document_ids().shape == (3, 16)


def saved(path):
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(path)


def saved_dict(path):
    data = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict(train=data, other=data.select(range(3))).save_to_disk(path)


def directory_of_jsonl(path):
    (path / "sub").mkdir(parents=True)
    (path / ".hidden").mkdir()
    write_jsonl(path / "1.jsonl", DOCUMENTS[:25])
    write_jsonl(path / "sub/2.jsonl.gz", DOCUMENTS[25:], gzip.open)
    write_jsonl(path / ".hidden/3.jsonl", ["must not be read"])
    (path / "README.md").write_text("nor this")


def directory_of_txt(path):
    path.mkdir()
    for i, document in enumerate(DOCUMENTS):
        (path / f"{i:03}.txt").write_text(document)


SOURCES = {
    "a.jsonl": write_jsonl,
    "a [1] *.jsonl": write_jsonl,
    "a.jsonl.gz": lambda path: write_jsonl(path, opener=gzip.open),
    "a.jsonl.xz": lambda path: write_jsonl(path, opener=lzma.open),
    "a.json": lambda path: path.write_text(json.dumps([{"text": document} for document in DOCUMENTS])),
    "a.parquet": lambda path: datasets.Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path),
    "saved": saved,
    "saved_dict": saved_dict,
    "jsonl": directory_of_jsonl,
    "txt": directory_of_txt,
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_blocks(name, tmp_path, tokenizer):
    SOURCES[name](tmp_path / name)
    source = str(tmp_path / name)
    splits = load_text(Text(source=source, held_out_fraction=0.05), tokenizer, 16, VOCAB)
    chosen = held_out_numbers(60, 0.05)
    train = join(tokenizer, [document for i, document in enumerate(DOCUMENTS) if i not in chosen])
    assert flat(splits.train) == train[: len(train) // 16 * 16]

    stream = load_text(Text(source=source, held_out_blocks=1, streaming=True), tokenizer, 16, VOCAB)
    assert isinstance(stream.train, StreamedBlocks)
    assert flat(stream.held_out) == join(tokenizer, DOCUMENTS[:2])[:16]


def test_one_txt_holds_out_its_end(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    splits = load_text(Text(source=str(tmp_path / "a.txt"), held_out_fraction=0.1), tokenizer, 16, VOCAB)
    tokens = join(tokenizer, ["".join(DOCUMENTS)])
    cut = len(tokens) - int(len(tokens) * 0.1)
    assert flat(splits.train) == tokens[: cut // 16 * 16]
    assert flat(splits.held_out) == tokens[cut : cut + (len(tokens) - cut) // 16 * 16]
    assert not splits.held_out.document_ids().any()


def test_a_txt_too_short_for_its_fraction_holds_out_a_block(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS[:3]))
    splits = load_text(Text(source=str(tmp_path / "a.txt"), held_out_fraction=0.001), tokenizer, 16, VOCAB)
    assert flat(splits.held_out) == join(tokenizer, ["".join(DOCUMENTS[:3])])[-16:]


def test_no_end_of_text(tmp_path, tokenizer_without_eot):
    documents = [*DOCUMENTS[:20], "", *DOCUMENTS[20:]]  # an empty document is none
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    splits = load_text(Text(source=source, held_out_fraction=0.1), tokenizer_without_eot, 16, VOCAB)
    chosen = [encode(tokenizer_without_eot, DOCUMENTS[i]) for i in held_out_numbers(60, 0.1)]
    tokens = [token for document in chosen for token in document]
    ids = [i for i, document in enumerate(chosen) for _ in document]
    assert flat(splits.held_out) == tokens[: len(tokens) // 16 * 16]
    assert splits.held_out.document_ids().ravel().tolist() == ids[: len(tokens) // 16 * 16]

    stream = load_text(Text(source=source, streaming=True, held_out_blocks=9), tokenizer_without_eot, 16, VOCAB)
    ids = [i for i, document in enumerate(DOCUMENTS) for _ in encode(tokenizer_without_eot, document)]
    assert stream.held_out.document_ids().ravel().tolist() == ids[:144]


def test_document_ids_where_the_end_of_the_stream_is_held_out(tmp_path, tokenizer_without_eot):
    documents = ["".join(DOCUMENTS), *DOCUMENTS[:5]]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    splits = load_text(Text(source=source, held_out_fraction=0.05), tokenizer_without_eot, 16, VOCAB)
    lengths = [len(encode(tokenizer_without_eot, document)) for document in documents]
    held_out = int(sum(lengths) * 0.05)
    ids = np.repeat(np.arange(6), lengths)[-held_out:][: held_out // 16 * 16]
    assert ids[0] < ids[-1]
    assert splits.held_out.document_ids().ravel().tolist() == (ids - ids[0]).tolist()


def test_nothing_is_prepended(tmp_path):
    """Not even by a tokenizer that would."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS["micro"])
    template = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", EOT)])
    tokenizer.backend_tokenizer.post_processor = template
    assert tokenizer(DOCUMENTS[0])["input_ids"][0] == EOT
    splits = load_text(Text(source=write_jsonl(tmp_path / "a.jsonl"), held_out_fraction=0.5), tokenizer, 16, VOCAB)
    expected = join(tokenizer, DOCUMENTS[::2])
    assert flat(splits.train) == expected[: len(expected) // 16 * 16]


def test_a_second_source_is_held_out(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", DOCUMENTS[:50])
    held_out = write_jsonl(tmp_path / "b.jsonl", DOCUMENTS[50:])
    expected = join(tokenizer, DOCUMENTS[50:])
    for streaming in (False, True):
        text = Text(source=source, held_out=held_out, streaming=streaming)
        splits = load_text(text, tokenizer, 16, VOCAB)
        assert flat(splits.held_out) == expected[: len(expected) // 16 * 16]
        if not streaming:
            train = join(tokenizer, DOCUMENTS[:50])
            assert flat(splits.train) == train[: len(train) // 16 * 16]
    bins = tmp_path / "bins"
    bins.mkdir()
    np.array(expected, np.uint16).tofile(bins / "train.bin")
    for one, other in (
        (source, source),
        (source, str(tmp_path / "x/../a.jsonl")),
        (str(tmp_path), held_out),
        (source, str(tmp_path)),
        (str(bins), str(bins / "train.bin")),
        (str(bins), str(bins)),
    ):
        with pytest.raises(TextError, match="share files"):
            load_text(Text(source=one, held_out=other), tokenizer, 16, VOCAB)


def test_all_of_a_source_as_blocks(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    expected = [token for document in DOCUMENTS for token in [*tokenizer.encode(document), EOT]]
    for text in (Text(str(file)), Text(str(file), held_out="b.jsonl", held_out_blocks=1, streaming=True)):
        blocks = load_blocks(text, tokenizer, 16, VOCAB)
        assert blocks.blocks.ravel().tolist() == expected[: len(expected) // 16 * 16]
        assert blocks.document_ids()[-1, -1] == len(DOCUMENTS) - 1
        for streaming in (False, True):
            few = load_blocks(replace(text, streaming=streaming), tokenizer, 16, VOCAB, most=3)
            assert few.blocks.tolist() == blocks.blocks[:3].tolist()
            assert few.document_ids().tolist() == blocks.document_ids()[:3].tolist()
    np.array(expected, np.uint16).tofile(tmp_path / "train.bin")
    np.array(expected[::-1], np.uint16).tofile(tmp_path / "val.bin")
    blocks = load_blocks(Text(str(tmp_path / "train.bin")), tokenizer, 16, VOCAB)
    assert blocks.blocks.ravel().tolist() == expected[: blocks.blocks.size]
    (tmp_path / "a.jsonl").unlink()
    blocks = load_blocks(Text(str(tmp_path)), tokenizer, 16, VOCAB)
    assert blocks.blocks.ravel().tolist() == expected[::-1][: blocks.blocks.size]
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(
        TextError, match=r"short.txt has only \d tokens, fewer than a block of 16. Use more text or a shorter"
    ):
        load_blocks(Text(str(tmp_path / "short.txt")), tokenizer, 16, VOCAB)
    with pytest.raises(TextError, match="beyond the model's vocabulary"):
        load_blocks(Text(str(tmp_path)), tokenizer, 16, 5)


def test_bundled_text(tokenizer):
    splits = load_text(Text(source="shifted-peps"), tokenizer, 256, VOCAB)
    with lzma.open(resolve_text("shifted-peps"), "rt") as file:
        first = json.loads(next(file))["text"]
    assert flat(splits.train)[:500] == join(tokenizer, [first])[:500]


def test_long_documents_in_pieces_give_the_same_tokens(tmp_path, tokenizer, monkeypatch):
    text = "".join(f"word{'!' * (i % 3)}{(' ', chr(10), chr(10) * 2, chr(10) + ' ')[i % 4]}" for i in range(2000))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1000)
    counting = Counting(tokenizer)
    splits = load_text(Text(source=str(tmp_path / "a.txt"), held_out_fraction=0.1), counting, 8, VOCAB)
    assert counting.documents > 50
    tokens = join(tokenizer, [text])
    assert flat(splits.train) == tokens[: len(splits.train) * 8]


class Counting:
    """A tokenizer that counts the documents, or pieces of them, that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.documents = tokenizer, 0

    def __call__(self, documents, **options):
        self.documents += len(documents)
        return self.tokenizer(documents, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def test_cache(tmp_path, tokenizer):
    text = Text(source=write_jsonl(tmp_path / "a.jsonl"), held_out_fraction=0.1)
    counting = Counting(tokenizer)
    first = load_text(text, counting, 16, VOCAB)
    assert counting.documents == 60
    tokenizer("truncation is state of the tokenizer", truncation=True, max_length=2)
    again = load_text(text, counting, 32, VOCAB)
    assert counting.documents == 60
    assert flat(again.train) == flat(first.train)[: len(again.train) * 32]
    assert isinstance(again.train.blocks, np.memmap)
    assert again.train.blocks.dtype == np.uint16
    assert not again.train.blocks.flags.writeable

    write_jsonl(tmp_path / "a.jsonl", [document.replace("It", "So") for document in DOCUMENTS])  # of the same size
    changed = load_text(text, counting, 16, VOCAB)
    assert counting.documents == 120
    assert flat(changed.train) != flat(first.train)

    # Another tokenizer with the same vocabulary.
    other = AutoTokenizer.from_pretrained(MODELS["micro"])
    state = json.loads(other.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:100]
    other = PreTrainedTokenizerFast(
        tokenizer_object=type(other.backend_tokenizer).from_str(json.dumps(state)), eos_token="<|endoftext|>"
    )
    assert len(load_text(text, other, 16, VOCAB).train) > len(changed.train)


def test_interrupted_tokenising_leaves_nothing_behind(tmp_path, tokenizer):
    class Failing(Counting):
        def __call__(self, documents, **options):
            raise KeyboardInterrupt

    text = Text(source=write_jsonl(tmp_path / "a.jsonl"), held_out_fraction=0.1)
    with pytest.raises(KeyboardInterrupt):
        load_text(text, Failing(tokenizer), 16, VOCAB)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache/noln").iterdir())
    assert len(load_text(text, tokenizer, 16, VOCAB).train) > 0


def _load_in_process(source, cache, queue):
    datasets.config.HF_DATASETS_CACHE = cache

    class Slow(Counting):
        def __call__(self, documents, **options):
            time.sleep(0.5)  # so that the others come meanwhile
            return super().__call__(documents, **options)

    counting = Slow(AutoTokenizer.from_pretrained(MODELS["micro"]))
    splits = load_text(Text(source=source, held_out_fraction=0.1), counting, 16, VOCAB)
    queue.put((counting.documents, flat(splits.train)))


def test_processes_at_the_same_time_tokenise_once(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(source, tmp_path / "cache", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(documents for documents, _ in results) == [0, 0, 60]
    assert results[0][1] == results[1][1] == results[2][1]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_nanogpt(dtype, tmp_path, tokenizer):
    train, val = join(tokenizer, DOCUMENTS[:50]), join(tokenizer, DOCUMENTS[50:])
    np.array(train, dtype).tofile(tmp_path / "train.bin")
    np.array(val, dtype).tofile(tmp_path / "val.bin")
    vocab_size = VOCAB if dtype == "uint16" else 2**16 + 1
    splits = load_text(Text(source=str(tmp_path)), tokenizer, 16, vocab_size)
    assert flat(splits.train) == train[: len(train) // 16 * 16]
    assert flat(splits.held_out) == val[: len(val) // 16 * 16]
    assert splits.held_out.document_ids().max() == 9
    assert isinstance(splits.train.blocks, np.memmap)

    single = Text(source=str(tmp_path / "train.bin"), held_out_fraction=0.1, token_dtype=dtype)
    splits = load_text(single, tokenizer, 16, 2**16)
    cut = len(train) - int(len(train) * 0.1)
    assert flat(splits.train) == train[: cut // 16 * 16]
    assert flat(splits.held_out) == train[cut:][: (len(train) - cut) // 16 * 16]

    second = Text(source=str(tmp_path / "train.bin"), held_out=str(tmp_path), token_dtype=dtype)
    assert flat(load_text(second, tokenizer, 16, VOCAB).held_out) == val[: len(val) // 16 * 16]


def test_nanogpt_dtype(tmp_path, tokenizer):
    tokens = join(tokenizer, DOCUMENTS)
    np.array(tokens, np.uint32).tofile(tmp_path / "32.bin")
    with pytest.raises(TextError, match=r"every second number is 0.*token_dtype to uint32"):
        load_text(Text(source=str(tmp_path / "32.bin")), tokenizer, 16, VOCAB)
    np.array(tokens[: len(tokens) // 2 * 2], np.uint16).tofile(tmp_path / "16.bin")
    with pytest.raises(TextError, match=r"as in a file of uint16. Set text.token_dtype to uint16"):
        load_text(Text(source=str(tmp_path / "16.bin"), token_dtype="uint32"), tokenizer, 16, VOCAB)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(TextError, match=r"odd.bin.*uint16.*token_dtype"):
        load_text(Text(source=str(tmp_path / "odd.bin")), tokenizer, 16, VOCAB)


def test_columns(tmp_path, tokenizer):
    def load(column=None, **row):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        datasets.Dataset.from_list([row] * 50).to_parquet(path)
        return flat(load_text(Text(source=str(path), column=column), tokenizer, 16, VOCAB).train)

    long = DOCUMENTS[0]
    tokens = join(tokenizer, [long, long])
    assert load(text=long, other="b")[: len(tokens)] == tokens
    assert load(content=long, number=3)[: len(tokens)] == tokens
    assert load(column="a", a=long, text="b")[: len(tokens)] == tokens
    with pytest.raises(TextError, match=r"a \(string\), b \(string\), n \(int64\).*text\.column"):
        load(a=long, b="b", n=1)
    with pytest.raises(TextError, match=r"no column 'c'.*a \(string\)"):
        load(column="c", a=long)
    for wrong in (3, [long]):
        with pytest.raises(TextError, match=r"no column 'text' of strings.*text \((int64|list)\)"):
            load(text=wrong, other=long)


def test_bad_sources(tmp_path, tokenizer, monkeypatch):
    def fails(match, source, **options):
        for streaming in (False, True):
            with pytest.raises(TextError, match=match) as caught:
                load_text(Text(source=str(source), streaming=streaming, **options), tokenizer, 16, VOCAB)
            assert Path(source).name in str(caught.value)

    for missing in ("missing.jsonl", "missing.txt.gz", "missing.bin", "missing"):
        fails("no such file", tmp_path / missing)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # or else it tries for half a minute
    fails(r"not a local file or directory.*Hub.*cannot be read.*[Oo]ffline", "somebody/some-data-set")
    (tmp_path / "empty").mkdir()
    fails(r"unknown format.*\.jsonl", tmp_path / "empty")
    (tmp_path / "a.csv").write_text("text\nhello\n")
    fails(r"unknown format.*\.jsonl", tmp_path / "a.csv")
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    fails("cannot be read", tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl.xz").write_bytes(lzma.compress(b'{"text": "one"}\n' * 1000)[:-30])
    fails("cannot be read", tmp_path / "bad.jsonl.xz")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    fails("cannot be read", tmp_path / "bad.parquet")
    (tmp_path / "bad.txt").write_bytes(b"\xfa\xff\xfe" * 10)
    fails("cannot be read", tmp_path / "bad.txt")
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed/a.jsonl")
    (tmp_path / "mixed/b.txt").write_text("text")
    fails("several formats", tmp_path / "mixed")
    saved_dict(tmp_path / "saved")
    fails("no split 'test'.*train, other", tmp_path / "saved", split="test")


def test_too_short(tmp_path, tokenizer):
    tokens = len(join(tokenizer, DOCUMENTS[:1]))
    for streaming in (False, True):
        (tmp_path / "a.txt").write_text(DOCUMENTS[0])
        with pytest.raises(TextError, match=r"a\.txt.* tokens .*fewer than a block of 1,024"):
            load_text(Text(source=str(tmp_path / "a.txt"), streaming=streaming), tokenizer, 1024, VOCAB)
        source = write_jsonl(tmp_path / "a.jsonl")
        (tmp_path / "empty.txt").write_text("")
        text = Text(source=source, held_out=str(tmp_path / "a.txt"), streaming=streaming)
        with pytest.raises(
            TextError, match=rf"a\.txt has only {tokens} tokens to hold out, fewer than a block of 1,000"
        ):
            load_text(text, tokenizer, 1000, VOCAB)
        text = Text(source=str(tmp_path / "empty.txt"), held_out=source, streaming=streaming)
        with pytest.raises(TextError, match=r"empty\.txt is empty"):
            load_text(text, tokenizer, 16, VOCAB)
    for name in ("empty.jsonl", "empty.bin"):
        (tmp_path / name).write_text("")
        with pytest.raises(TextError, match=name):
            load_text(Text(source=str(tmp_path / name)), tokenizer, 16, VOCAB)
    with pytest.raises(TextError, match="to train on"):
        load_text(Text(source=source, streaming=True, held_out_blocks=10_000), tokenizer, 16, VOCAB)


def test_ids_beyond_the_vocabulary(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1000)
    documents = [*DOCUMENTS[:40], "zebra xylophone quartz", *DOCUMENTS[40:]]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    largest = max(join(tokenizer, documents))
    with pytest.raises(TextError, match=rf"id {largest} .* vocabulary of {largest}\."):
        load_text(Text(source=source), tokenizer, 16, largest)
    load_text(Text(source=source), tokenizer, 16, largest + 1)
    stream = load_text(Text(source=source, streaming=True, held_out_blocks=1), tokenizer, 16, largest)
    with pytest.raises(TextError, match="vocabulary"):
        list(islice(stream.train, 500))


def test_unwritable_cache(tmp_path, tokenizer):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/noln").write_text("a file where the directory should be")
    with pytest.raises(TextError, match=r"cannot be written to .*cache/noln"):
        load_text(Text(source=write_jsonl(tmp_path / "a.jsonl")), tokenizer, 16, VOCAB)


def stream_by_hand(tokenizer, source, held_out, seed, epochs):
    documents = []
    data = datasets.IterableDataset.from_generator(lambda: ({"text": document} for document in source))
    data = data.shuffle(seed=seed, buffer_size=10_000)
    for epoch in range(epochs):
        data.set_epoch(epoch)
        documents += [row["text"] for row in data if row["text"] not in held_out]
    return join(tokenizer, documents)


def test_streaming_by_hand(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1000)
    source = write_jsonl(tmp_path / "a.jsonl")
    text = Text(source=source, streaming=True, held_out_blocks=10)
    splits = load_text(text, tokenizer, 16, VOCAB, seed=3)

    tokens, n = [], 0
    while len(tokens) < 160:
        tokens += join(tokenizer, [DOCUMENTS[n]])
        n += 1
    assert flat(splits.held_out) == tokens[:160]
    assert splits.held_out.document_ids().max() == n - 1

    expected = stream_by_hand(tokenizer, DOCUMENTS, DOCUMENTS[:n], 3, epochs=3)
    epoch = len(expected) // 3
    blocks = 2 * epoch // 16 + 1  # into the third epoch
    seen = flat(islice(splits.train, blocks))
    assert seen == expected[: blocks * 16]
    assert seen[:epoch] != seen[epoch : 2 * epoch]  # epochs are shuffled anew

    assert flat(islice(splits.train, blocks)) == seen  # an iteration starts anew
    assert flat(islice(load_text(text, tokenizer, 16, VOCAB, seed=3).train, blocks)) == seen
    assert flat(islice(load_text(text, tokenizer, 16, VOCAB, seed=4).train, blocks)) != seen


def test_streaming_with_workers(tmp_path, tokenizer, monkeypatch):
    """Workers take files in turn, one may find none left, and what is held out stays out of all."""
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1000)
    (tmp_path / "a").mkdir()
    for files in ([DOCUMENTS], [DOCUMENTS[:30], DOCUMENTS[30:]]):
        for i, documents in enumerate(files):
            write_jsonl(tmp_path / f"a/{i}.jsonl", documents)
        text = Text(source=str(tmp_path / "a"), streaming=True, held_out_blocks=10)
        splits = load_text(text, tokenizer, 16, VOCAB)
        held_out = DOCUMENTS[: int(splits.held_out.document_ids().max()) + 1]
        # Blocks for two epochs: more than enough to see each document whole.
        n = 2 * len(join(tokenizer, DOCUMENTS)) // 16
        blocks = [block["input_ids"] for block in islice(DataLoader(splits.train, None, num_workers=2), n)]
        for i, documents in enumerate(files):
            tokens = torch.cat(blocks[i :: len(files)])
            seen = set(tokenizer.decode(tokens).split("<|endoftext|>")[:-1])
            assert seen == set(documents) - set(held_out)


class Numbers(torch.utils.data.IterableDataset):
    """Numbers, which notes the last that it was asked for, and fails after the fortieth."""

    def __iter__(self):
        for self.last in range(40):
            yield {"input_ids": torch.tensor([self.last])}
        raise TextError("no more")


def test_a_stream_is_read_ahead_in_its_order():
    """As far as it is told, while nobody asks; what goes wrong does so when its turn has come."""
    numbers = Numbers()
    ahead = iter(ReadAhead(numbers, size=4, chunks=3))
    assert next(ahead)["input_ids"] == 0
    until = time.monotonic() + 10
    while numbers.last < 15 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    assert numbers.last == 15  # the chunk that is being taken, and three more
    assert flat(islice(ahead, 39)) == list(range(1, 40))
    with pytest.raises(TextError, match="no more"):
        next(ahead)


def test_nobody_reads_on_when_a_stream_is_left(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "text.jsonl")
    stream = load_text(Text(str(source), streaming=True, held_out_blocks=2), tokenizer, 16, VOCAB).train
    before = threading.active_count()
    blocks = iter(ReadAhead(stream, size=4, chunks=3))
    assert flat(islice(blocks, 90)) == flat(islice(stream, 90))
    assert threading.active_count() == before + 1
    blocks.close()
    assert threading.active_count() == before


def test_streamed_data_set_without_features(tokenizer, monkeypatch):
    """A data set that does not say what its columns are is asked for its first row."""
    data = datasets.IterableDataset.from_generator(lambda: ({"text": document} for document in DOCUMENTS))
    assert data.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    splits = load_text(Text(source="somebody/data", streaming=True, held_out_blocks=10), tokenizer, 16, VOCAB)
    assert flat(splits.held_out) == join(tokenizer, DOCUMENTS)[:160]


def test_hub_data_set(tmp_path, tokenizer, monkeypatch):
    asked = []

    def load_dataset(name, subset, *, split, streaming, revision):
        asked.append((name, subset, split, streaming, revision))
        return datasets.Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = Text(source="somebody/data", subset="en", split="validation", revision="v2", held_out_fraction=0.1)
    splits = load_text(text, tokenizer, 16, VOCAB)
    assert asked == [("somebody/data", "en", "validation", False, "v2")]
    chosen = join(tokenizer, [DOCUMENTS[i] for i in held_out_numbers(60, 0.1)])
    assert flat(splits.held_out) == chosen[: len(chosen) // 16 * 16]


SCRIPT = "Dataset scripts are no longer supported, but found data.py"


def test_hub_data_set_that_is_a_script(tokenizer, monkeypatch):
    """The Hub's own conversion is read in its place, whose configurations are folders."""
    asked = []

    def load_dataset(*name_and_subset, revision, **options):
        asked.append((*name_and_subset, revision, options))
        if revision is None:
            raise RuntimeError(SCRIPT)
        return datasets.Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (source,) = sources.open_sources("somebody/data", Text("somebody/data", subset="en", streaming=True))
    assert [document for document, _ in source.passages()] == DOCUMENTS
    options = {"split": "train", "streaming": True}
    assert asked == [
        ("somebody/data", "en", None, options),
        ("somebody/data", "refs/convert/parquet", {"data_dir": "en"} | options),
    ]


@pytest.mark.parametrize(
    ("revision", "error", "said"),
    [
        (None, RuntimeError(SCRIPT), "is a loading script.*its revision refs/convert/parquet cannot be read: Runtime"),
        ("v2", RuntimeError(SCRIPT), "as a data set on the Hub it cannot be read: RuntimeError: Dataset scripts"),
        (None, RuntimeError("out of memory"), "as a data set on the Hub it cannot be read: RuntimeError: out of"),
    ],
)
def test_hub_data_set_that_cannot_be_read_says_what_was_tried(revision, error, said, monkeypatch):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TextError, match=f"somebody/data .*{said}"):
        sources.open_sources("somebody/data", Text("somebody/data", revision=revision))


@pytest.mark.parametrize("eot", [EOT, None])
def test_documents_of_some_blocks_are_those_of_all(eot: int | None, monkeypatch):
    """However the blocks are chunked."""
    monkeypatch.setattr(packing, "_CHUNK", 4)
    tokens = np.random.default_rng(0).integers(0, 5, 90).astype(np.uint16)
    blocks = Blocks(tokens, 3, eot, np.flatnonzero(tokens == EOT) + 1)
    number, expected = 0, []
    for token in tokens:
        expected.append(number)
        number += token == EOT
    assert blocks.document_ids().ravel().tolist() == expected
    rows = np.array([0, 3, 4, 17, 29])
    assert blocks.document_ids(rows).tolist() == blocks.document_ids()[rows].tolist()


def test_blocks_of_plain_arrays():
    blocks = Blocks(np.arange(11, dtype=np.uint16), 3, ends=np.array([2, 7, 11]))
    assert [block["input_ids"].tolist() for block in blocks] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert blocks.document_ids().tolist() == [[0, 0, 1], [1, 1, 1], [1, 2, 2]]
    blocks = Blocks(np.array(array("q", [5, 0, 7, 8, 0, 9])).astype(np.uint32), 3, eot=0)
    assert blocks.document_ids().tolist() == [[0, 0, 1], [1, 1, 2]]


def test_a_prefix_begins_every_block_and_takes_no_place_in_the_stream(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i}, which is short."}) + "\n" for i in range(60)))
    plain = load_text(Text(str(path), held_out_fraction=0.2), tokenizer, 7, 4096)
    prefixed = load_text(Text(str(path), held_out_fraction=0.2, prefix="bos"), tokenizer, 8, 4096)
    for part in ("train", "held_out"):
        without, behind = getattr(plain, part), getattr(prefixed, part)
        assert behind.context == 8
        assert len(behind) == len(without)
        for i in range(len(without)):
            ids = behind[i]["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert torch.equal(ids[1:], without[i]["input_ids"])
        documents = behind.document_ids()
        assert documents.shape == (len(behind), 8)
        assert (documents[:, 1:] == without.document_ids()).all()
        assert (documents[:, 0] == documents[:, 1]).all()
    streamed = load_text(Text(str(path), held_out_blocks=2, prefix="the", streaming=True), tokenizer, 8, 4096).train
    block = next(iter(streamed))["input_ids"]
    assert (block[0], len(block)) == (tokenizer.get_vocab()["the"], 8)
    blocks = load_blocks(Text(str(path), prefix="bos"), tokenizer, 8, 4096, most=3)
    assert (len(blocks), blocks[0]["input_ids"][0]) == (3, tokenizer.bos_token_id)
    with pytest.raises(TextError, match=r"text\.prefix is <s>, but the tokenizer does not have"):
        load_blocks(Text(str(path), prefix="<s>"), tokenizer, 8, 4096)


@pytest.mark.parametrize("kind", ["regex", "normaliser", "prefix space", "added line break", "slow"])
def test_documents_are_cut_only_where_the_tokenizer_is_sure_to_part_tokens(kind, tokenizer, monkeypatch):
    """Each of these tokenizers takes a line break together with what is before it, or may."""
    other = AutoTokenizer.from_pretrained(MODELS["micro"])
    backend = other.backend_tokenizer
    if kind == "regex":
        split = pre_tokenizers.Split(Regex(r"[^\r\n]+[\r\n]*|\s+"), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    elif kind == "normaliser":
        backend.normalizer = normalizers.NFC()
    elif kind == "prefix space":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "added line break":
        other.add_tokens([".\n"])
    else:
        monkeypatch.setattr(type(other), "is_fast", False)
    monkeypatch.setattr(tokenise, "PIECE_CHARACTERS", 10)
    document = "A sentence.\nAnother one.\nAnd a third.\n" * 5
    assert len(list(tokenise.Encoder(other, "a").encode([(document, True)]))) == 1
    if kind != "slow":
        assert len(list(tokenise.Encoder(tokenizer, "a").encode([(document, True)]))) > 1
