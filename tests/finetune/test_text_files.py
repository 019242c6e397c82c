"""Local files as people have them: held-out ones beside others, byte order marks, huge, empty, or meant to harm."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest

from finetune.errors import NolnError
from finetune.recipe import Text
from finetune.text import TextError, files, load_blocks, load_text, packing, tokenise

DOCUMENTS = [f"Document {i} tells of {i * 37} things.\n\n" + "It goes on. " * (5 + i % 7) for i in range(60)]
HELD_OUT = [f"Apart {i}: nothing of this may be learnt, by no means." for i in range(40)]


def jsonl(path, documents, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": document, **columns}) + "\n" for document in documents))


def parquet(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"text": documents}).to_parquet(path)


def txt(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(documents))


def said(blocks, tokenizer, count=100):
    return tokenizer.decode([token for block in islice(blocks, count) for token in block["input_ids"].tolist()])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("train", "held_out", "write"),
    [
        ("train.jsonl", "validation.jsonl", jsonl),
        ("train.txt", "test.txt", txt),
        ("train-00000-of-00001.parquet", "validation-00000-of-00001.parquet", parquet),
        ("train/part.jsonl", "valid/part.jsonl", jsonl),
        ("data/books_train.jsonl", "data/books_dev.jsonl", jsonl),
        ("novels.jsonl", "val.jsonl", jsonl),
        ("Training/0.jsonl", "Test/0.jsonl", jsonl),
        ("train_1.jsonl", "eval.jsonl", jsonl),
    ],
)
def test_files_that_are_held_out_by_name(train, held_out, write, streaming, tmp_path, tokenizer, capsys):
    write(tmp_path / train, DOCUMENTS)
    write(tmp_path / held_out, HELD_OUT)
    splits = load_text(Text(str(tmp_path), streaming=streaming), tokenizer, 16, 4096)
    assert "Apart" not in said(splits.train, tokenizer)
    assert "Document" in said(splits.train, tokenizer)
    assert "Apart" in said(splits.held_out, tokenizer)
    assert "Document" not in said(splits.held_out, tokenizer)
    assert f"training on {Path(train).name}; holding out {Path(held_out).name}" in capsys.readouterr().out
    assert "Document" not in said(load_blocks(Text(str(tmp_path)), tokenizer, 16, 4096), tokenizer)


def test_neither_validation_nor_test_nor_what_may_hold_both_is_trained_on(tmp_path, tokenizer, capsys):
    jsonl(tmp_path / "train.jsonl", DOCUMENTS)
    jsonl(tmp_path / "validation.jsonl", HELD_OUT)
    jsonl(tmp_path / "test.jsonl", ["Tested. " * 50])
    jsonl(tmp_path / "all.jsonl", [*DOCUMENTS, *HELD_OUT, "Tested. " * 50])
    splits = load_text(Text(str(tmp_path)), tokenizer, 16, 4096)
    for blocks, documents in ((splits.train, DOCUMENTS), (splits.held_out, HELD_OUT)):
        assert set(said(blocks, tokenizer, 999).split("<|endoftext|>")[:-1]) <= set(documents)
    assert "ignoring all.jsonl, test.jsonl" in capsys.readouterr().out
    # What the user holds out goes before.
    text = Text(str(tmp_path), held_out=str(tmp_path / "test.jsonl"))
    assert "Tested" in said(load_text(text, tokenizer, 16, 4096).held_out, tokenizer)
    with pytest.raises(TextError, match="share files"):
        load_text(Text(str(tmp_path), held_out=str(tmp_path / "train.jsonl")), tokenizer, 16, 4096)
    for name in ("train.jsonl", "all.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(TextError, match=r"validation and test files, but no training files"):
        load_text(Text(str(tmp_path)), tokenizer, 16, 4096)
    (tmp_path / "test.jsonl").unlink()
    jsonl(tmp_path / "validation-2.jsonl", HELD_OUT)
    assert len(load_text(Text(str(tmp_path)), tokenizer, 16, 4096).train)  # who names nothing else means it


def test_names_that_only_begin_alike_hold_nothing_out(tmp_path, tokenizer):
    for name in ("test-driven-development", "trains", "valentine", "evaluation-of-wines", "latest"):
        txt(tmp_path / f"{name}.txt", DOCUMENTS[:30])
    assert files.split(files.find(tmp_path), tmp_path, "x") is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_byte_order_mark_is_not_text(encoding, pack, tmp_path, tokenizer):
    ending = {gzip.compress: ".gz", bz2.compress: ".bz2", lzma.compress: ".xz"}.get(pack, "")
    contents = {
        "a.txt": "\n".join(DOCUMENTS),
        "a.jsonl": "".join(json.dumps({"text": f"\ufeff{d}"}, ensure_ascii=False) + "\n" for d in DOCUMENTS),
        "a.json": json.dumps([{"text": d} for d in DOCUMENTS], indent=1),
    }
    for name, content in contents.items():
        content = "\ufeff" + content if encoding == "utf-16-be" else content
        (tmp_path / (name + ending)).write_bytes(pack(content.encode(encoding)))
        for streaming in (False, True):
            blocks = load_blocks(
                Text(str(tmp_path / (name + ending)), streaming=streaming), tokenizer, 16, 4096, most=9
            )
            assert said(blocks, tokenizer).startswith("Document 0 tells of 0 things.\n\nIt goes on.")


def test_a_home_directory(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "texts/a.jsonl", DOCUMENTS)
    jsonl(tmp_path / "b.jsonl", HELD_OUT)
    text = Text("~/texts", held_out="~/b.jsonl")
    assert "Apart" in said(load_text(text, tokenizer, 16, 4096).held_out, tokenizer)
    np.arange(300, dtype=np.uint16).tofile(tmp_path / "train.bin")
    assert len(load_blocks(Text("~/train.bin"), tokenizer, 16, 4096))
    with pytest.raises(TextError, match="share files"):
        load_text(Text("~/texts", held_out=str(tmp_path / "texts/a.jsonl")), tokenizer, 16, 4096)
    with pytest.raises(NolnError, match=r"~nobody-here/a.jsonl: the home directory"):
        load_text(Text("~nobody-here/a.jsonl"), tokenizer, 16, 4096)


_MEASURE = """
import resource, sys
from finetune import checkpoint
from finetune.recipe import Text
from finetune.text import load_text
from itertools import islice
tokenizer = checkpoint.load_tokenizer("micro")
text = Text(sys.argv[1], streaming=sys.argv[2] == "stream", held_out_blocks=4)
list(islice(load_text(text, tokenizer, 64, 4096).train, 50))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_long_txt_takes_no_more_memory_than_a_short_one(tmp_path):
    """What a stream reads before its first block, and all of what is tokenised once."""
    peaks = {}
    for megabytes, how in ((4, "once"), (12, "once"), (4, "stream"), (120, "stream")):
        with (tmp_path / "a.txt").open("w") as file:
            file.writelines(
                f"It was the best of times number {i}, it was the worst.\n" for i in range(megabytes * 18_000)
            )
        command = [sys.executable, "-c", _MEASURE, tmp_path / "a.txt", how]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / f"{how}-{megabytes}")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[how, megabytes] = int(done.stdout.split()[-1]) // 2**10
    assert peaks["once", 12] < peaks["once", 4] + 60
    assert peaks["stream", 120] < peaks["stream", 4] + 160  # the buffer that shuffles holds 80 MB of passages


