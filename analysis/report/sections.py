"""The sections of the page, one per analysis: what it measures, its tables and figures, and their Python calls."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import pandas as pd
import plotly.graph_objects as go

from analysis import (
    attention,
    benchmarks,
    composition,
    confidence_neurons,
    edges,
    faithfulness,
    generation,
    logit_attribution,
    loss,
    other_text,
    outlier_features,
    patching,
    residual_norms,
)
from analysis.prompts import Pair, PairError
from analysis.texts import Sample

PROMPT_TOKENS = 24
"""The number of tokens in the prompt whose logits are attributed: the first tokens of the text."""
EDGE_TOKENS = 1_024
"""The number of tokens on which all edges are measured, in whole blocks (at least one)."""
FIT_TOKENS = 512
"""The number of tokens for virtual weights, in whole blocks (at least one). Half of them are predicted."""
WORST = 6
"""The number of worst tokens to show per model and text."""
_Measured = TypeVar("_Measured")


class Inputs(NamedTuple):
    """The inputs of the analyses of a report."""

    models: dict[str, Any]
    samples: dict[str, Sample]
    """The texts, by name."""
    pairs: Sequence[Pair] | PairError
    """The pairs for patching, or why there are none."""
    batch_size: int
    prefix: str | None = None
    """The token that is prepended to each prompt, and to each block of the texts."""

    def on_first_text(self, measure: Callable[..., _Measured], **options: Any) -> _Measured:
        """Return what `measure` returns for the models and the first text."""
        tokens = next(iter(self.samples.values())).tokens
        return measure(self.models, tokens, batch_size=self.batch_size, **options)


@dataclass(frozen=True)
class Table:
    """One table of an analysis and its figure."""

    name: str
    """Together with the module's name, the name of the files."""
    title: str
    plot: Callable[[pd.DataFrame], go.Figure] | None
    python: str
    """The call that computes the plotted table from `models` and `tokens`. {prefix} is replaced by that argument, if
    given."""
    plotted: str | None = None
    """The name of the table that is plotted, if it is not this one."""
    note: Callable[[pd.DataFrame], str] | None = None
    """Describes what the figures do not show of the table."""


@dataclass(frozen=True)
class Analysis:
    """One module of the package, and its section of the page."""

    module: ModuleType
    title: str
    sentence: str
    """What it measures."""
    measure: Callable[[Inputs], dict[str, pd.DataFrame]]
    """Computes the tables, by name, with as few forwards as possible."""
    tables: tuple[Table, ...]
    python: tuple[str, ...] = ()
    """Code that the calls of its tables need in addition to models and tokens. {pairs} is replaced by the file of
    prompt pairs."""

    @property
    def name(self) -> str:
        """The module's name, which is also used in tables and file names."""
        return self.module.__name__.rpartition(".")[2]


