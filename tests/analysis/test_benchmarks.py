import json
import random
from pathlib import Path

import contract
import numpy as np
import pytest
import torch

from analysis import benchmarks, load_trio
from finetune import NolnError, checkpoint

pytest.importorskip("lm_eval")
import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

CONTEXT = 64
COUNT = 16
WORDS = ["the", "old", "man", "went", "into", "his", "house", "and", "then", "dog", "ran", "after", "her", "to", "see"]


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def examples(count: int) -> list[dict]:
    """HellaSwag's fields; the endings are of several lengths, so that `acc_norm` is not `acc`."""
    draw = random.Random(0)
    return [
        {
            "activity_label": sentence(draw, 2),
            "ctx_a": sentence(draw, draw.randint(3, 9)),
            "ctx_b": sentence(draw, 2),
            "endings": [sentence(draw, draw.randint(1, 8)) for _ in range(4)],
            "label": str(draw.randrange(4)),
        }
        for _ in range(count)
    ]


EXAMPLES = examples(COUNT)


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer("micro")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "hella[swag].jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    return path


@pytest.fixture
def plain(make_gpt2, tokenizer):
    return lambda seed, **config: make_gpt2(seed=seed, vocab_size=len(tokenizer), n_positions=CONTEXT, **config)


@pytest.fixture
def pair(plain, tokenizer):
    """An original and an LN-free model."""

    def make(tool="bridge"):
        return load_trio(plain(1), None, plain(3, frozen=True), tokenizer, tool=tool)

    return make


@torch.no_grad()
def log_likelihood(model, context: list[int], continuation: list[int]) -> float:
    """One sequence at a time, in float64, of plain transformers."""
    log_probs = model.double()(torch.tensor([(context + continuation)[:-1]])).logits[0].log_softmax(-1)
    return sum(log_probs[len(context) - 1 + i, token].item() for i, token in enumerate(continuation))


def choices_by_hand(model, tokenizer) -> np.ndarray:
    """The log-likelihood of each ending of each example."""
    table = []
    for example in EXAMPLES:
        query = f"{example['activity_label']}: {example['ctx_a']} {example['ctx_b'].capitalize()}"
        context = tokenizer.encode(query, add_special_tokens=False)
        whole = [tokenizer.encode(f"{query} {ending}", add_special_tokens=False) for ending in example["endings"]]
        table.append([log_likelihood(model, context, tokens[len(context) :]) for tokens in whole])
    return np.array(table)


def test_hellaswag_by_hand(plain, tokenizer, file):
    right, normed = {}, {}
    labels = [int(example["label"]) for example in EXAMPLES]
    lengths = np.array([[len(ending) for ending in example["endings"]] for example in EXAMPLES])
    for name, seed in (("original", 1), ("other", 2)):
        table = choices_by_hand(plain(seed), tokenizer)
        right[name] = (table.argmax(1) == labels).astype(float)
        normed[name] = ((table / lengths).argmax(1) == labels).astype(float)
    assert (right["original"] != normed["original"]).any()
    frame = benchmarks.measure({"original": plain(1), "other": plain(2)}, {"hellaswag": file}, tokenizer)
    assert list(frame["model"]) == ["original", "original", "other", "other"]
    assert set(frame["examples"]) == {COUNT}
    assert set(frame["shots"]) == {0}
    for row in frame.itertuples():
        values = {"acc": right, "acc_norm": normed}[row.metric]
        assert row.value == pytest.approx(values[row.model].mean())
        assert row.value_error == pytest.approx(values[row.model].std(ddof=1) / COUNT**0.5)
        assert row.difference == pytest.approx((values[row.model] - values["original"]).mean())
        assert row.difference_error == pytest.approx((values[row.model] - values["original"]).std(ddof=1) / COUNT**0.5)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_log_likelihoods_of_all_kinds_of_models_by_hand(plain, tokenizer, batch_size):
    expected = choices_by_hand(plain(1), tokenizer)
    models = [plain(1), *(load(plain(1), tokenizer) for load in contract.TOOLS.values())]
    requests = [
        Instance(
            "loglikelihood", {}, (f"{x['activity_label']}: {x['ctx_a']} {x['ctx_b'].capitalize()}", f" {ending}"), 0
        )
        for x in EXAMPLES
        for ending in x["endings"]
    ]
    for model in models:
        found = benchmarks.HarnessModel(model, tokenizer, batch_size).loglikelihood(requests, disable_tqdm=True)
        np.testing.assert_allclose([value for value, _ in found], expected.ravel(), atol=1e-4)


