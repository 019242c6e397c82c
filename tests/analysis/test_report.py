import base64
import dataclasses
import functools
import importlib.util
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch
from models import random_model
from safetensors.torch import load_file, save_file

from analysis import (
    answers,
    faithfulness,
    load_bridge,
    load_trio,
    logit_attribution,
    loss,
    patching,
    prompts,
    report,
    token_view,
)
from analysis.__main__ import main
from finetune import checkpoint, recipe
from finetune.bundled import MODELS, resolve_text


@pytest.fixture(scope="session")
def ln_free() -> str:
    """A directory: the page names it by its end."""
    return str(MODELS["micro-ln-free"])


@pytest.fixture(scope="session")
def trio(ln_free):
    return load_trio("micro", "micro", ln_free)


@pytest.fixture(scope="session")
def made(trio, tmp_path_factory):
    """A report of all analyses on one block of text."""
    out = tmp_path_factory.mktemp("reports") / "made"
    samples = {name: report.read_text(name, trio["original"], 256) for name in ("books-report", "shifted-peps")}
    names = {"original": "micro", "control": "micro", "ln_free": "models/ln_free"}
    pairs = out.parent / "pairs.json"
    swapped = [
        dataclasses.replace(pair, correct=pair.wrong, wrong=pair.correct) for pair in prompts.read_pairs(prompts.MICRO)
    ]  # which no model gets right
    pairs.write_text(json.dumps([dataclasses.asdict(pair) for pair in swapped[:2]]))
    return report.write(trio, samples, out, names=names, pairs=pairs).parent


def test_all_tables_and_figures_lie_beside_the_page(made):
    page = (made / "report.html").read_text()
    grains = {f"{a.name}-{grain.name}" for a in report.ANALYSES for grain in a.grains if a.name != "patching"}
    assert grains <= {path.stem for path in made.glob("*.csv")}
    assert all("model" in pd.read_csv(path).columns for path in made.glob("*.csv"))
    figures = {path.stem for path in made.glob("*.json")}
    assert figures >= grains - {"loss-worst"}
    for figure in figures:
        assert f'data-figure="{figure}"' in page
        json.loads((made / f"{figure}.json").read_text())
    assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]


def test_the_page_is_whole_and_small(made):
    page = (made / "report.html").read_text()
    assert len(page.encode()) < 15e6
    assert page.count("* plotly.js v") == 1
    assert not re.search(r"""<(script|img|link|iframe)[^>]+(src|href)=["'](?!data:)""", page)
    assert "nothing prepended" in page
    assert "transformers " in page
    assert page.count('<article class="card">') == 6
    assert "Sum over components less the logit" in page
    assert "The prompt, token by token: " in page
    assert "Largest change of entropy by one neuron" in page
    assert "0 of 2 pairs are patched" in page
    assert "patching.measure_pairs" in page
    assert "patching.measure(" not in page
    assert "&lt;NA&gt;" not in page


def test_blocks_are_packed_as_in_training_and_spread_over_the_text(trio):
    sample = report.read_text("books-validation", trio["original"], 1024)
    few = report.read_text("books-validation", trio["original"], 1)
    assert sample.tokens.shape == sample.documents.shape == (4, 256)
    assert few.tokens.equal(sample.tokens[:1])
    assert sample.documents[-1, -1] > 20
    documents = report.load_blocks(report.Text("books-validation"), trio["original"].tokenizer, 256, 4096)
    assert sample.tokens[0].equal(documents[0]["input_ids"])


def test_a_hub_data_set_is_read_no_farther_than_is_needed(trio, monkeypatch):
    books, read = read_documents("books-validation"), []

    def load_dataset(name, subset, *, split, streaming):
        assert (name, streaming) == ("somebody/books", True)
        return datasets.IterableDataset.from_generator(lambda: ({"text": read.append(i) or t} for i, t in books))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sample = report.read_text("somebody/books", trio["original"], 1024)
    first = report.load_blocks(report.Text("books-validation"), trio["original"].tokenizer, 256, 4096, most=4)
    assert sample.tokens.tolist() == first.blocks.tolist()
    assert max(read) < 3
    assert "its first 1,024 tokens" in sample.description


def read_documents(name: str) -> list[tuple[int, str]]:
    with lzma.open(resolve_text(name), "rt") as file:
        return [(i, json.loads(line)["text"]) for i, line in enumerate(file)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, str]:
    """Directories of a trio of small models with the tokenizer of `micro`."""
    directories = {}
    for seed, name in enumerate(("original", "control", "ln_free")):
        model = random_model(vocab_size=4096, n_positions=32, seed=seed, frozen=name == "ln_free")
        directories[name] = str(tmp_path_factory.mktemp("tiny") / name)
        checkpoint.save(model, directories[name], checkpoint.load_tokenizer("micro"))
    return directories


