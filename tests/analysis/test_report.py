import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from analysis import answers, load_trio, report
from analysis.__main__ import main
from finetune import checkpoint, recipe


@pytest.fixture(scope="session")
def ln_free(tmp_path_factory) -> str:
    """The bundled model with its LNs frozen at a std of 1: no good one, but of its shape and with its tokenizer."""
    model = checkpoint.load("micro")
    model.config.layer_norm_epsilon = checkpoint.FROZEN_EPS
    for name, module in model.named_modules():
        if "ln_" in name:
            module.eps = checkpoint.FROZEN_EPS
            module.weight.data *= 1e6
    directory = tmp_path_factory.mktemp("models") / "ln_free"
    checkpoint.save(model, directory, checkpoint.load_tokenizer("micro"))
    return str(directory)


@pytest.fixture(scope="session")
def trio(ln_free):
    return load_trio("micro", "micro", ln_free)


@pytest.fixture(scope="session")
def made(trio, tmp_path_factory):
    """A report of all analyses on one block of text."""
    out = tmp_path_factory.mktemp("reports") / "made"
    samples = {name: report.read_text(name, trio["original"], 256) for name in ("books-report", "shifted-peps")}
    names = {"original": "micro", "control": "micro", "ln_free": "models/ln_free"}
    return report.write(trio, samples, out, names=names, pairs=report.read_pairs(report.MICRO)[:2]).parent


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
    assert page.count('<article class="card">') == 4


def test_blocks_are_packed_as_in_training_and_spread_over_the_text(trio):
    sample = report.read_text("books-validation", trio["original"], 1024)
    few = report.read_text("books-validation", trio["original"], 1)
    assert sample.tokens.shape == sample.documents.shape == (4, 256)
    assert few.tokens.equal(sample.tokens[:1])
    assert sample.documents[-1, -1] > 20
    documents = report.load_text(
        report.Text("books-report", held_out="books-validation"), trio["original"].tokenizer, 256, 4096
    ).held_out
    assert sample.tokens[0].equal(documents[0]["input_ids"])


def test_the_python_of_each_section_names_what_there_is():
    for analysis in report.ANALYSES:
        code = report._code(analysis, {"original": "micro", "ln_free": "x"}, "books-report")
        compile(code, analysis.name, "exec")
        for function in re.findall(rf"\b{analysis.name}\.(\w+)\(", code):
            assert callable(getattr(analysis.module, function))


def test_cells_show_numbers_shortly():
    frame = pd.DataFrame({"a": [0.000123456, math.nan, -2.0], "b": ["x\ny", "<b>", ""], "c": [1, 2, 3]})
    table = report._table(frame)
    assert table["rows"] == [["0.0001235", "x⏎y", "1"], ["", "<b>", "2"], ["−2", "", "3"]]
    assert [column["is_text"] for column in table["columns"]] == [False, True, False]


