"""How well models do on HellaSwag and other tasks of EleutherAI's lm-evaluation-harness (the extra `eval`).

1. The harness reads each task's data from the Hub, or from a JSONL file with the same fields.
2. It turns the examples into requests, the same for all models, and `HarnessModel` answers them.
3. It computes metrics from the answers. The values of two models are subtracted example by example. This resolves
   smaller differences than the standard errors of the two values do.

Log-probabilities are computed in float32 and summed in float64. Sequences that are longer than a model's context are
truncated on the left, as the harness does.
"""

import contextlib
import difflib
import functools
import importlib.util
import itertools
import json
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from pyarrow import ArrowInvalid, ArrowTypeError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from analysis import figures, palette
from finetune.errors import NolnError
from finetune.names import expanded
from finetune.progress import progress
from finetune.recipe import Text
from finetune.text import prefix_of

if importlib.util.find_spec("lm_eval"):
    from lm_eval.api.model import TemplateLM

    # Hide the harness's hint, shown for data that replaces a task's own, on how to do that on its command line.
    logging.getLogger("lm_eval.api.task").addFilter(lambda record: "`--metadata`" not in record.getMessage())
else:
    TemplateLM = object

Tasks = str | Sequence[str] | Mapping[str, str | Path | None]
"""One or more of: NAME, a task, group or tag of the harness, with data from the Hub; or NAME=FILE.jsonl. Or a mapping
from NAMEs to FILEs, or None for data from the Hub."""
BOOTSTRAP_SAMPLES = 1_000
"""The number of bootstrap samples for the standard errors of metrics that are not means, such as perplexity."""
SEED = 1234
"""The harness's seed, which determines the examples that are shown as shots."""


class BenchmarkError(NolnError):
    """A benchmark cannot be run as requested; the message says why and what to do."""


