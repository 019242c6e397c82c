"""Model cards are Markdown with YAML before it: what comes from a recipe stays text in both."""

import dataclasses
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from markdown_it import MarkdownIt
from models import random_model

from finetune import recipe as recipes
from finetune.recipe import Text
from finetune.removal import model_card
from finetune.run_directory import render

HOSTILE = [
    "x\n---\ntags: [evil]\n---\n# Evil",
    "</script><img src=x onerror=alert(1)>",
    "`x` ![i](http://e) | [l](javascript:1) **b** ``",
    "a & b < c",
]


def rendered(card: str) -> tuple[dict, str]:
    """The fields of the front matter, and the rest as HTML."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), MarkdownIt("commonmark", {"html": True}).enable("table").render(body)


def assert_only_text(page: str) -> None:
    for element in ("<script", "<img", "<a ", "<strong>b", "<h1>Evil", "<hr"):
        assert element not in page


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", ["ln_free", "control"])
def test_removal(name, hostile, tmp_path):
    recipe = dataclasses.replace(
        recipes.load("micro"), model=f"hub/{hostile}", revision=hostile, text=Text(hostile, prefix=hostile)
    )
    setup = SimpleNamespace(recipe=recipe, model=random_model(), text=SimpleNamespace(train=SimpleNamespace(context=8)))
    numbers = dict.fromkeys(("loss", "loss_error", "loss_max", "gap", "gap_error", "kl", "jsd"), 1.0)
    rows = [{"text": text, "model": name, "documents": 2, "tokens": 9, **numbers} for text in ("held-out", hostile)]
    fields, page = rendered(model_card(setup, tmp_path, name, pd.DataFrame(rows), []))
    assert fields["base_model"] == f"hub/{hostile}"
    assert "evil" not in fields["tags"]
    assert_only_text(page)
    assert page.count("<table>") == 2 if name == "ln_free" else 1
    if hostile == "a & b < c":
        assert "<h1>a &amp; b &lt; c without LayerNorm" in page or name == "control"
        assert "<code>a &amp; b &lt; c</code>" in page


@pytest.mark.parametrize("hostile", HOSTILE)
def test_pretraining(hostile):
    recipe = SimpleNamespace(
        **dataclasses.asdict(recipes.load_pretraining("op"))
        | {"name": hostile, "block": hostile, "knobs": {hostile: hostile}, "tokenizer": hostile, "horizon": 9}
        | {"text": Text(hostile)}
    )
    numbers = {"parameters": 9, "loss": 1.0, "loss_error": 0.1, "documents": 2, "tokens": 9, "trained_tokens": 9}
    card = render(
        "pretrain_card.md.jinja",
        recipe=recipe,
        config=random_model().config,
        results=SimpleNamespace(**numbers),
        is_plain=False,
    )
    fields, page = rendered(card)
    assert fields["tags"] == ["gpt2", "interpretability"]
    assert_only_text(page)