def test_a_txt_in_parts_has_the_tokens_of_the_whole(tmp_path, tokenizer, monkeypatch):
    text = "".join(
        f"word{'!' * (i % 3)}{(' ', chr(10), chr(10) * 2, '  ', chr(13) + chr(10))[i % 5]}" for i in range(999)
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(("a" * 5000 + " and" * 3000).encode())  # with no line break
    whole = {name: load_blocks(Text(str(tmp_path / name)), tokenizer, 8, 4096) for name in ("a.txt", "b.txt")}
    monkeypatch.setattr(files, "PART_CHARACTERS", 6000)
    for i, name in enumerate(whole):
        os.utime(tmp_path / name, (i, i))  # it is tokenised anew
        again = load_blocks(Text(str(tmp_path / name)), tokenizer, 8, 4096)
        assert (again.blocks == whole[name].blocks).all()
        assert again.document_ids().max() == 0


def test_a_single_txt_is_streamed_in_passages(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "PASSAGE_CHARACTERS", 400)
    lines = [f"Line {i} of them all." for i in range(400)]
    for name, opener in (("a.txt", open), ("a.txt.xz", lzma.open)):
        with opener(tmp_path / name, "wt") as file:
            file.write("\n".join(lines))
        splits = load_text(Text(str(tmp_path / name), streaming=True, held_out_blocks=20), tokenizer, 16, 4096, seed=1)
        held_out = said(splits.held_out, tokenizer, 999)
        assert held_out.startswith("Line 0 of them all.\nLine 1 of")
        read = said(splits.train, tokenizer, 2000)
        assert not set(held_out.split("\n")[:-1]) & set(read.replace("<|endoftext|>", "\n").split("\n"))
        assert all(f"\n{line}\n" in read.replace("<|endoftext|>", "\n") for line in lines[200:])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
        ("a.json", b"[]"),
        ("a.txt", b""),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.txt.xz", lzma.compress(b"")),
        ("a.bin", b""),
    ],
)
def test_empty_files(name, content, streaming, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=f"{name} is empty"):
        load_text(Text(str(tmp_path / name), streaming=streaming), tokenizer, 16, 4096)