class HarnessModel(TemplateLM):
    """Wraps a model for the harness. Its own functions accept it: `lm_eval.simple_evaluate(HarnessModel(model), …)`.

    All sequences of a batch have the same length, so no result depends on padding.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 8,
        prefix: str | None = None,
    ):
        """Take a `TransformerBridge`, `HookedTransformer` or transformers model and put it in evaluation mode.

        Args:
            model: the model.
            tokenizer: its tokenizer (None: `model.tokenizer`, which a transformers model does not have).
            batch_size: sequences per forward. No result depends on it.
            prefix: a token to prepend to each sequence, as `text.prefix` in a recipe.

        Raises:
            BenchmarkError: the model has no tokenizer, and none is given.
            TextError: the tokenizer does not have the prefix.
        """
        super().__init__()
        self.model = model.eval()
        self.tokenizer: Any = tokenizer or getattr(model, "tokenizer", None)
        if self.tokenizer is None:
            raise BenchmarkError("The model has no tokenizer of its own. Pass one.")
        self.batch_size = batch_size
        self.prefix = prefix_of(Text(prefix=prefix), self.tokenizer)
        self.max_length = model.cfg.n_ctx if hasattr(model, "cfg") else model.config.max_position_embeddings
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that precedes a text without context."""
        return self.tokenizer.eos_token_id if self.prefix is None else self.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of `string`, without special tokens."""
        return self.tokenizer.encode(string, add_special_tokens=False)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in nats. Every token is predicted once, in windows of the context."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        texts, windows = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                texts.append(i)
                windows.append((request.args, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(texts, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Raise BenchmarkError, because tasks in which a model writes text are not supported."""
        raise BenchmarkError(
            "Tasks in which a model writes text are not supported. Choose one that compares likelihoods."
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return, for each context and continuation, the continuation's log-likelihood (nats) and whether it is greedy.

        The longest sequences are run first, so that memory runs out at the start or not at all.
        """
        too_long = max((len(continuation) for _, _, continuation in requests), default=0)
        if too_long > self.max_length:
            raise BenchmarkError(f"A text of {too_long} tokens is longer than the context of {self.max_length} tokens.")
        sequences = [self._cut(context + continuation) for _, context, continuation in requests]
        answers: dict[int, tuple[float, bool]] = {}
        longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        with progress(
            total=len(sequences), desc="Log-likelihoods", unit="text", leave=False, disable=disable_tqdm
        ) as bar:
            for _, group in itertools.groupby(longest_first, key=lambda i: len(sequences[i])):
                for batch in torch.tensor(list(group)).split(self.batch_size):
                    tokens = torch.tensor([sequences[i] for i in batch], device=self.device)
                    for i, logits, targets in zip(batch.tolist(), self._logits(tokens[:, :-1]), tokens, strict=True):
                        length = len(requests[i][2])
                        answers[i] = _score(logits[-length:], targets[-length:])
                    bar.update(len(batch))
        return [answers[i] for i in range(len(sequences))]

    def _cut(self, tokens: list[int]) -> list[int]:
        """Return the prefix and as many last tokens of a sequence as fit. The last token is only predicted."""
        if self.prefix is None:
            return tokens[-self.max_length - 1 :]
        return [self.prefix, *tokens[tokens[0] == self.prefix :][-self.max_length :]]

    @torch.inference_mode()
    def _logits(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        made = self.model(tokens)
        return getattr(made, "logits", made)


def _score(logits: Float[Tensor, "pos vocab"], targets: Int[Tensor, " pos"]) -> tuple[float, bool]:
    """Return the log-likelihood of the targets, in nats, and whether all of them are the most likely tokens."""
    log_probs = logits.float().log_softmax(-1)
    log_likelihood = log_probs.gather(-1, targets[:, None]).double().sum()
    return log_likelihood.item(), bool((log_probs.argmax(-1) == targets).all())


def measure(
    models: Mapping[str, Any],
    tasks: Tasks = "hellaswag",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    reference: str = "original",
    batch_size: int = 8,
    prefix: str | None = None,
) -> pd.DataFrame:
    """Run the tasks on each model.

    Args:
        models: those of `analysis.load_trio`, or transformers models. They are put in evaluation mode.
        tasks: the tasks to run. If a task has a file, shots are taken from it too, except the example itself.
        tokenizer: the tokenizer of all models (None: each model's own).
        limit: the maximum number of examples per task. The first ones are used.
        num_fewshot: how many examples with answers (shots) to show before each. None: the task's default, mostly 0.
        reference: the model to subtract.
        batch_size: texts per forward. No number depends on it.
        prefix: a token to prepend to each text, as `text.prefix` in a recipe.

    Returns one row per model, task and metric. Columns: model; task; metric (the harness's name); filter (what the
    harness did to the answers, mostly "none"); value (a fraction for an accuracy) and difference (to `reference`,
    paired by example; NaN without a reference, or if the metric is not a mean), each with its standard error over
    examples, `…_error`; examples; shots.

    Raises:
        BenchmarkError: a task does not exist, its data cannot be read or do not fit the task, or the model would have
            to write text.
    """
    for what, least, number in (("limit", 1, limit), ("num_fewshot", 0, num_fewshot), ("batch_size", 1, batch_size)):
        if number is not None and number < least:
            raise BenchmarkError(f"{what} is {number}, but must be at least {least}.")
    loaded = load_tasks(tasks, num_fewshot)
    from lm_eval.evaluator import evaluate

    rows = []
    for name, model in models.items():
        asked = HarnessModel(model, tokenizer, batch_size, prefix)
        with _seeded():
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(SEED)  # so that every model is shown the same shots
            with contextlib.redirect_stdout(sys.stderr):  # progress belongs on stderr
                results = evaluate(asked, loaded, limit=limit, bootstrap_iters=BOOTSTRAP_SAMPLES)
        rows += [{"model": name, **row} for row in _rows(results)]
    of_reference = {
        (row["task"], row["metric"], row["filter"]): row["values"] for row in rows if row["model"] == reference
    }
    for row in rows:
        subtracted = of_reference.get((row["task"], row["metric"], row["filter"]), np.nan)
        row["difference"], row["difference_error"] = _mean_and_error(row.pop("values") - subtracted)
    last = ["examples", "shots"]
    frame = pd.DataFrame(rows)
    return frame[[*frame.columns.drop(last), *last]]


def check(tasks: Tasks, num_fewshot: int | None = None) -> None:
    """Raise BenchmarkError if `measure` would, as far as this is known without a model."""
    load_tasks(tasks, num_fewshot)


def load_tasks(tasks: Tasks, num_fewshot: int | None = None) -> dict[str, dict[str, Any]]:
    """Return tasks and groups by name, in the form that the harness's `evaluate` expects.

    Raises:
        BenchmarkError: a task does not exist, or its data cannot be read or do not fit it.
    """
    if TemplateLM is object:
        raise BenchmarkError(
            "Benchmarks require EleutherAI's lm-evaluation-harness. Install it with `pip install 'noln[eval]'`."
        )
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    if not isinstance(tasks, Mapping):
        tasks = dict(task.partition("=")[::2] for task in ([tasks] if isinstance(tasks, str) else tasks))
    if not tasks:
        raise BenchmarkError("No task is named. Name one, such as hellaswag.")
    for name, file in tasks.items():
        manager = _manager(name)
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks) or ["hellaswag", "…"]
            raise BenchmarkError(f"The harness has no task {name}. It has {', '.join(near)}.")
        is_plain = manager.task_index[name].kind.name == "TASK"
        if file and not is_plain:
            raise BenchmarkError(
                f"{name} is several tasks, or reads data in its own way, so {file} cannot replace its data."
            )
        data = datasets.DatasetDict(test=_read(expanded(file))) if file else None
        if data and num_fewshot and len(data["test"]) <= num_fewshot:
            raise BenchmarkError(f"{file} has only {len(data['test'])} examples, too few for {num_fewshot} shots.")
        try:
            with _seeded():
                found = manager.load([name if data is None else _in_place(name, data)])
        except Exception as error:  # tasks run their own code, which may raise anything
            why = f"{type(error).__name__}: {error}"
            if file:
                raise BenchmarkError(f"{file} does not have the fields and values of {name}'s data ({why}).") from error
            instead = f" A file can replace the data: {name}=FILE.jsonl." if is_plain else ""
            raise BenchmarkError(f"The data of {name} was not available ({why}).{instead}") from error
        for task in found["tasks"].values():
            if task.OUTPUT_TYPE == "generate_until":
                raise BenchmarkError(
                    f"In {task.task_name} a model writes text. Choose a task that compares likelihoods."
                )
            # As the harness does: a task that is defined without shots keeps none.
            if task.get_config("num_fewshot") is None or (num_fewshot is not None and task.get_config("num_fewshot")):
                task.set_config("num_fewshot", num_fewshot or 0)
        loaded["tasks"] |= found["tasks"]
        if data is None:
            loaded["groups"] |= found["groups"]
    return loaded


@figures.of_text
def plot(frame: pd.DataFrame) -> go.Figure:
    """Plot the values in the table of `measure`, with standard errors, one panel per metric."""
    panels = frame["metric"].where(frame["filter"] == "none", frame["metric"] + " (" + frame["filter"] + ")")
    metrics = list(panels.unique())
    figure = make_subplots(len(metrics), 1, subplot_titles=metrics, vertical_spacing=0.3 / len(metrics))
    shown = set()
    for (model, metric), group in frame.groupby(["model", panels], sort=False):
        figure.add_scatter(
            x=group["task"],
            y=group["value"],
            error_y={"array": group["value_error"]},
            name=model,
            legendgroup=model,
            offsetgroup=model,
            showlegend=model not in shown,
            mode="markers",
            marker={"color": palette.colour(model), "size": 9},
            customdata=group[["difference", "difference_error", "examples"]],
            hovertemplate="%{x}: %{y:.4f}, minus the reference’s %{customdata[0]:.4f} ± %{customdata[1]:.4f}, "
            "%{customdata[2]} examples",
            row=metrics.index(metric) + 1,
            col=1,
        )
        figure.update_yaxes(title=metric, row=metrics.index(metric) + 1)
        shown.add(model)
    figure.update_layout(scattermode="group", height=150 + 300 * len(metrics))
    return figure.update_xaxes(title="Task", row=len(metrics))


def _rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the harness's results by task and metric, with the values by example if the metric is their mean."""
    for task, metrics in results["results"].items():
        samples = pd.DataFrame(results["samples"].get(task, {"filter": []}))
        for name, value in metrics.items():
            metric, comma, kept = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{kept}")
            values = samples.loc[samples["filter"] == kept, metric] if metric in samples else pd.Series()
            is_mean = pd.api.types.is_numeric_dtype(values) and np.isclose(values.mean(), value)
            yield {
                "task": task,
                "metric": metric,
                "filter": kept,
                "value": value,
                "value_error": error if isinstance(error, float) else np.nan,
                "values": values.to_numpy(float) if is_mean else np.array([np.nan]),
                "examples": metrics["sample_len"],
                "shots": results["n-shot"].get(task),
            }


def _mean_and_error(values: Float[np.ndarray, " example"]) -> tuple[float, float]:
    """Return the mean over examples and its standard error, which is NaN for a single example."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed the random generators with which tasks shuffle choices, and restore their states on exit."""
    states = random.getstate(), np.random.get_state()
    random.seed(SEED)
    np.random.seed(SEED)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@functools.cache
def _manager(name: str) -> Any:
    """Return a task manager that knows the task `name`, if it exists.

    Indexing all tasks takes ten seconds, so a directory with the task's name is tried first.
    """
    import lm_eval.tasks

    directory = Path(lm_eval.tasks.__file__).parent / name
    if directory.is_dir():
        manager = lm_eval.tasks.TaskManager(include_path=directory, include_defaults=False)
        if name in manager.all_subtasks:
            return manager
    return _manager_of_all()


@functools.cache
def _manager_of_all() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _in_place(name: str, data: datasets.DatasetDict) -> dict[str, Any]:
    """Return the task `name` with `data` replacing its own, by means of a group, which may change its tasks."""
    splits = {"training_split": None, "validation_split": None, "test_split": "test", "fewshot_split": "test"}
    return {"group": "with data in place", "task": [{"task": name, "custom_dataset": lambda **_: data, **splits}]}


def _read(file: Path) -> datasets.Dataset:
    """Read a JSONL file of examples, all of which must have the fields of the first.

    The harness's own reader would contact the Hub, and leave a copy in a cache.
    """
    rows: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise BenchmarkError(f"{file}, line {number} is not a JSON object.")
                if lacking := set(rows[0] if rows else ()) - set(row):
                    raise BenchmarkError(f"{file}, line {number} lacks {', '.join(sorted(lacking))}.")
                rows.append(row)
        if not rows:
            raise BenchmarkError(f"{file} has no examples.")
        return datasets.Dataset.from_list(rows)
    except json.JSONDecodeError as error:
        raise BenchmarkError(f"{file}, line {number} is not JSON: {error.msg}.") from error
    except (OSError, UnicodeDecodeError, ArrowInvalid, ArrowTypeError) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}.") from error
