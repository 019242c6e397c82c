"""Strong, weak and absent effects."""

import math

import pandas as pd
import pytest

from analysis import load_bridge, logit_attribution
from analysis.report import cards
from analysis.texts import read_text


@pytest.mark.parametrize(
    ("cost", "said"),
    [((0.07, 0.004), "worse"), ((0.005, 0.001), "Little"), ((0.01, 0.02), "chance"), ((-0.1, 0.01), "better")],
)
@pytest.mark.parametrize("baseline", ["original", "control"])
def test_loss(cost, said, baseline):
    other = {"original": "control", "control": "original"}[baseline]
    losses = {baseline: cards.Cost(*cost, 30), other: cards.Cost(-0.5, 0.1, 30)}
    card = cards.loss_here("books", baseline, losses)
    assert said in card.sentence
    assert f"the {baseline}" in card.sentence
    assert f"The difference from the {other}, which predicts it less well, is −0.500 ± 0.100" in card.sentence
    assert baseline in card.unit
    assert "OpenWebText" in card.published


@pytest.mark.parametrize(("documents", "differs"), [(1, False), (2, False), (3, False), (5, True), (50, True)])
def test_few_documents_tell_less(documents, differs):
    """2.9 standard errors are beyond the 97.5th percentile of t of 4 degrees of freedom, 2.78; not of 2, 4.30."""
    assert cards.Cost(0.029, 0.01, documents).differs_from() == differs
    assert cards.Cost(0.042, 0.008, documents).differs_from(cards.Cost(0.013, 0.006, 60)) == differs


@pytest.mark.parametrize(("of_control", "baseline"), [(-0.1, "control"), (0.1, "original")])
def test_loss_from_the_table(of_control, baseline):
    """Against whichever of the original and the control is better on the first text."""
    tokens = pd.DataFrame({"document": [0, 0, 1, 1], "loss": [1.0, 2.0, 3.0, 2.0]})
    frames = [
        tokens.assign(model=model, text=text, loss=tokens["loss"] + more)
        for text, scale in (("books", 1), ("peps", 2))
        for model, more in (("original", 0.0), ("control", of_control * scale), ("ln_free", 0.2 * scale))
    ]
    card, elsewhere = cards.make({("loss", "token"): pd.concat(frames)})
    cost = 0.2 - min(of_control, 0)
    assert card.number == f"+{cost:.3f} ± 0.000"
    assert card.unit.startswith(f"nats/token more loss than the {baseline}")
    assert f"less well, is +{0.2 - max(of_control, 0):.3f} ± 0.000." in card.sentence
    assert elsewhere.number == f"+{2 * cost:.3f} ± 0.000"
    assert elsewhere.sentence.startswith(f"It costs more on peps than on books: +{2 * cost:.3f} ± 0.000 against")
    alone = pd.concat([frames[0], frames[2]])
    card = cards.make({("loss", "token"): alone})[0]
    assert card.number == "+0.200 ± 0.000"
    assert "Without a control" in card.sentence


def test_loss_of_one_document_has_no_known_error():
    card = cards.loss_here("books", "original", {"original": cards.Cost(0.07, math.nan, 1)})
    assert card.number == "+0.070 ± unknown"
    assert "chance" in card.sentence


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ((0.2, 0.01, 9), "more on peps"),
        ((0.08, 0.01, 9), "chance"),
        ((0.01, 0.01, 9), "No more"),
        ((0.2, math.nan, 1), "chance"),
    ],
)
def test_loss_elsewhere(there, said):
    there, notes = cards.Cost(*there), cards.Cost(-0.1, 0.2, 9)
    card = cards.loss_elsewhere("control", {"books": cards.Cost(0.07, 0.01, 9), "peps": there, "notes": notes})
    assert said in card.sentence
    assert card.number == str(there)
    assert card.sentence.endswith("On other texts: notes −0.100 ± 0.200.")
    assert "The Pile" in card.published


def test_a_certain_difference_comes_before_one_that_is_only_larger():
    books, notes, peps = ((0.02, 0.001), (0.3, 0.2), (0.2, 0.01))
    texts = {"books": books, "notes": notes, "peps": peps}
    card = cards.loss_elsewhere("control", {name: cards.Cost(*cost, 30) for name, cost in texts.items()})
    assert "costs more on peps than on books" in card.sentence
    gains = {"books": cards.Cost(-0.1, 0.001, 30), "peps": cards.Cost(-0.02, 0.001, 30)}
    assert "gains less on peps" in cards.loss_elsewhere("original", gains).sentence