@pytest.mark.parametrize("name", [analysis.name for analysis in report.ANALYSES])
def test_the_python_of_each_section_makes_its_tables(name, tiny, tmp_path, monkeypatch):
    models = load_trio(**tiny)
    samples = {"books-validation": report.read_text("books-validation", models["original"], 128)}
    # Pairs that these models can do: what is patched is not what is tested here.
    monkeypatch.setattr(patching, "measure_pairs", functools.partial(_solved, patching.measure_pairs))
    out = report.write(models, samples, tmp_path / "r", names=tiny, only=[name]).parent
    analysis = next(analysis for analysis in report.ANALYSES if analysis.name == name)
    code = report._code(analysis, tiny, None, None, "books-validation", samples["books-validation"])
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda figure: shown.append(figure))
    exec(code, {})
    plotted = [grain for grain in analysis.grains if grain.plot is not None]
    for grain, figure in zip(plotted, shown, strict=True):
        saved = plotly.io.read_json(out / f"{name}-{grain.name}.json")
        for one, other in zip(figure.data, saved.data, strict=True):
            if isinstance(other.y, dict):
                y = np.frombuffer(base64.b64decode(other.y["bdata"]), other.y["dtype"])
                np.testing.assert_allclose(np.asarray(one.y, float), y, rtol=1e-4, atol=1e-5)


def _solved(measure, *args):
    return measure(*args).assign(clean_difference=1.0, corrupt_difference=-1.0)


def test_the_python_of_a_revision_and_of_pairs():
    sample = report.Sample(torch.zeros(2, 5, dtype=int), np.zeros((2, 5), int), "")
    analysis = next(analysis for analysis in report.ANALYSES if analysis.module is patching)
    code = report._code(analysis, {"original": "gpt2", "ln_free": "x"}, "v1", "p.json", "t", sample)
    assert "load_trio('gpt2', None, 'x', revision='v1')" in code
    assert "read_text('t', models['original'], 10)" in code
    assert "choose_pairs(tokenizer, 'p.json')" in code


def test_cells_show_numbers_shortly():
    numbers = pd.array([1, None, 3], "Int64")
    frame = pd.DataFrame({"a": [0.000123456, math.nan, -2.0], "b": ["x\ny", "<b>", ""], "c": numbers})
    table = report._table(frame)
    assert table["rows"] == [["0.0001235", "x⏎y", "1"], ["", "<b>", ""], ["−2", "", "3"]]
    assert [column["is_text"] for column in table["columns"]] == [False, True, False]


