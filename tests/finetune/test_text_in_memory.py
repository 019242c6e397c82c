"""Text that is given in Python."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pandas as pd
import pytest
from models import tiny_gpt2
from tokenizers import Tokenizer
from tokenizers.models import BPE

from finetune import recipe as recipes
from finetune.checkpoint import tokenizer_of
from finetune.errors import CheckpointError
from finetune.recipe import Text
from finetune.removal import remove_norms, set_up
from finetune.resuming import resume
from finetune.run_directory import recipe_of
from finetune.text import TextError
from finetune.text.in_memory import in_file, write_documents

LINES = [f"Chapter {i}. It was the best of times, it was the worst of times." for i in range(200)]

KINDS = {
    "list": lambda: LINES,
    "tuple": lambda: tuple(LINES),
    "iterator": lambda: (line for line in LINES),
    "rows": lambda: [{"n": i, "text": line} for i, line in enumerate(LINES)],
    "data set": lambda: datasets.Dataset.from_dict({"n": range(len(LINES)), "body": LINES}),
    "stream": lambda: datasets.IterableDataset.from_generator(lambda: ({"text": line} for line in LINES)),
    "column": lambda: datasets.Dataset.from_dict({"text": LINES})["text"],
    "series": lambda: pd.Series(LINES),
    "array": lambda: np.array(LINES),
    "with empty ones": lambda: [None, *LINES[:9], "", *LINES[9:]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_memory(kind, tmp_path):
    with in_file(KINDS[kind](), tmp_path / "run") as file:
        assert [json.loads(line) for line in file.read_text().splitlines()] == [{"text": line} for line in LINES]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "is empty"),
        (iter(["", None]), "is empty"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": LINES})), "DatasetDict of train. Pass one"),
        ({"text": LINES}, "dict of text. Pass one"),
        (pd.DataFrame({"text": LINES}), "is a DataFrame. Pass a list of strings, a column"),
        (b"bytes", "is a bytes"),
        (7, "is a int"),
        ([1, 2], "Document 0 of the text is not a string but a int"),
        ([*LINES, 3.5], "Document 200 of the text is not a string but a float"),
        (np.arange(9), "not a string but a int64"),
        ([{"id": "a", "messages": [{"content": line}]} for line in LINES], "'messages', which is nested"),
        ([{"a": "b", "c": "d"}], "which column is the text"),
        ([__file__.replace(".py", ".txt")], None),
    ],
)
def test_what_is_not_documents(documents, message, tmp_path):
    if message is None:  # looks like a file's name, and is none
        write_documents(documents, tmp_path / "a.jsonl")
        return
    with pytest.raises(TextError, match=message), in_file(documents, tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_names_of_files_are_not_documents(tmp_path):
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(TextError, match="list of file names"):
        write_documents([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], tmp_path / "c.jsonl")


@pytest.mark.slow
def test_a_run_on_text_in_memory_is_resumed_and_replayed(recipe, tiny, tmp_path, tokenizer):
    recipe = replace(recipe, control=False, text=Text("books-train", streaming=True, held_out_fraction=0.1))
    run = remove_norms(str(tiny), str(tiny), (line for line in LINES), recipe, tmp_path / "run")
    written = recipes.load(run.directory / "recipe.yaml")
    assert written.text.source == str(run.directory / "text.jsonl")
    assert (run.directory / "text.jsonl").read_text().count("\n") == len(LINES)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    moved = run.directory.rename(tmp_path / "moved")
    assert recipe_of(moved).text.source == str(moved / "text.jsonl")
    pd.testing.assert_frame_equal(resume(moved).results, run.results)
    assert len(set_up(replace(recipe_of(moved), model=str(tiny))).text.train)


def test_nothing_is_left_of_text_that_does_not_do(recipe, tmp_path):
    with pytest.raises(TextError, match=r"^the text in memory .* fewer than a block"):
        remove_norms(text=["Too short."], recipe=recipe, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_by_name(recipe, tiny, tokenizer, text, tmp_path):
    for name in (str(tiny), tiny, "micro", tokenizer):
        assert tokenizer_of(name).get_vocab() == tokenizer.get_vocab()
    for given, message in ((7, "is a int. Pass a name"), (Tokenizer(BPE()), r"tokenizer_object=\.\.\.\)")):
        with pytest.raises(CheckpointError, match=message):
            remove_norms(tiny_gpt2(), given, str(text), recipe, tmp_path / "other")