def test_empty_parquet_and_directories(tmp_path, tokenizer):
    parquet(tmp_path / "a.parquet", [])
    (tmp_path / "folder/a.jsonl").mkdir(parents=True)
    (tmp_path / "zero.parquet").write_bytes(b"")
    for name, match in (("a.parquet", "is empty"), ("zero.parquet", "is empty"), ("folder", "unknown format")):
        with pytest.raises(TextError, match=f"{name}.*{match}"):
            load_text(Text(str(tmp_path / name)), tokenizer, 16, 4096)


@pytest.mark.parametrize("count", [1, 3])
def test_a_small_stream_is_refused_at_once(count, tmp_path, tokenizer):
    """A stream of fewer documents than are to be held out."""
    start = time.perf_counter()
    for write, name in ((jsonl, "a.jsonl"), (parquet, "a.parquet"), (txt, "a.txt")):
        write(tmp_path / name, DOCUMENTS[:count])
        with pytest.raises(TextError, match="0 tokens to train on"):
            load_text(Text(str(tmp_path / name), streaming=True), tokenizer, 16, 4096)
    assert time.perf_counter() - start < 20


def test_a_small_stream_is_read_once_before_its_first_block(tmp_path, tokenizer, monkeypatch):
    """And not as often as would fill a batch of the tokenizer."""
    read = []
    documents_of = packing.documents_of
    monkeypatch.setattr(packing, "documents_of", lambda *source: read.append(source) or documents_of(*source))
    for write, name in ((jsonl, "a.jsonl"), (parquet, "a.parquet"), (txt, "a.txt")):
        write(tmp_path / name, DOCUMENTS[:4] if write != txt else DOCUMENTS)
        monkeypatch.setattr(files, "PASSAGE_CHARACTERS", 200)
        stream = load_text(Text(str(tmp_path / name), streaming=True, held_out_blocks=1), tokenizer, 16, 4096).train
        read.clear()
        assert next(iter(stream))["input_ids"].shape == (16,)
        assert len(read) == 1