def _loss(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Measure every text. Each table contains all texts."""
    token = pd.concat(
        [
            loss.measure_tokens(inputs.models, sample.tokens, sample.documents, text=name, batch_size=inputs.batch_size)
            for name, sample in inputs.samples.items()
        ],
        ignore_index=True,
    )
    tokenizer = inputs.models["original"].tokenizer
    worst = [
        loss.worst_tokens(token[token["text"] == name], sample.tokens, tokenizer, WORST)
        for name, sample in inputs.samples.items()
    ]
    return {
        "model": loss.summarise(token),
        "position": loss.average_positions(token),
        "token": token,
        "worst": pd.concat(worst, ignore_index=True),
    }


def _other_text(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Measure every text. The constants are those of the first."""
    token = pd.concat(
        other_text.measure_tokens(inputs.models, sample.tokens, text=name, batch_size=inputs.batch_size)
        for name, sample in inputs.samples.items()
    )
    return {"text": other_text.summarise(token), "std": other_text.by_std(token)}


def _residual_norms(inputs: Inputs) -> dict[str, pd.DataFrame]:
    point = inputs.on_first_text(residual_norms.measure)
    step = point[["model", "point", "token_class", "growth", "cosine", "tokens"]].dropna()
    return {"point": point.drop(columns=["growth", "cosine"]), "step": step}


def _attention(inputs: Inputs) -> dict[str, pd.DataFrame]:
    head = inputs.on_first_text(attention.measure_heads)
    return {"model": attention.summarise(head), "head": head}


def _logit_attribution(inputs: Inputs) -> dict[str, pd.DataFrame]:
    component = inputs.on_first_text(logit_attribution.measure_components)
    prompt = next(iter(inputs.samples.values())).tokens[0, :PROMPT_TOKENS]
    return {
        "model": logit_attribution.summarise(component),
        "component": component,
        "head": component[component["component"] == "head"],
        "prompt": logit_attribution.largest_first(logit_attribution.measure_prompt(inputs.models, prompt)),
        "lens": inputs.on_first_text(logit_attribution.measure_lens),
    }


def _edges(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Measure all edges on a few blocks, because there are thousands at every token."""
    tokens = next(iter(inputs.samples.values())).tokens
    tokens = tokens[: max(1, EDGE_TOKENS // tokens.shape[1])]
    edge = edges.measure_edges(inputs.models, tokens, batch_size=inputs.batch_size)
    return {"model": edges.summarise(edge), "layer": edges.summarise_layers(edge), "edge": edge}


def _composition(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Predict all edges on a few blocks, and rank them by weights."""
    tokens = next(iter(inputs.samples.values())).tokens
    tokens = tokens[: max(1, FIT_TOKENS // tokens.shape[1])]
    edge = composition.measure_edges(inputs.models, tokens, batch_size=inputs.batch_size)
    return {
        "model": composition.summarise(edge),
        "distance": composition.summarise_distances(edge),
        "ranking": composition.rank(composition.measure_weights(inputs.models), edge),
        "circuit": composition.measure_circuits(inputs.models),
    }


def _faithfulness(inputs: Inputs) -> dict[str, pd.DataFrame]:
    measured = inputs.on_first_text(faithfulness.measure_all)
    token = measured.pop("token")
    model = faithfulness.summarise(token)
    is_tail = model.columns.str.startswith(("jsd_", "kl_"))
    return {
        "model": model.loc[:, ~is_tail],
        "tail": model.loc[:, is_tail | model.columns.isin(["model", "reference", "tokens"])],
        "calibration": faithfulness.calibrate(token),
        **measured,
    }


def _confidence_neurons(inputs: Inputs) -> dict[str, pd.DataFrame]:
    neurons = confidence_neurons.candidates(inputs.models["original"])
    ablation = inputs.on_first_text(confidence_neurons.measure, neurons=neurons)
    return {
        "neuron": confidence_neurons.measure_neurons(inputs.models, neurons),
        "ablation": ablation[ablation["ablation"] == "alone"],
        "cumulative": ablation[ablation["ablation"] == "together"],
        "spectrum": confidence_neurons.measure_spectrum(inputs.models, neurons),
    }


def _generation(inputs: Inputs) -> dict[str, pd.DataFrame]:
    prompt = inputs.on_first_text(generation.measure, prefix=inputs.prefix)
    return {"prompt": prompt, "text": generation.side_by_side(prompt)}


def _patching(inputs: Inputs) -> dict[str, pd.DataFrame]:
    """Patch the pairs that every model solves: effects as fractions of a small logit difference would be noise."""
    if isinstance(inputs.pairs, PairError):
        raise inputs.pairs
    tokenizer = inputs.models["original"].tokenizer
    pair = patching.measure_pairs(inputs.models, inputs.pairs, tokenizer, prefix=inputs.prefix)
    if not (able := patching.solved_by_all(pair)):
        return {"pair": pair}
    place = patching.measure(inputs.models, inputs.pairs, tokenizer, only=able, prefix=inputs.prefix)
    return {"pair": pair, "layer": patching.summarise(place), "place": place}


_PATCH = "patching.measure(models, pairs, tokenizer, only=patching.solved_by_all(frame){prefix})"

ANALYSES = (
    Analysis(
        loss,
        "Loss",
        "The cross-entropy (CE) of each model on every next token, and how far it is from the original’s. The "
        "percentiles show whether a mean comes from a few very bad tokens.",
        _loss,
        (
            Table("model", "By model and text", loss.plot, "loss.measure(models, tokens, documents)"),
            Table("position", "By position", loss.plot_positions, "loss.measure_positions(models, tokens)"),
            Table(
                "token",
                "Difference from the original, token by token",
                loss.plot_tokens,
                "loss.measure_tokens(models, tokens, documents)",
            ),
            Table(
                "worst",
                "Tokens with the largest loss",
                None,
                f"loss.worst_tokens(frame, tokens, models['original'].tokenizer, {WORST})",
            ),
        ),
    ),
    Analysis(
        other_text,
        "Other text",
        "Whether the LN-free model stays close to the original on text unlike that of its fine-tuning and on random "
        "tokens, on average and at the worst token. The second figure shows why it may not: it divides every token by "
        "the same constant, so a token whose std (under RMSNorm, its RMS) is not that constant is read too large or "
        "too small. The constant is taken to be the mean std on the first text.",
        _other_text,
        (
            Table("text", "By text", other_text.plot, "other_text.measure(models, tokens)"),
            Table(
                "std",
                "By the std of a token, over the constant",
                other_text.plot_stds,
                "other_text.measure_stds(models, tokens)",
            ),
        ),
    ),
    Analysis(
        residual_norms,
        "Residual norms",
        "How long residual vectors are at each point of the stream, for position 0, end-of-text tokens and all other "
        "(ordinary) tokens: their L2 norm, and their std over the width, which is what LayerNorm divides by. (RMSNorm "
        "divides by the L2 norm over the square root of the width.) Then how much they grow and turn from each point "
        "to the next.",
        _residual_norms,
        (
            Table("point", "Length, point by point", residual_norms.plot, "residual_norms.measure(models, tokens)"),
            Table(
                "step",
                "Growth and turning, from point to point",
                residual_norms.plot_steps,
                "residual_norms.measure(models, tokens)",
            ),
        ),
    ),
    Analysis(
        logit_attribution,
        "Logit attribution",
        "Direct logit attribution (DLA) is what a head, an MLP or the embeddings add to the logit of the next token, "
        "at the scale of the final norm. The direct effect is what the logit loses when the component is removed from "
        "the final residual stream and the norm is applied again. DLA is wrong by the difference: NMAE is the mean "
        "|DLA − direct effect| over tokens as a percentage of the mean |direct effect|. Logits are taken less their "
        "mean over the vocabulary (W_U is centred), and before soft-capping where a model does that.",
        _logit_attribution,
        (
            Table(
                "model",
                "Error of DLA by model",
                logit_attribution.plot,
                "logit_attribution.measure(models, tokens)",
                note=logit_attribution.describe_residue,
            ),
            Table(
                "component",
                "Error of DLA by component",
                logit_attribution.plot_components,
                "logit_attribution.measure_components(models, tokens)",
            ),
            Table(
                "head",
                "Error of DLA by head",
                logit_attribution.plot_heads,
                "logit_attribution.measure_components(models, tokens)",
            ),
            Table(
                "prompt",
                "One prompt",
                logit_attribution.plot_prompt,
                "logit_attribution.largest_first(\n"
                f"    logit_attribution.measure_prompt(models, tokens[0, :{PROMPT_TOKENS}])\n)",
                note=logit_attribution.describe_prompt,
            ),
            Table("lens", "Logit lens", logit_attribution.plot_lens, "logit_attribution.measure_lens(models, tokens)"),
        ),
    ),
    Analysis(
        edges,
        "Inside the model",
        "Not only logits are read off the residual stream, but also queries, keys, values and the pre-activations of "
        "MLPs. The contribution of a component to one of these readers is its part of the sum that is read, at the "
        "scale of the norm in front; its direct effect is what the reader loses when the component is removed from the "
        "stream and the norm is applied again. Without norms the two are equal, for any prompt and whatever else is "
        "removed. NMAE is the mean |contribution − direct effect| as a percentage of the mean |direct effect|.",
        _edges,
        (
            Table("model", "Error by kind of reader", edges.plot, "edges.measure(models, some)", note=edges.describe),
            Table("layer", "Error by layer of the reader", edges.plot_layers, "edges.measure_layers(models, some)"),
            Table("edge", "All edges", None, "edges.measure_edges(models, some)"),
        ),
        (f"some = tokens[: max(1, {EDGE_TOKENS} // tokens.shape[1])]",),
    ),
    Analysis(
        composition,
        "From weights alone",
        "Between any two components lie virtual weights, those with which the first writes times those with which the "
        "second reads, and no prompt changes them. First, how well do they predict what the one does to the other, "
        "given the activations of the first? In a model with norms the prediction is divided by one mean for all "
        "tokens, measured on other blocks (mean divisor), or by what each token has (own divisors). Second, without "
        "any prompt: do the edges with high scores have the largest effects, more so than by the scores of random "
        "weights with the same singular values? The composition score is ‖W_OV W‖ / (‖W_OV‖ ‖W‖), with W what the "
        "reader makes of the stream, and the strength ‖W_OV W‖ / ‖W‖; the Projection Kernel compares only the spaces "
        "that are written to and read from.",
        _composition,
        (
            Table(
                "model",
                "What virtual weights predict",
                composition.plot,
                "composition.measure(models, few)",
                note=composition.describe,
            ),
            Table(
                "distance",
                "What virtual weights predict of heads, by distance",
                composition.plot_distances,
                "composition.measure_distances(models, few)",
            ),
            Table(
                "ranking",
                "The largest edges, found without a prompt",
                composition.plot_ranking,
                "composition.measure_ranking(models, few)",
                note=composition.describe_ranking,
            ),
            Table(
                "circuit",
                "What heads do with tokens",
                composition.plot_circuits,
                "composition.measure_circuits(models)",
                note=lambda _: (
                    "Copying is near 1 in a head that raises the logits of the tokens that it looks at, and matching "
                    "is near 1 in one whose tokens look at tokens like themselves (eigenvalues of its OV and QK "
                    "circuits)."
                ),
            ),
        ),
        (f"few = tokens[: max(1, {FIT_TOKENS} // tokens.shape[1])]",),
    ),
    Analysis(
        faithfulness,
        "Faithfulness",
        "Whether each model still computes what the original (the reference) does: its predictions and, layer by "
        "layer, its residual stream, attention patterns, heads and neurons. JSD is the Jensen–Shannon divergence "
        "between two predictions: 0 where they are the same, at most ln 2 = 0.69 nats. The control shows how much "
        "fine-tuning alone changes.",
        _faithfulness,
        (
            Table("model", "Predictions", faithfulness.plot, "faithfulness.measure(models, tokens)"),
            Table(
                "tail", "The tokens that differ most", faithfulness.plot_tails, "faithfulness.measure(models, tokens)"
            ),
            Table(
                "calibration",
                "Calibration",
                faithfulness.plot_calibration,
                "faithfulness.measure_calibration(models, tokens)",
            ),
            Table(
                "layer",
                "Residual stream by layer",
                faithfulness.plot_layers,
                "faithfulness.measure_layers(models, tokens)",
            ),
            Table(
                "head",
                "Attention and DLA by head",
                faithfulness.plot_heads,
                "faithfulness.measure_heads(models, tokens)",
            ),
            Table(
                "neuron",
                "MLP activations by layer",
                faithfulness.plot_neurons,
                "faithfulness.measure_neurons(models, tokens)",
            ),
        ),
    ),
    Analysis(
        generation,
        "Generation",
        "What the models write after the same prompts, always choosing the most probable token. Two texts have little "
        "in common after the first token that differs, so this is for reading, and not a measure of faithfulness. The "
        "loss under the original (the reference) tells how likely that was to write the same.",
        _generation,
        (
            Table("prompt", "By prompt", generation.plot, "generation.measure(models, tokens{prefix})"),
            Table("text", "Side by side", None, "generation.side_by_side(frame)"),
        ),
    ),
    Analysis(
        attention,
        "Attention",
        "How much heads attend to position 0, the attention sink, and how spread out their patterns are. The sink rate "
        "is the share of queries with more than 0.3 of their attention on position 0. Without a prefix, position 0 is "
        "an arbitrary token of the text; with one it is that token, the same in all blocks.",
        _attention,
        (
            Table("model", "By model", attention.plot, "attention.measure(models, tokens)"),
            Table("head", "By head", attention.plot_heads, "attention.measure_heads(models, tokens)"),
        ),
    ),
    Analysis(
        confidence_neurons,
        "Confidence neurons",
        "Some neurons of the last MLP have large output weights that hardly change the logits directly. They act "
        "through the scale of the final norm, and set how confident the model is. Candidates have a large norm ‖w_out‖ "
        "and a small LogitVar, the variance over the vocabulary of the cosine between w_out and the unembedding of a "
        "token. Ablation sets a neuron to its mean activation: how much do entropy and loss change, and how much of "
        "that goes through the final norm?",
        _confidence_neurons,
        (
            Table(
                "neuron",
                "Candidates among all neurons",
                confidence_neurons.plot_neurons,
                "confidence_neurons.measure_neurons(models, neurons)",
            ),
            Table(
                "ablation",
                "Neurons ablated one by one",
                confidence_neurons.plot,
                "confidence_neurons.measure(models, tokens, neurons)",
                note=confidence_neurons.describe,
            ),
            Table(
                "cumulative",
                "Neurons ablated together",
                confidence_neurons.plot_cumulative,
                "confidence_neurons.measure(models, tokens, neurons)",
            ),
            Table(
                "spectrum",
                "Where in the spectrum of the unembedding neurons write",
                confidence_neurons.plot_spectrum,
                "confidence_neurons.measure_spectrum(models, neurons)",
                note=lambda _: (
                    "What neurons write in the directions of small singular values, on the right, hardly reaches the "
                    "logits."
                ),
            ),
        ),
        ("neurons = confidence_neurons.candidates(models['original'])",),
    ),
    Analysis(
        patching,
        "Patching",
        "How well attribution patching, from one backward pass, estimates activation patching, which takes a forward "
        "pass for each place, on pairs of prompts that every model here answers correctly. A place is a hook point of "
        "a layer, at a position and in a head. Effects, and the error |attribution − activation|, are shares of the "
        "difference in logits between the two prompts.",
        _patching,
        (
            Table(
                "pair",
                "Can the models do it?",
                patching.plot_pairs,
                "patching.measure_pairs(models, pairs, tokenizer{prefix})",
                note=patching.describe_pairs,
            ),
            Table("layer", "Error by layer", patching.plot, _PATCH, "place"),
            Table("place", "By place: attribution against activation patching", patching.plot_effects, _PATCH),
        ),
        (
            "tokenizer = models['original'].tokenizer",
            "pairs = choose_pairs(tokenizer, {pairs!r})",
        ),
    ),
    Analysis(
        outlier_features,
        "Outlier features",
        "Whether a few features (coordinates) carry most of the residual stream. Kurtosis is 1 where all features are "
        "equally large, and grows with outliers. The max-median ratio is that of the largest to the median feature of "
        "a token. Correlations between features, and between tokens, show whether they carry the same.",
        lambda inputs: {"point": inputs.on_first_text(outlier_features.measure)},
        (Table("point", "By point of the stream", outlier_features.plot, "outlier_features.measure(models, tokens)"),),
    ),
)
"""The sections of the page, in order. To add an analysis, add an entry."""


def benchmark_section(tasks: Sequence[str]) -> Analysis:
    """Return the section of benchmarks. It is optional, because the data of tasks may have to come from the Hub."""
    return Analysis(
        benchmarks,
        "Benchmarks",
        "How well the models do on tasks of EleutherAI’s lm-evaluation-harness. Differences from the original are "
        "taken example by example.",
        lambda inputs: {
            "task": benchmarks.measure(inputs.models, tasks, batch_size=inputs.batch_size, prefix=inputs.prefix)
        },
        (Table("task", "By task", benchmarks.plot, f"benchmarks.measure(models, {list(tasks)}{{prefix}})"),),
    )
