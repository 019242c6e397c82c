"""Which column is the text, and what other columns may do."""

import json

import datasets
import pytest

from finetune.recipe import Text
from finetune.text import TextError, files, load_blocks, load_text

LINES = [f"Chapter {i}. It was the best of times, it was the worst of times." for i in range(120)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


WRITERS = {"a.jsonl": jsonl, "a.parquet": parquet, "a": saved}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_the_lone_column_of_strings_is_said(name, streaming, tmp_path, tokenizer, capsys):
    rows = [{"number": 1, "content": line, "tags": ["a", "b"], "meta": {"site": "x"}} for line in LINES]
    source = WRITERS[name](tmp_path / name, rows)
    load_text(Text(source, streaming=streaming, held_out_blocks=2), tokenizer, 16, 4096)
    assert "reading the text from column 'content', which begins 'Chapter 0. It was" in capsys.readouterr().out
    load_text(Text(source, column="content", streaming=streaming, held_out_blocks=2), tokenizer, 16, 4096)
    assert "reading the text" not in capsys.readouterr().out


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("row", "doubt"),
    [
        (lambda line: {"id": "doc", "messages": [{"role": "user", "content": line}]}, "'messages', which is nested"),
        (lambda line: {"name": "x", "translation": {"en": line, "fr": line}}, "'translation', which is nested"),
        (lambda line: {"title": line, "paragraphs": [line, line]}, "'paragraphs', which is nested"),
        (lambda line: {"prompt": line * 9, "answers": [{"text": line}]}, "'answers', which is nested"),
        (lambda line: {"doc_id": line.replace(" ", ""), "n": 1}, "its name suggests"),
        (lambda line: {"url": line, "n": 1}, "its name suggests"),
        (lambda line: {"page": f"https://example.org/{len(line)}", "n": 1}, "it contains URLs"),
    ],
)
def test_a_lone_column_that_may_not_be_the_text(name, row, doubt, tmp_path, tokenizer):
    rows = [row(line) for line in LINES]
    source = WRITERS[name](tmp_path / name, rows)
    column = next(key for key, value in rows[0].items() if isinstance(value, str))
    for streaming in (False, True):
        with pytest.raises(TextError, match=rf"is '{column}' the text\?.*{doubt}.*text\.column"):
            load_text(Text(source, streaming=streaming), tokenizer, 16, 4096)
    load_blocks(Text(source, column=column), tokenizer, 16, 4096)  # who says so means it


def test_long_values_are_text_whatever_they_are_called(tmp_path, tokenizer):
    source = jsonl(tmp_path / "a.jsonl", [{"source": line * 5} for line in LINES])
    assert len(load_blocks(Text(source), tokenizer, 16, 4096))


def test_a_file_that_is_one_object(tmp_path, tokenizer):
    for indent in (None, 2):
        content = {"version": "release 1.0 " * 400, "data": [{"text": line} for line in LINES]}
        (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
        with pytest.raises(TextError, match=r"is 'version' the text\?.*'data', which is nested"):
            load_text(Text(str(tmp_path / "a.json")), tokenizer, 16, 4096)


CHANGES = {
    "null, then string": lambda i: {"meta": None if i < 70 else "x"},
    "number, then string": lambda i: {"id": i if i < 70 else f"a{i}"},
    "appears": lambda i: {} if i < 70 else {"extra": "z"},
    "goes": lambda i: {"extra": "z"} if i < 70 else {},
    "object, then list": lambda i: {"meta": {"a": i} if i % 2 else [i]},
    "fields of an object change": lambda i: {"meta": {f"key{i}": i}},
    "huge numbers": lambda i: {"n": 10**30 + i},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_do_anything(change, streaming, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("finetune.text.columns._SAMPLE", 10)
    rows = [{"text": line, **CHANGES[change](i)} for i, line in enumerate(LINES)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    for column in (None, "text"):
        text = Text(source, column=column, streaming=streaming, held_out_blocks=3, held_out_fraction=0.2)
        assert len(load_text(text, tokenizer, 16, 4096).held_out) == 3


@pytest.mark.parametrize("write", [jsonl, parquet])
def test_other_columns_may_differ_from_file_to_file(write, tmp_path, tokenizer):
    folder = tmp_path / "folder"
    folder.mkdir()
    ending = write.__name__
    write(folder / f"a.{ending}", [{"text": line, "url": "x"} for line in LINES])
    write(folder / f"b.{ending}", [{"source": {"y": 1}, "text": line.upper()} for line in LINES])
    for streaming in (False, True):
        blocks = load_blocks(Text(str(folder), streaming=streaming), tokenizer, 16, 4096, most=400)
        said = tokenizer.decode(blocks.blocks.ravel())
        assert "Chapter 119" in said
        assert "CHAPTER 3." in said
    write(folder / f"c.{ending}", [{"body": line} for line in LINES])
    with pytest.raises(TextError, match=rf"c\.{ending} has no.* column 'text'"):
        load_blocks(Text(str(folder)), tokenizer, 16, 4096)


def test_the_text_may_be_absent_or_null(tmp_path, tokenizer):
    rows = [
        {"text": line} if i % 3 == 0 else {"text": None} if i % 3 == 1 else {"n": i} for i, line in enumerate(LINES)
    ]
    for order in (rows, rows[1:]):
        blocks = load_blocks(Text(jsonl(tmp_path / "a.jsonl", order)), tokenizer, 16, 4096)
        said = tokenizer.decode(blocks.blocks.ravel())
        assert "Chapter 3." in said
        assert "Chapter 4." not in said


def test_a_text_that_comes_late_is_found(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("finetune.text.columns._SAMPLE", 10)
    rows = [{"n": i, "text": None} if i < 50 else {"text": line} for i, line in enumerate(LINES)]
    source = jsonl(tmp_path / "a.jsonl", rows)
    for column in (None, "text"):
        blocks = load_blocks(Text(source, column=column), tokenizer, 16, 4096)
        assert tokenizer.decode(blocks.blocks[0]).startswith("Chapter 50.")


def test_a_txt_has_no_columns(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(LINES))
    with pytest.raises(TextError, match=r"a \.txt file does not have columns"):
        load_text(Text(str(tmp_path / "a.txt"), column="body"), tokenizer, 16, 4096)
    assert files.format_of(tmp_path / "a.txt") == "text"