class TestAnswers:
    """Strong, weak and absent effects."""

    @pytest.mark.parametrize(
        ("paid", "said"),
        [((0.07, 0.004), "worse"), ((0.005, 0.001), "Little"), ((0.01, 0.02), "chance"), ((-0.1, 0.01), "better")],
    )
    @pytest.mark.parametrize("baseline", ["original", "control"])
    def test_loss(self, paid, said, baseline):
        other = {"original": "control", "control": "original"}[baseline]
        losses = {baseline: answers.Paid(*paid, 30), other: answers.Paid(-0.5, 0.1, 30)}
        answer = answers.loss_paid("books", baseline, losses)
        assert said in answer.sentence
        assert f"the {baseline}" in answer.sentence
        assert f"The difference to the {other}, which predicts it less well, is −0.500 ± 0.100" in answer.sentence
        assert baseline in answer.unit
        assert "OpenWebText" in answer.published

    @pytest.mark.parametrize(("documents", "is_told"), [(1, False), (2, False), (3, False), (5, True), (50, True)])
    def test_few_documents_tell_less(self, documents, is_told):
        """2.9 standard errors are beyond the 97.5th percentile of t of 4 degrees of freedom, 2.78; not of 2, 4.30."""
        assert answers.Paid(0.029, 0.01, documents).is_told_from() == is_told
        assert answers.Paid(0.042, 0.008, documents).is_told_from(answers.Paid(0.013, 0.006, 60)) == is_told

    @pytest.mark.parametrize(("of_control", "baseline"), [(-0.1, "control"), (0.1, "original")])
    def test_loss_from_the_table(self, of_control, baseline):
        """Against whichever of the original and the control is better on the first text."""
        tokens = pd.DataFrame({"document": [0, 0, 1, 1], "loss": [1.0, 2.0, 3.0, 2.0]})
        frames = [
            tokens.assign(model=model, text=text, loss=tokens["loss"] + more)
            for text, scale in (("books", 1), ("peps", 2))
            for model, more in (("original", 0.0), ("control", of_control * scale), ("ln_free", 0.2 * scale))
        ]
        answer, elsewhere = answers.answer({("loss", "token"): pd.concat(frames)})
        cost = 0.2 - min(of_control, 0)
        assert answer.number == f"+{cost:.3f} ± 0.000"
        assert answer.unit.startswith(f"nats/token above the {baseline}")
        assert f"less well, is +{0.2 - max(of_control, 0):.3f} ± 0.000." in answer.sentence
        assert elsewhere.number == f"+{2 * cost:.3f} ± 0.000"
        assert elsewhere.sentence.startswith(f"It costs more on peps than on books: +{2 * cost:.3f} ± 0.000 against")
        alone = pd.concat([frames[0], frames[2]])
        answer = answers.answer({("loss", "token"): alone})[0]
        assert answer.number == "+0.200 ± 0.000"
        assert "Without a control" in answer.sentence

    def test_loss_of_one_document_has_no_known_error(self):
        answer = answers.loss_paid("books", "original", {"original": answers.Paid(0.07, math.nan, 1)})
        assert answer.number == "+0.070 ± unknown"
        assert "chance" in answer.sentence

    @pytest.mark.parametrize(
        ("there", "said"),
        [
            ((0.2, 0.01, 9), "more on peps"),
            ((0.08, 0.01, 9), "chance"),
            ((0.01, 0.01, 9), "No more"),
            ((0.2, math.nan, 1), "chance"),
        ],
    )
    def test_loss_elsewhere(self, there, said):
        there, notes = answers.Paid(*there), answers.Paid(-0.1, 0.2, 9)
        answer = answers.loss_elsewhere(
            "control", {"books": answers.Paid(0.07, 0.01, 9), "peps": there, "notes": notes}
        )
        assert said in answer.sentence
        assert answer.number == str(there)
        assert answer.sentence.endswith("On others: notes −0.100 ± 0.200.")
        assert "The Pile" in answer.published

    def test_what_is_told_apart_comes_before_what_is_only_larger(self):
        books, notes, peps = ((0.02, 0.001), (0.3, 0.2), (0.2, 0.01))
        texts = {"books": books, "notes": notes, "peps": peps}
        answer = answers.loss_elsewhere("control", {name: answers.Paid(*paid, 30) for name, paid in texts.items()})
        assert "costs more on peps than on books" in answer.sentence
        gains = {"books": answers.Paid(-0.1, 0.001, 30), "peps": answers.Paid(-0.02, 0.001, 30)}
        assert "gains less on peps" in answers.loss_elsewhere("original", gains).sentence

    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            (1.2, 1.1, "nothing to lose"),
            (1.2, 8.0, "LN-free model alone: 8.0 times"),
            (2.0, 1.0, "weakly"),
            (14, 1.2, "falls to 1.2"),
            (14, 13, "stays at"),
            (10, 5.1, "falls to 5.1"),
            (5, 40, "rises to 40.0"),
        ],
    )
    def test_position_0(self, before, after, said):
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
        answer = answers.answer({("residual_norms", "point"): frame})[0]
        assert said in answer.sentence
        assert ("before block 1" in answer.sentence) == (before >= 1.5)
        assert ("before block 0" in answer.sentence) == (max(before, after) >= 1.5)
        assert answer.number == f"{before:.1f} → {after:.1f}"

    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            (0.01, 0.02, "in neither"),
            (0.01, 0.2, "Not in the original"),
            (0.5, 0.4, "fewer"),
            (0.5, 0.52, "as many"),
            (0.5, 0.6, "more of"),
        ],
    )
    def test_attention_sinks(self, before, after, said):
        frame = pd.DataFrame({"model": ["original", "ln_free"], "sink_rate": [before, after]})
        answer = answers.answer({("attention", "model"): frame})[0]
        assert said in answer.sentence
        assert answer.number == f"{100 * before:.1f} → {100 * after:.1f}"
        assert answer.published_model == "GPT-2 medium"

    @pytest.mark.parametrize(
        ("before", "after", "residue", "said"),
        [
            (49, 0.0, 1e-6, "misses"),
            (5, 0, 1e-6, "a little"),
            (0.3, 0, 1e-6, "nearly was"),
            (49, 3, 1e-6, "not entirely gone"),
            (49, 0, 1.4, "not entirely gone"),
            (49, 0, math.nan, "not entirely gone"),
        ],
    )
    def test_attribution(self, before, after, residue, said):
        frame = pd.DataFrame({"model": ["original", "ln_free"], "nmae": [before, after]})
        frame["residue_relative"] = [0.9, residue]
        answer = answers.answer({("logit_attribution", "model"): frame})[0]
        assert said in answer.sentence
        assert answer.number == f"{before:.2f} → {after:.2f}"
        assert "49.07" in answer.published

    @pytest.mark.parametrize(
        ("ln_free", "control", "said"),
        [(0.04, 0.02, "2.0 times"), (0.022, 0.02, "hardly"), (0.01, 0.02, "No farther"), (0.04, None, "unknown")],
    )
    def test_jsd(self, ln_free, control, said):
        models = {"original": 0.0, "ln_free": ln_free} | ({} if control is None else {"control": control})
        frame = pd.DataFrame({"model": models.keys(), "jsd": models.values()})
        assert said in answers.answer({("faithfulness", "model"): frame})[0].sentence

    def test_a_model_that_only_says_that_it_has_no_ln_is_found_out(self):
        model = load_bridge("micro")
        tokens = report.read_text("books-report", model, 512).tokens
        sentences = []
        for says in ("LNPre", None):
            model.cfg.normalization_type = says
            frame = logit_attribution.measure({"original": model, "ln_free": model}, tokens)
            assert (frame["nmae"][1] > 1) == (says is not None)
            sentences.append(answers.answer({("logit_attribution", "model"): frame})[0].sentence)
        assert all("not entirely gone" in sentence for sentence in sentences)