class TestAnswers:
    """Strong, weak and absent effects."""

    @pytest.mark.parametrize(
        ("paid", "said"),
        [((0.07, 0.004), "worse"), ((0.005, 0.001), "Little"), ((0.01, 0.02), "chance"), ((-0.1, 0.01), "better")],
    )
    def test_loss(self, paid, said):
        answer = answers.loss_paid({"books": paid}, "control")
        assert said in answer.sentence
        assert "OpenWebText" in answer.published

    def test_loss_from_the_table(self):
        tokens = pd.DataFrame({"document": [0, 0, 1, 1], "loss": [1.0, 2.0, 3.0, 2.0]})
        frames = [
            tokens.assign(model=model, text=text, loss=tokens["loss"] + more)
            for text, scale in (("books", 1), ("peps", 2))
            for model, more in (("original", 0.0), ("control", -0.1 * scale), ("ln_free", 0.2 * scale))
        ]
        answer = answers.answer({("loss", "token"): pd.concat(frames)})[0]
        assert answer.number == "+0.300 ± 0.000"
        assert "On peps the difference is +0.600 ± 0.000." in answer.sentence
        alone = pd.concat([frames[0], frames[2]])
        answer = answers.answer({("loss", "token"): alone})[0]
        assert answer.number == "+0.200 ± 0.000"
        assert "Without a control" in answer.sentence

    def test_loss_of_one_document_has_no_known_error(self):
        answer = answers.loss_paid({"books": (0.07, math.nan)}, "control")
        assert answer.number == "+0.070 ± unknown"
        assert "chance" in answer.sentence

    @pytest.mark.parametrize(
        ("before", "after", "said"),
        [
            (1.2, 1.1, "nothing to lose"),
            (2.0, 1.0, "weakly"),
            (14, 1.2, "shrinks to 1.2"),
            (14, 13, "stays at"),
            (5, 40, "grows"),
        ],
    )
    def test_position_0(self, before, after, said):
        points = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
        frame = pd.DataFrame(
            [
                {"model": model, "point": point, "token_class": token_class, "norm": norm}
                for model, ratio in (("original", before), ("ln_free", after))
                for point, factor in zip(points, (0.5, 1.0), strict=True)
                for token_class, norm in (("ordinary", 10.0), ("position 0", 10 * ratio * factor))
            ]
        )
        answer = answers.answer({("residual_norms", "point"): frame})[0]
        assert said in answer.sentence
        assert "1 pre" in answer.sentence
        assert answer.number == f"{before:.1f} → {after:.1f}"

    @pytest.mark.parametrize(
        ("before", "after", "said"), [(49, 0.0, "misses"), (5, 0, "a little"), (0.3, 0, "nearly was"), (49, 3, "not")]
    )
    def test_attribution(self, before, after, said):
        frame = pd.DataFrame({"model": ["original", "ln_free"], "nmae": [before, after]})
        answer = answers.answer({("logit_attribution", "model"): frame})[0]
        assert said in answer.sentence
        assert answer.number == f"{before:.2f} → {after:.2f}"
        assert "49.07" in answer.published

    @pytest.mark.parametrize(
        ("ln_free", "control", "said"),
        [(0.04, 0.02, "2.0 times"), (0.022, 0.02, "hardly"), (0.01, 0.02, "adds nothing"), (0.04, None, "unknown")],
    )
    def test_jsd(self, ln_free, control, said):
        models = {"original": 0.0, "ln_free": ln_free} | ({} if control is None else {"control": control})
        frame = pd.DataFrame({"model": models.keys(), "jsd": models.values()})
        assert said in answers.answer({("faithfulness", "model"): frame})[0].sentence


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

    def test_no_run(self, monkeypatch):
        monkeypatch.setattr(report, "MODELS", {"micro": ""})
        assert "python -m finetune" in self.fail()

    def test_half_of_a_pair(self):
        assert "--ln-free" in self.fail("--original", "micro")

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
        assert "NaN" in self.fail("--original", "micro", "--ln-free", "broken", "--out", "r")

    def test_directory_exists(self, tmp_path):
        (tmp_path / "r").mkdir()
        assert "exists" in self.fail("--original", "micro", "--ln-free", "micro", "--out", "r")

    def test_unknown_analysis(self):
        message = self.fail("--only", "los")
        assert "los" in message
        assert "residual_norms" in message

    def test_failure_half_way(self, tmp_path, trio, monkeypatch):
        monkeypatch.setattr(report.token_view, "measure", lambda *_, **__: 1 / 0)
        samples = {"books-report": report.read_text("books-report", trio["original"], 1)}
        with pytest.raises(ZeroDivisionError):
            report.write(trio, samples, tmp_path / "r", only=["attention"])
        assert not list(tmp_path.iterdir())

    def test_unknown_command(self):
        with pytest.raises(SystemExit, match="no command draw"):
            main(["draw"])


def test_newest_complete_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seconds in (("old", 1), ("new", 3), ("unfinished", 9)):
        run = tmp_path / "runs" / name
        checkpoint.load_tokenizer("micro").save_pretrained(run / ("ln_free" if name != "unfinished" else "checkpoints"))
        (run / "recipe.yaml").write_text(recipe.dump(dataclasses.replace(recipe.load("micro"), model=name)))
        os.utime(run / "recipe.yaml", (seconds, seconds))
    original, control, ln_free, _ = report._newest()
    assert (original, control, ln_free) == ("new", Path("runs/new/control"), Path("runs/new/ln_free"))


def test_help_needs_no_torch():
    code = "import sys; from analysis.__main__ import main; main([]); assert 'torch' not in sys.modules"
    assert (
        "python -m analysis report"
        in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
