"""The cards at the top of the report: questions, each answered with a number and a sentence.

Rules choose the sentence from the numbers, and say so if an effect is weak or absent. Each rule takes plain numbers,
which `make` finds in the tables of the report.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from scipy.stats import t

from analysis.stream import place
from finetune.evaluate import mean_and_error

_B25 = "Baroni et al. 2025, arXiv 2507.02559"
_READERS = {"logit": "the logit", "query": "queries", "key": "keys", "value": "values", "mlp": "MLPs"}
_H24 = "Heimersheim 2024, arXiv 2409.13710"


@dataclass(frozen=True)
class Card:
    """A question with its answer."""

    question: str
    number: str
    unit: str
    sentence: str
    published: str
    """The published number, and its source."""
    published_model: str = "GPT-2 small"


def make(tables: Mapping[tuple[str, str], pd.DataFrame]) -> list[Card]:
    """Make the cards for which the tables of a report, by module and name, contain the numbers."""
    cards = []
    if ("loss", "token") in tables:
        frame = tables["loss", "token"]
        costs = {model: _costs(frame, model) for model in ("original", "control") if model in set(frame["model"])}
        text = next(iter(costs["original"]))
        # The better of the two: fine-tuning may have improved the control on this text, or made it worse.
        baseline = max(costs, key=lambda model: costs[model][text].mean)
        cards.append(loss_here(text, baseline, {model: by_text[text] for model, by_text in costs.items()}))
        if len(costs[baseline]) > 1:
            by_text = tables.get(("other_text", "text"))
            jsd = None if by_text is None else by_text[by_text["model"] == "ln_free"].set_index("text")["jsd"]
            cards.append(loss_elsewhere(baseline, costs[baseline], jsd))
    if ("residual_norms", "point") in tables:
        cards.append(_position_0(tables["residual_norms", "point"]))
    if ("attention", "model") in tables:
        rate = tables["attention", "model"].set_index("model")["sink_rate"]
        cards.append(attention_sinks(rate["original"], rate["ln_free"]))
    if ("logit_attribution", "model") in tables:
        measured = tables["logit_attribution", "model"].set_index("model")
        nmae, residue = measured["nmae"], measured["residue_relative"]
        cards.append(exact_attribution(nmae["original"], nmae["ln_free"], residue["ln_free"]))
    if ("edges", "model") in tables:
        measured = tables["edges", "model"].set_index(["model", "kind"])
        before, after = (measured.loc[model, "nmae"].dropna() for model in ("original", "ln_free"))
        cards.append(exact_edges(before, after, measured.loc["ln_free", "residue_relative"].max(skipna=False)))
    if ("faithfulness", "model") in tables:
        jsd = tables["faithfulness", "model"].set_index("model")["jsd"]
        cards.append(same_model(jsd["ln_free"], jsd.get("control")))
    return cards


class Cost(NamedTuple):
    """How much a model's loss on a text exceeds another's."""

    mean: float
    """In nats/token."""
    error: float
    """The standard error of the mean over documents; NaN for a single document."""
    documents: int

    def __str__(self) -> str:
        return _signed(self.mean, self.error)

    def differs_from(self, other: "Cost | None" = None) -> bool:
        """Return whether the difference to `other`, or to 0, is significant in a two-sided t-test at 5 %."""
        other = other or Cost(0, 0, self.documents)
        documents = min(self.documents, other.documents)
        error = math.hypot(self.error, other.error)
        return documents > 1 and abs(self.mean - other.mean) > t.ppf(0.975, documents - 1) * error


def loss_here(text: str, baseline: str, costs: Mapping[str, Cost]) -> Card:
    """Answer from the loss of the LN-free model on a text minus that of `baseline`, one of the models in `costs`."""
    cost = costs[baseline]
    if not cost.differs_from():
        sentence = f"On {text} no difference to the {baseline} can be told from chance."
    elif cost.mean < 0:
        sentence = f"Nothing: the LN-free model predicts {text} better than the {baseline} does."
    elif cost.mean < 0.01:
        sentence = f"Little: the LN-free model predicts {text} hardly worse than the {baseline} does."
    else:
        sentence = f"The LN-free model predicts {text} worse than the {baseline} does."
    if others := [model for model in costs if model != baseline]:
        sentence += f" The difference to the {others[0]}, which predicts it less well, is {costs[others[0]]}."
    else:
        sentence += " Without a control, what fine-tuning did and what losing the norms did cannot be told apart."
    return Card(
        "What does losing the norms cost?",
        str(cost),
        f"nats/token above the {baseline}, standard error over documents",
        sentence,
        f"+0.067 nats/token, 3.080 against the control’s 3.013 on OpenWebText ({_B25}).",
    )


def loss_elsewhere(baseline: str, costs: Mapping[str, Cost], jsd: pd.Series | None = None) -> Card:
    """Answer from the cost on several texts, by name: the first, and the most costly of the others.

    A text whose difference to the first is significant takes precedence. `jsd` is the mean JSD to the original on each
    text, in nats/token, if known.
    """
    (home, at_home), *others = costs.items()
    text, there = max(others, key=lambda other: (other[1].differs_from(at_home), other[1].mean))
    both = f"{there} against {at_home}"
    if not there.differs_from(at_home):
        sentence = f"On {text} no other cost than on {home} can be told from chance: {both}."
    elif there.mean < at_home.mean:
        sentence = f"No more: it costs less on {text} than on {home}, {both}."
    elif there.mean < 0:
        sentence = f"It gains less on {text} than on {home}: {both}."
    else:
        sentence = f"It costs more on {text} than on {home}: {both}."
    rest = [f"{name} {cost}" for name, cost in others if name != text]
    sentence += f" On others: {', '.join(rest)}." if rest else ""
    if jsd is not None:
        order = (text, *(name for name, _ in others if name != text), home)
        sentence += f" JSD to the original, nats/token: {', '.join(f'{jsd[name]:.4f} on {name}' for name in order)}."
    return Card(
        "And on other text?",
        str(there),
        f"nats/token on {text} above the {baseline}, standard error over documents",
        sentence,
        f"+0.034 nats/token on The Pile, 2.885 against the control’s 2.851, next to +0.067 on OpenWebText ({_B25}).",
    )


def _costs(frame: pd.DataFrame, baseline: str) -> dict[str, Cost]:
    """Return, by text, the loss of the LN-free model minus that of `baseline`."""
    costs = {}
    for text, group in frame.groupby("text", sort=False):
        loss = {model: tokens["loss"].to_numpy() for model, tokens in group.groupby("model")}
        documents = group.loc[group["model"] == "ln_free", "document"].to_numpy()
        mean, error = mean_and_error(loss["ln_free"] - loss[baseline], documents)
        costs[str(text)] = Cost(mean, error, len(set(documents)))
    return costs


def position_0(before: float, at_before: str, after: float, at_after: str) -> Card:
    """Answer from the norm at position 0 divided by that at other positions, before and after, each at its maximum."""
    if max(before, after) < 1.5:
        sentence = "There is nothing to lose: in both models its norm is like that of other positions."
    elif before < 1.5:
        sentence = (
            f"It stands out in the LN-free model alone: {after:.1f} times the norm of other positions {at_after}."
        )
    elif before < 4:
        sentence = (
            f"It stands out weakly in the original: at most, {at_before}, its norm is {before:.1f} times that of other "
            f"positions; in the LN-free model, {at_after}, {after:.1f} times."
        )
    else:
        change = "falls to" if after < 0.9 * before else "rises to" if after > 1.1 * before else "stays at"
        sentence = (
            f"At most, {at_before}, its norm is {before:.1f} times that of other positions; it {change} {after:.1f} "
            f"times, {at_after}."
        )
    return Card(
        "What becomes of position 0?",
        f"{before:.1f} → {after:.1f}",
        "× the norm of other positions, where it is most",
        sentence,
        f"42 times before, std 92.7 against 2.22 after block 2 ({_H24}); norm up to about 3100 ({_B25}).",
    )


def _position_0(frame: pd.DataFrame) -> Card:
    norms = frame.pivot(index=["model", "point"], columns="token_class", values="norm")
    ratio = norms["position 0"] / norms["ordinary"]
    most: list[Any] = []
    for model in ("original", "ln_free"):
        point = ratio[model].idxmax()
        most += [ratio[model, point], place(point)]
    return position_0(*most)


def attention_sinks(before: float, after: float) -> Card:
    """Answer from the sink rates of the original and of the LN-free model, as fractions."""
    if max(before, after) < 0.05:
        sentence = "No, in neither model: hardly a head ever attends much to position 0."
    elif before < 0.05:
        sentence = "Not in the original, but in the LN-free model there are."
    else:
        change = "fewer of them" if after < 0.9 * before else "more of them" if after > 1.1 * before else "as many"
        sentence = f"Yes, and in the LN-free model there are {change}."
    return Card(
        "Are there attention sinks?",
        f"{100 * before:.1f} → {100 * after:.1f}",
        "% of queries, over all heads, attend to position 0 with more than 0.3",
        sentence,
        f"55.3 % → 45.3 % ({_B25}).",
        "GPT-2 medium",
    )


def exact_attribution(before: float, after: float, residue: float) -> Card:
    """Answer from the NMAE of direct logit attribution in the original and in the LN-free model, in percent.

    `residue` is the largest difference between a logit of the LN-free model and the sum of its attributions, as a
    fraction of the largest logit. A model that is wrongly taken for LN-free has an NMAE of 0, but its parts do not add
    up.
    """
    if after > 0.1 or not residue < 0.01:
        sentence = "It is not in the LN-free model, where it should be: the norms of this model are not entirely gone."
    elif before < 1:
        sentence = "Yes, but it nearly was before: the original’s attributions are hardly off."
    elif before < 10:
        sentence = (
            "Yes. In the original it was off by a little: what the final norm hides from it is a weak effect here."
        )
    else:
        sentence = "Yes. In the original it misses the effect that removing a head really has by this much on average."
    return Card(
        "Is direct logit attribution exact?",
        f"{before:.2f} → {after:.2f}",
        "% NMAE, mean over heads",
        sentence,
        f"49.07 % → 0.00 %; control 57.85 % ({_B25}).",
    )


def exact_edges(before: pd.Series, after: pd.Series, residue: float) -> Card:
    """Answer from the NMAE of contributions by kind of reader in the original and in the LN-free model, in percent.

    `residue` is the largest difference between a reader of the LN-free model and the sum of contributions, as a
    fraction of the largest reader.
    """
    if after.max() > 0.1 or not residue < 0.01:
        sentence = "Not in the LN-free model, where each should be: its norms are not entirely gone."
    elif before.max() < 1:
        sentence = "Yes, but they nearly were before: what the original’s parts read of each other is hardly off."
    else:
        worst, best = (_READERS[kind] for kind in (before.idxmax(), before.idxmin()))
        sentence = (
            f"Yes: taken out, a head changes what reads it by what it contributes. In the original norms are in the "
            f"way, of {worst} the most and of {best} the least."
        )
    return Card(
        "Is every edge exact?",
        f"{before.min():.0f}–{before.max():.0f} → {after.max():.2f}",
        "% NMAE, mean over heads, from the best to the worst kind of reader",
        sentence,
        f"of the logit alone: 49.07 % → 0.00 %; control 57.85 % ({_B25}).",
    )


def same_model(ln_free: float, control: float | None) -> Card:
    """Answer from the mean JSD to the original of the LN-free model and of the control, in nats/token."""
    if not control:
        number = f"{ln_free:.4f}"
        without = "without a control" if control is None else "with a control that is the original itself"
        sentence = f"This far from the original’s predictions; {without}, what of it is fine-tuning’s is unknown."
    else:
        number = f"{ln_free:.4f} / {control:.4f}"
        if ln_free <= control:
            sentence = (
                "No farther from the original’s predictions than those of the control, which was fitted to the text."
            )
        elif ln_free < 1.25 * control:
            sentence = "Its predictions are hardly farther from the original’s than those of the control."
        else:
            sentence = (
                f"Its predictions are {ln_free / control:.1f} times as far from the original’s as those of the control."
            )
    return Card(
        "Is it still the same model?",
        number,
        "nats JSD to original, LN-free" + ("" if control is None else " / control"),
        sentence,
        f"0.0393 / 0.0202 nats, LN-free / control ({_B25}).",
    )


def _signed(mean: float, error: float) -> str:
    error_text = "unknown" if math.isnan(error) else f"{error:.3f}"
    return f"{mean:+.3f} ± {error_text}".replace("-", "−")