def test_the_harness_s_own_model_answers_alike(plain, tokenizer, file):
    loaded = benchmarks.load_tasks({"hellaswag": file})
    expected = evaluate(HFLM(pretrained=plain(1), tokenizer=tokenizer, batch_size=4), loaded)["results"]["hellaswag"]
    frame = benchmarks.measure({"original": plain(1)}, [f"hellaswag={file}"], tokenizer)
    for row in frame.itertuples():
        assert row.value == expected[f"{row.metric},none"]
        assert row.value_error == expected[f"{row.metric}_stderr,none"]
    requests = loaded["tasks"]["hellaswag"].instances
    found = benchmarks.HarnessModel(plain(1), tokenizer).loglikelihood(requests)
    for one, other in zip(found, [request.resps[0] for request in requests], strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]


def test_numbers_depend_neither_on_the_batch_size_nor_on_the_tool(pair, file):
    frame = benchmarks.measure(pair(), {"hellaswag": file})
    assert frame["value"].nunique() > 1
    for tool, batch_size in [("bridge", 1), ("bridge", 7), *((tool, 8) for tool in contract.TOOLS)]:
        found = benchmarks.measure(pair(tool), {"hellaswag": file}, batch_size=batch_size)
        contract.assert_same(found, frame)


def test_a_prefix_stands_before_each_sequence(plain, tokenizer):
    prefix = 7
    asked = benchmarks.HarnessModel(plain(1), tokenizer, prefix=tokenizer.convert_ids_to_tokens(prefix))
    words = tokenizer.encode(sentence(random.Random(0), 150))
    contexts = [words[:5], [], words[: 2 * CONTEXT]]
    requests = [((), context or [asked.prefix_token_id], words[-4:]) for context in contexts]
    found = asked._loglikelihood_tokens(requests, disable_tqdm=True)
    for context, (log_likelihood, _) in zip(contexts, found, strict=True):
        sequence = torch.tensor([[prefix, *[*context, *words[-4:]][-CONTEXT:]]])
        with torch.no_grad():
            log_probs = plain(1)(sequence[:, :-1]).logits.log_softmax(-1)
        expected = log_probs[0, -4:].gather(-1, sequence[0, -4:, None]).sum()
        assert log_likelihood == pytest.approx(expected.item(), abs=1e-4)


def test_what_is_too_long_is_cut_from_the_left(plain, tokenizer):
    def ask(model, context: str, continuation: str) -> float:
        request = Instance("loglikelihood", {}, (context, continuation), 0)
        return benchmarks.HarnessModel(model, tokenizer).loglikelihood([request], disable_tqdm=True)[0][0]

    words = sentence(random.Random(0), 150).split()
    context, continuation = " ".join(words[:80]), f" {' '.join(words[80:90])}"
    its, answer = tokenizer.encode(context), tokenizer.encode(continuation)
    assert tokenizer.encode(context + continuation) == its + answer
    assert len(its) > CONTEXT
    model = plain(1)
    kept = CONTEXT + 1 - len(answer)
    assert ask(model, context, continuation) == pytest.approx(log_likelihood(model, its[-kept:], answer), abs=1e-4)
    with pytest.raises(benchmarks.BenchmarkError, match="longer than the context"):
        ask(model.float(), words[0], f" {' '.join(words[1:])}")


def test_likelihood_of_whole_texts_by_hand(plain, tokenizer, tmp_path):
    model = plain(1)
    pages = [sentence(random.Random(i), words) for i, words in enumerate((20, 90))]
    (tmp_path / "pages.jsonl").write_text("\n".join(json.dumps({"page": page}) for page in pages))
    frame = benchmarks.measure({"original": model}, {"wikitext": tmp_path / "pages.jsonl"}, tokenizer)
    short, long = (tokenizer.encode(page) for page in pages)
    assert len(short) < CONTEXT < len(long) < 2 * CONTEXT
    rest = len(long) - CONTEXT
    total = sum(
        log_likelihood(model, *pieces)
        for pieces in (
            ([tokenizer.eos_token_id], short),
            ([tokenizer.eos_token_id], long[:CONTEXT]),
            (long[-CONTEXT - 1 : -rest], long[-rest:]),
        )
    )
    value = frame.set_index("metric")["value"]
    assert value["bits_per_byte"] == pytest.approx(-total / np.log(2) / sum(map(len, pages)), rel=1e-5)
    assert value["word_perplexity"] == pytest.approx(np.exp(-total / 110), rel=1e-5)
    assert frame[["value_error", "difference", "difference_error"]].isna().all(axis=None)