def test_token_view_is_of_the_numbers_that_the_analyses_have(trio):
    tokens = report.read_text("books-report", trio["original"], 512).tokens
    view = token_view.measure(trio, tokens).set_index(["model", "block", "position"])
    keys = ["model", "block", "position"]
    losses = loss.measure_tokens(trio, tokens).set_index(keys)["loss"]
    far = faithfulness.measure_tokens(trio, tokens).set_index(keys)["jsd"]
    assert len(view) == len(losses)
    np.testing.assert_allclose(view["loss"], losses.reindex(view.index), rtol=1e-5)
    compared = view.drop("original", level="model")
    np.testing.assert_allclose(compared["jsd"], far.reindex(compared.index), atol=1e-6)
    first = view.loc["ln_free", 0, 1]
    logits = trio["ln_free"](tokens[:1])[0, 0]
    assert first["tokens"][0] == logits.argmax()
    assert first["probabilities"][0] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-5)


class TestBadInput:
    """One line that says what is wrong, and nothing half-written."""

    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def fail(self, *flags: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["report", *flags])
        message = str(stopped.value)
        assert message.startswith("error: ")
        assert "\n" not in message
        return message

    def test_half_of_a_pair(self):
        assert "--ln-free" in self.fail("--original", "micro")
        assert "--ln-free" in self.fail("--revision", "v1")

    def test_missing_model(self, tmp_path):
        assert "nowhere" in self.fail("--original", "micro", "--ln-free", "./nowhere/at all", "--out", "r")
        assert not list(tmp_path.iterdir())

    def test_models_with_their_names_changed(self, ln_free):
        assert "ln_free" in self.fail("--original", "micro", "--ln-free", "micro")

    def test_short_text(self, tmp_path, ln_free):
        (tmp_path / "short.txt").write_text("Too short.")
        message = self.fail("--original", "micro", "--ln-free", ln_free, "--text", "short.txt", "--out", "r")
        assert "short.txt" in message
        assert "fewer than a block" in message
        assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]

    def test_nan(self, tmp_path, ln_free):
        model = checkpoint.load(ln_free)
        checkpoint.save(model, tmp_path / "broken", checkpoint.load_tokenizer(ln_free))
        weights = load_file(tmp_path / "broken" / "model.safetensors")
        weights["transformer.h.0.mlp.c_fc.weight"][0, 0] = math.nan
        save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
        message = self.fail("--original", "micro", "--ln-free", "broken", "--out", "r")
        assert message.startswith("error: ln_free: transformer.h.0.mlp.c_fc.weight holds infinities or NaN")
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]

    def test_pairs_of_different_lengths(self, tmp_path, ln_free, monkeypatch):
        pair = {"clean": "The men", "corrupt": "The man went", "correct": " were", "wrong": " was"}
        (tmp_path / "pairs.json").write_text(json.dumps([pair]))
        monkeypatch.setattr(report.loss, "measure_tokens", lambda *_, **__: pytest.fail("pairs are looked at too late"))
        flags = "--original", "micro", "--ln-free", ln_free, "--tokens", "256", "--out", "r"
        assert "2 and 3 tokens; they must have as many" in self.fail(*flags, "--pairs", "pairs.json")
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]

    def test_png_without_kaleido(self, tmp_path, monkeypatch):
        monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
        message = self.fail("--original", "micro", "--ln-free", "x", "--png", "--out", "r")
        assert ".[png]" in message
        assert "Chromium" in message

    def test_png_without_a_browser(self, tmp_path, made, monkeypatch):
        def no_browser(*_, **__):
            raise RuntimeError("Kaleido requires Google Chrome\nto be installed.")

        monkeypatch.setattr(report.plotly.io, "write_images", no_browser)
        with pytest.raises(report.ReportError, match=r"Chromium.*\(Kaleido requires Google Chrome\)"):
            report.write_png(made)

    def test_directory_exists(self, tmp_path):
        (tmp_path / "r").mkdir()
        assert "exists" in self.fail("--original", "micro", "--ln-free", "micro", "--out", "r")

    def test_no_text(self):
        assert "at least one text" in self.fail("--original", "micro", "--ln-free", "x", "--text")

    def test_batch_size(self):
        assert "--batch-size is 0" in self.fail("--original", "micro", "--ln-free", "x", "--batch-size", "0")

    def test_tokens(self):
        assert "--tokens is 0" in self.fail("--original", "micro", "--ln-free", "x", "--tokens", "0")

    def test_nothing_to_compare_with(self, trio, tmp_path):
        with pytest.raises(report.ReportError, match="models are original, control: a report compares"):
            report.write({key: trio[key] for key in ("original", "control")}, {}, tmp_path / "r")

    def test_unknown_analysis(self):
        message = self.fail("--only", "los")
        assert "los" in message
        assert "residual_norms" in message

    def test_failure_half_way(self, tmp_path, trio, monkeypatch):
        monkeypatch.setattr(report.token_view, "measure", lambda *_, **__: 1 / 0)
        samples = {"books-report": report.read_text("books-report", trio["original"], 1)}
        with pytest.raises(ZeroDivisionError):
            report.write(trio, samples, Path("reports") / "new" / "r", only=["attention"])
        assert not list(tmp_path.iterdir())

    def test_unknown_command(self):
        with pytest.raises(SystemExit, match="no command draw"):
            main(["draw"])