def test_other_text_says_the_jsd_too():
    loss = pd.DataFrame(
        [
            {"text": text, "model": model, "document": document, "loss": 3.0 + document + cost * (model == "ln_free")}
            for text, cost in (("books", 0.01), ("peps", 0.5), ("random-tokens", 0.1))
            for model in ("original", "ln_free")
            for document in range(3)
        ]
    )
    jsd = pd.DataFrame({"text": ["books", "peps", "random-tokens"], "model": "ln_free", "jsd": [0.005, 0.04, 0.03]})
    card = cards.make({("loss", "token"): loss, ("other_text", "text"): jsd})[1]
    assert card.question == "What does it cost on other text?"
    assert card.sentence.endswith(
        " (mean Jensen–Shannon divergence, JSD, nats/token): 0.0400 on peps, 0.0300 on random-tokens, 0.0050 on books."
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (1.2, 1.1, "Nothing: in both models"),
        (1.2, 8.0, "only in the LN-free model, where its residual vectors are up to 8.0 times"),
        (2.0, 1.0, "weakly"),
        (14, 1.2, "falls to 1.2"),
        (14, 13, "stays at"),
        (10, 5.1, "falls to 5.1"),
        (5, 40, "rises to 40.0"),
    ],
)
def test_position_0(before, after, said):
    """Each model where its own ratio is largest: the original before block 1, the LN-free model before block 0."""
    points = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    frame = pd.DataFrame(
        [
            {"model": model, "point": point, "token_class": token_class, "norm": norm}
            for model, ratio, factors in (("original", before, (0.5, 1.0)), ("ln_free", after, (1.0, 0.5)))
            for point, factor in zip(points, factors, strict=True)
            for token_class, norm in (("ordinary", 10.0), ("position 0", 10 * ratio * factor))
        ]
    )
    card = cards.make({("residual_norms", "point"): frame})[0]
    assert said in card.sentence
    assert ("before block 1" in card.sentence) == (before >= 1.5)
    assert ("before block 0" in card.sentence) == (max(before, after) >= 1.5)
    assert card.number == f"{before:.1f} → {after:.1f}"


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.01, 0.02, "in neither"),
        (0.01, 0.2, "Not in the original"),
        (0.5, 0.4, "fewer"),
        (0.5, 0.52, "as many"),
        (0.5, 0.6, "more"),
    ],
)
def test_attention_sinks(before, after, said):
    frame = pd.DataFrame({"model": ["original", "ln_free"], "sink_rate": [before, after]})
    card = cards.make({("attention", "model"): frame})[0]
    assert said in card.sentence
    assert card.number == f"{100 * before:.1f} → {100 * after:.1f}"
    assert card.published_model == "GPT-2 medium"


@pytest.mark.parametrize(
    ("before", "after", "residue", "said"),
    [
        (49, 0.0, 1e-6, "off by 49 %"),
        (5, 0, 1e-6, "only slightly off"),
        (0.3, 0, 1e-6, "were nearly exact"),
        (49, 3, 1e-6, "not entirely gone"),
        (49, 0, 1.4, "not entirely gone"),
        (49, 0, math.nan, "not entirely gone"),
    ],
)
def test_attribution(before, after, residue, said):
    frame = pd.DataFrame({"model": ["original", "ln_free"], "nmae": [before, after]})
    frame["residue_relative"] = [0.9, residue]
    card = cards.make({("logit_attribution", "model"): frame})[0]
    assert said in card.sentence
    assert card.number == f"{before:.2f} → {after:.2f}"
    assert "49.07" in card.published


@pytest.mark.parametrize(
    ("before", "after", "residue", "said"),
    [
        (49, 0.0, 1e-6, "most for the logit and least for queries"),
        (0.9, 0, 1e-6, "were nearly exact"),
        (49, 3, 1e-6, "not entirely gone"),
        (49, 0, 1.4, "not entirely gone"),
        (49, 0, math.nan, "not entirely gone"),
    ],
)
def test_edges(before, after, residue, said):
    frame = pd.DataFrame(
        {
            "model": ["original"] * 3 + ["ln_free"] * 3,
            "kind": ["logit", "query", "key"] * 2,
            "nmae": [before, before / 3, math.nan, 0, after, math.nan],
            "residue_relative": [0.9, 0.9, 0.9, 0, residue, 0],
        }
    )
    card = cards.make({("edges", "model"): frame})[0]
    assert said in card.sentence
    assert card.number == f"{before / 3:.0f}–{before:.0f} → {after:.2f}"


@pytest.mark.parametrize(
    ("ln_free", "control", "said"),
    [(0.04, 0.02, "2.0 times"), (0.022, 0.02, "only slightly"), (0.01, 0.02, "no farther"), (0.04, None, "unknown")],
)
def test_jsd(ln_free, control, said):
    models = {"original": 0.0, "ln_free": ln_free} | ({} if control is None else {"control": control})
    frame = pd.DataFrame({"model": models.keys(), "jsd": models.values()})
    assert said in cards.make({("faithfulness", "model"): frame})[0].sentence


def test_a_model_that_only_says_that_it_has_no_ln_is_found_out():
    model = load_bridge("micro")
    tokens = read_text("books-report", model, 512).tokens
    sentences = []
    for says in ("LNPre", None):
        model.cfg.normalization_type = says
        frame = logit_attribution.measure({"original": model, "ln_free": model}, tokens)
        assert (frame["nmae"][1] > 1) == (says is not None)
        sentences.append(cards.make({("logit_attribution", "model"): frame})[0].sentence)
    assert all("not entirely gone" in sentence for sentence in sentences)


def test_a_model_that_overflows_is_said_to():
    finite, lost = cards.Cost(0.07, 0.01, 9), cards.Cost(math.nan, 0.0, 9)
    card = cards.loss_elsewhere("control", {"books": finite, "peps": cards.Cost(3.0, 0.01, 9), "notes": lost})
    assert card.number == "overflow"
    assert card.sentence.startswith("The model breaks down: on notes, the loss of at least one token is not finite.")
    assert cards.loss_here("books", "original", {"original": lost}).sentence.startswith("Everything: on books")
