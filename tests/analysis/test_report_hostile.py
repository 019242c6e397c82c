"""Names and texts that look like HTML are text, on the page and in the figures, which plotly reads as HTML."""

import dataclasses
import html
import json
import re

import numpy as np
import pytest
import torch
from models import random_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from analysis import figures, load_trio, logit_attribution, loss, palette, patching, report
from analysis.prompts import Pair
from analysis.texts import Sample

TAGS = re.compile(r"<(?!br>|br/>|extra></extra>|/extra>)[a-zA-Z/!]")
"""What plotly would read as an element, but for what our own labels have."""


def strings(value):
    """Yield all strings in a figure's JSON, but for the names of its fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hostile", ["</script><img src=x onerror=alert(1)>", "<a href='javascript:1'>&lt;b&gt;", "<sup>"]
)
def test_hostile_names_tokens_and_pairs_are_only_text(hostile, tmp_path):
    vocabulary = {"<e>": 0} | {f"{hostile}{i}": i for i in range(1, 61)}
    made = Tokenizer(models.WordLevel(vocabulary, "<e>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<e>")
    shape = {"vocab_size": 61, "n_positions": 12}
    trio = load_trio(random_model(**shape), None, random_model(frozen=True, **shape), tokenizer)
    trio = {"original": trio["original"], hostile: trio["original"], "ln_free": trio["ln_free"]}
    sample = Sample(torch.randint(1, 61, (4, 12)), np.arange(48).reshape(4, 12) // 20, hostile)
    pairs = tmp_path / "pairs.json"
    pair = Pair(f"{hostile}1", f"{hostile}2", f"{hostile}3", f"{hostile}4")
    swapped = dataclasses.replace(pair, correct=pair.wrong, wrong=pair.correct)
    pairs.write_text(json.dumps([dataclasses.asdict(pair), dataclasses.asdict(swapped)]))
    names = dict.fromkeys(trio, hostile)
    page = report.write(trio, {hostile: sample, f"{hostile} too": sample}, tmp_path / "r", names=names, pairs=pairs)
    drawn = list(page.parent.glob("*.json"))
    assert len(drawn) >= 20
    for figure in drawn:
        found = [text for text in strings(json.loads(figure.read_text())) if TAGS.search(text)]
        assert not found, figure.name
    text = page.read_text()
    assert html.escape(hostile, quote=False).replace("'", "&#39;") in text
    written = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert hostile not in written
    own = {"a", "body", "br", "sup", "img"} & set(re.findall(r"<(\w+)", written))
    assert own <= {"a", "body"}


def test_a_figure_shows_what_its_frame_holds():
    frame = loss.pd.DataFrame(
        {"text": ["a<b>&", "a<b>&"], "model": ["original", "x<i>"], "loss": [1.0, 2.0], "loss_error": [0.1, 0.1]}
        | {name: [1.0, 2.0] for name in figures.TAIL}
    )
    before = frame.copy()
    figure = loss.plot(frame)
    assert figure.data[0].x[0] == "a&lt;b&gt;&amp;"
    assert {trace.name for trace in figure.data} == {"original", "x&lt;i&gt;"}
    assert palette.colour("x&lt;i&gt;") == palette.colour("x<i>")
    assert frame.equals(before)
    assert patching.plot_pairs.__name__ == "plot_pairs", "its name stands in the page's Python"
    assert logit_attribution.plot_prompt.__doc__