def test_directories_on_the_way_are_made(tiny, tmp_path):
    models = load_trio(**tiny)
    samples = {"books-validation": report.read_text("books-validation", models["original"], 64)}
    page = report.write(models, samples, tmp_path / "reports" / "r", only=["attention"])
    assert page.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]
    assert [path.name for path in page.parent.parent.iterdir()] == ["r"]


def test_newest_complete_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, began, done in (("old", 1, 2), ("new", 3, 8), ("begun later", 4, 7), ("without control yet", 9, None)):
        run = tmp_path / "runs" / name
        checkpoint.load_tokenizer("micro").save_pretrained(run / "ln_free")
        of_run = dataclasses.replace(recipe.load("micro"), model=name, revision=f"{name}-1")
        (run / "recipe.yaml").write_text(recipe.dump(of_run))
        os.utime(run / "recipe.yaml", (began, began))
        if done is not None:
            (run / "results.csv").touch()
            os.utime(run / "results.csv", (done, done))
    original, revision, control, ln_free, _ = report._newest()
    assert (original, revision, control) == ("new", "new-1", Path("runs/new/control"))
    (run.parent / "new/original").mkdir()  # of a model in memory, wherever the run began
    assert report._newest()[0] == "runs/new/original"
    (run.parent / "new/original").rmdir()
    assert ln_free == Path("runs/new/ln_free")
    monkeypatch.setattr(report, "load_trio", lambda *args, **options: pytest.fail(f"{args} {options}"))
    with pytest.raises(pytest.fail.Exception, match=r"(?s)'new', PosixPath\('runs/new/control'\).*'revision': 'new-1'"):
        report.run()


@pytest.mark.skipif(importlib.util.find_spec("kaleido") is None, reason="the extra png is not installed")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_png(made, tmp_path):
    for name in ("attention-model", "loss-token"):
        shutil.copy(made / f"{name}.json", tmp_path)
    files = report.write_png(tmp_path, scale=1)
    assert [file.name for file in files] == ["attention-model.png", "loss-token.png"]
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files)


def test_help_needs_no_torch():
    code = "import sys; from analysis.__main__ import main; main([]); assert 'torch' not in sys.modules"
    assert (
        "python -m analysis report"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