@pytest.mark.parametrize("pack", [gzip, bz2, lzma])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json"])
def test_a_bomb_is_refused_in_bounded_memory(pack, kind, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "_HARMLESS", 1 << 20)
    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(files, "CHUNK_CHARACTERS", 1 << 16)
    monkeypatch.setattr(files, "PART_CHARACTERS", 1 << 16)
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 1 << 16)
    path = tmp_path / f"a.{kind}.{ {gzip: 'gz', bz2: 'bz2', lzma: 'xz'}[pack] }"
    with pack.open(path, "wb") as file:
        file.write(b'[{"text": "' if kind == "json" else b'{"text": "')
        for _ in range(16):
            file.write(b"a" * 2**20)
    tracemalloc.start()
    with pytest.raises(TextError, match=r"expands to more than 200 times its size|is longer than 1,048,576"):
        load_text(Text(str(path)), tokenizer, 16, 4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_a_line_without_an_end(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "a" * 2000)
    with pytest.raises(TextError, match="line 1 is longer than 1,000 characters"):
        load_text(Text(str(tmp_path / "a.jsonl")), tokenizer, 16, 4096)


def test_links(tmp_path, tokenizer):
    """Loops of links end, links to files and directories are followed, and nothing is read twice."""
    jsonl(tmp_path / "text/a.jsonl", DOCUMENTS[:30])
    jsonl(tmp_path / "elsewhere/deep/b.jsonl", DOCUMENTS[30:])
    jsonl(tmp_path / "blob", DOCUMENTS[:1])
    (tmp_path / "text/loop").symlink_to(tmp_path / "text")
    (tmp_path / "text/self.jsonl").symlink_to("self.jsonl")
    (tmp_path / "text/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path)
    (tmp_path / "text/c.jsonl").symlink_to(tmp_path / "blob")
    (tmp_path / "text/gone.jsonl").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "text/pipe.jsonl")  # would be waited for
    found = [os.path.realpath(file) for file in files.find(tmp_path / "text")]
    assert sorted(found) == sorted(str(tmp_path / name) for name in ("text/a.jsonl", "elsewhere/deep/b.jsonl", "blob"))
    assert len(load_text(Text(str(tmp_path / "text")), tokenizer, 16, 4096).train)
    (tmp_path / "one").symlink_to(tmp_path / "one")
    with pytest.raises(TextError, match="no such file"):
        load_text(Text(str(tmp_path / "one"), held_out=str(tmp_path / "text/a.jsonl")), tokenizer, 16, 4096)


def test_what_is_no_json(tmp_path, tokenizer):
    for content, match in (
        ('{"text": "a"}\n[1, 2]\n', "line 2 is 1, not an object"),
        ('{"text": "a"}\n7\n', "line 2 is 7, not an object"),
        ('{"text": "a"}\n{"text": 7}\n', "row 2: its text is 7, which is not a string"),
        ("[" * 100_000, "cannot be read"),
        ('{"text": "a"}\n' + "[" * 100_000, "line 2 cannot be read"),
        ('{"text": "a"}\nnot json\n', "line 2 cannot be read"),
        ("\x00\x01", "zeros between its bytes"),
    ):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(TextError, match=match):
            load_text(Text(str(tmp_path / "a.jsonl")), tokenizer, 16, 4096)


def test_forms_of_json(tmp_path, tokenizer):
    """A string a line, a list over several lines, halves of characters, blank lines."""
    for content in (
        "".join(json.dumps(document) + "\n" for document in DOCUMENTS),
        json.dumps(DOCUMENTS, indent=2),
        json.dumps([{"text": document} for document in DOCUMENTS], indent=4),
        "".join("\n\r\n" + json.dumps({"text": document}) for document in DOCUMENTS),
    ):
        (tmp_path / "a.json").write_text(content)
        blocks = load_blocks(Text(str(tmp_path / "a.json")), tokenizer, 16, 4096)
        assert set(said(blocks, tokenizer, 999).split("<|endoftext|>")[:-1]) <= set(DOCUMENTS)
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 of a character, whole \\ud83d\\ude00"}\n' * 20)
    assert "half \ufffd of a character, whole 😀" in said(
        load_blocks(Text(str(tmp_path / "a.jsonl")), tokenizer, 16, 4096), tokenizer
    )