def test_shots_and_limit(pair, file, monkeypatch):
    asked = []
    answer = benchmarks.HarnessModel.loglikelihood

    def listen(self, requests, *args, **kwargs):
        asked.append([request.args[0] for request in requests])
        return answer(self, requests, *args, **kwargs)

    monkeypatch.setattr(benchmarks.HarnessModel, "loglikelihood", listen)
    frame = benchmarks.measure(pair(), {"hellaswag": file}, num_fewshot=2, limit=5)
    assert set(frame["shots"]) == {2}
    assert set(frame["examples"]) == {5}
    assert asked[0] == asked[1]
    for i, context in enumerate(asked[0][::4]):
        *shots, example = context.split("\n\n")
        assert example.startswith(EXAMPLES[i]["activity_label"])
        assert len(shots) == 2
        assert not any(shot.startswith(example) for shot in shots)


def test_several_tasks_and_their_figure(pair, file, tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "see", "sol1": "the dog", "sol2": "house", "label": 0}\n' * 3)
    state = random.getstate()
    frame = benchmarks.measure(pair(), {"hellaswag": file, "piqa": tmp_path / "piqa.jsonl"})
    assert random.getstate() == state
    assert frame.groupby(["model", "task"], sort=False).size().to_dict() == {
        (model, task): 2 for model in ("original", "ln_free") for task in ("hellaswag", "piqa")
    }
    contract.assert_plots_by_model(benchmarks.plot(frame), ["original", "ln_free"])
    one = benchmarks.measure(pair(), {"piqa": tmp_path / "piqa.jsonl"}, limit=1)
    assert one["difference_error"].isna().all()
    contract.assert_plots_by_model(benchmarks.plot(one), ["original", "ln_free"])


class TestBadInput:
    """One line that says what is wrong, before any model is run."""

    def fail(self, tasks, **options) -> str:
        with pytest.raises(NolnError) as raised:
            benchmarks.measure({}, tasks, **options)
        return str(raised.value)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (json.dumps(EXAMPLES[0]) + "\n{", "line 2 is not JSON"),
            ("[]", "line 1 is not a JSON object"),
            ("\n", "no examples"),
            (json.dumps(EXAMPLES[0]) + '\n\n{"label": "0"}', "line 3 lacks activity_label, ctx_a, ctx_b, endings"),
            ('{"question": "?"}', "ctx_a"),
            (json.dumps(EXAMPLES[0] | {"label": ""}), "not have the fields and values of hellaswag"),
            (json.dumps(EXAMPLES[0]) + "\n" + json.dumps(EXAMPLES[0] | {"label": [1]}), "cannot be read"),
            (json.dumps(EXAMPLES[0] | {"label": "4"}), "list index out of range"),
        ],
    )
    def test_file(self, tmp_path, text, said):
        (tmp_path / "bad.jsonl").write_text(text)
        message = self.fail({"hellaswag": tmp_path / "bad.jsonl"})
        assert said in message
        assert "bad.jsonl" in message

    def test_no_file(self):
        assert "nowhere.jsonl" in self.fail({"hellaswag": "nowhere.jsonl"})

    def test_no_such_task(self, monkeypatch):
        directory = Path(lm_eval.tasks.__file__).parent / "hellaswag"
        hellaswag = lm_eval.tasks.TaskManager(include_path=directory, include_defaults=False)
        monkeypatch.setattr(benchmarks, "_manager_of_all", lambda: hellaswag)  # which takes ten seconds
        message = self.fail(["hellaswagg"])
        assert "no task hellaswagg" in message
        assert "It has hellaswag" in message

    def test_the_hub_without_a_network(self):
        message = self.fail("hellaswag")
        assert "Rowan/hellaswag" in message
        assert "hellaswag=FILE.jsonl" in message

    def test_a_task_that_reads_data_in_its_own_way(self, file):
        assert "in its own way" in self.fail({"squadv2": file})

    def test_tasks_in_which_to_write(self, tmp_path):
        (tmp_path / "sums.jsonl").write_text('{"question": "1+1?", "answer": "#### 2"}')
        assert "write" in self.fail({"gsm8k": tmp_path / "sums.jsonl"})

    def test_no_task(self):
        assert "No task" in self.fail([])

    def test_numbers(self, file):
        assert "limit" in self.fail({"hellaswag": file}, limit=0)
        assert "batch_size" in self.fail({"hellaswag": file}, batch_size=0)
        assert f"{COUNT} examples" in self.fail({"hellaswag": file}, num_fewshot=COUNT)

    def test_no_tokenizer(self, plain, file):
        with pytest.raises(benchmarks.BenchmarkError, match="tokenizer"):
            benchmarks.measure({"original": plain(1)}, {"hellaswag": file})

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setattr(benchmarks, "TemplateLM", object)
        assert "pip install 'noln[eval]'" in self.fail(["hellaswag"])
