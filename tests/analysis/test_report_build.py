import dataclasses
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import plotly.io
import pytest
from safetensors.torch import load_file, save_file

from analysis import load_trio, loss, report
from analysis.__main__ import main
from analysis.report import build, tokens
from analysis.report.options import Options
from analysis.texts import read_text
from finetune import checkpoint, recipe


def test_all_tables_and_figures_lie_beside_the_page(made):
    page = (made / "report.html").read_text()
    tables = {f"{a.name}-{table.name}" for a in report.ANALYSES for table in a.tables if a.name != "patching"}
    assert tables <= {path.stem for path in made.glob("*.csv")}
    side_by_side = "generation-text"
    columns = {path.stem: [*pd.read_csv(path).columns] for path in made.glob("*.csv")}
    assert columns.pop(side_by_side) == ["prompt", "prompt_text", "original", "control", "ln_free"]
    assert all("model" in of_table for of_table in columns.values())
    figures = {path.stem for path in made.glob("*.json")}
    assert figures >= tables - {"loss-worst", "edges-edge", side_by_side}
    for figure in figures:
        assert f'data-figure="{figure}"' in page
        json.loads((made / f"{figure}.json").read_text())
    assert not [path for path in made.parent.iterdir() if path.name.startswith(".")]


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
        assert message.startswith("error: ln_free: transformer.h.0.mlp.c_fc.weight contains infinities or NaN")
        assert [path.name for path in tmp_path.iterdir()] == ["broken"]

    def test_pairs_of_different_lengths(self, tmp_path, ln_free, monkeypatch):
        pair = {"clean": "The men", "corrupt": "The man went", "correct": " were", "wrong": " was"}
        (tmp_path / "pairs.json").write_text(json.dumps([pair]))
        monkeypatch.setattr(loss, "measure_tokens", lambda *_, **__: pytest.fail("pairs are looked at too late"))
        flags = "--original", "micro", "--ln-free", ln_free, "--tokens", "256", "--out", "r"
        assert "2 and 3 tokens; both must have the same number" in self.fail(*flags, "--pairs", "pairs.json")
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.json"]

    def test_png_without_kaleido(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        message = self.fail("--original", "micro", "--ln-free", "x", "--png", "--out", "r")
        assert ".[png]" in message
        assert "Chromium" in message

    def test_png_without_a_browser(self, tmp_path, made, monkeypatch):
        def no_browser(*_, **__):
            raise RuntimeError("Kaleido requires Google Chrome\nto be installed.")

        monkeypatch.setattr(plotly.io, "write_images", no_browser)
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

    def test_nothing_to_compare_with(self, micro_trio, tmp_path):
        with pytest.raises(report.ReportError, match="models are original, control, but a report needs"):
            report.write({key: micro_trio[key] for key in ("original", "control")}, {}, tmp_path / "r")

    def test_unknown_analysis(self):
        message = self.fail("--only", "los")
        assert "los" in message
        assert "residual_norms" in message

    def test_failure_half_way(self, tmp_path, micro_trio, monkeypatch):
        monkeypatch.setattr(tokens, "measure", lambda *_, **__: 1 / 0)
        samples = {"books-report": read_text("books-report", micro_trio["original"], 1)}
        with pytest.raises(ZeroDivisionError):
            report.write(micro_trio, samples, Path("reports") / "new" / "r", only=["attention"])
        assert not list(tmp_path.iterdir())

    def test_unknown_command(self):
        with pytest.raises(SystemExit, match="no command draw"):
            main(["draw"])


def test_directories_on_the_way_are_made(tiny, tmp_path):
    models = load_trio(**tiny)
    samples = {"books-validation": read_text("books-validation", models["original"], 64)}
    page = report.write(models, samples, tmp_path / "reports" / "r", only=["attention"])
    assert page.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["reports"]
    assert [path.name for path in page.parent.parent.iterdir()] == ["r"]


def test_newest_complete_run_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, began, done in (("old", 1, 2), ("new", 3, 8), ("begun later", 4, 7), ("without control yet", 9, None)):
        run = tmp_path / "runs" / name
        checkpoint.load_tokenizer("micro").save_pretrained(run / "ln_free")
        of_run = dataclasses.replace(recipe.load("micro"), model=name, revision=f"{name}-1", context=64)
        of_run = dataclasses.replace(of_run, text=dataclasses.replace(of_run.text, prefix="bos"))
        (run / "recipe.yaml").write_text(recipe.dump(of_run))
        os.utime(run / "recipe.yaml", (began, began))
        if done is not None:
            (run / "results.csv").touch()
            os.utime(run / "results.csv", (done, done))
    asked = []

    def load(original, control, ln_free, tokenizer, *, revision, device):
        asked.append((original, control, ln_free, revision))
        assert tokenizer.vocab_size == 4096
        raise Reached

    monkeypatch.setattr(build, "load_trio", load)
    with pytest.raises(Reached):
        report.run()
    (run.parent / "new/original").mkdir()  # of a model in memory, wherever the run began
    with pytest.raises(Reached):
        report.run()
    (run.parent / "new/original").rmdir()
    with pytest.raises(Reached):
        report.run(Options(tokens=256))
    made = "runs/new/control", "runs/new/ln_free", "new-1"
    assert asked == [("new", *made), ("runs/new/original", *made), ("new", *made)]
    options, _ = build._of_newest_run(Options())
    assert (options.context, options.prefix) == (64, "bos")
    options, _ = build._of_newest_run(Options(context=32, prefix="A"))
    assert (options.context, options.prefix) == (32, "A")


def test_texts_are_read_with_the_context_and_the_prefix(micro_trio, monkeypatch):
    asked = []

    def read(name, model, tokens, **how):
        asked.append((name, tokens, how))
        raise Reached

    monkeypatch.setattr(build, "load_trio", lambda *_, **__: micro_trio)
    monkeypatch.setattr(build, "read_text", read)
    flags = ["--context", "64", "--prefix", "bos", "--tokens", "100", "--original", "a", "--ln-free", "b"]
    with pytest.raises(Reached):
        main(["report", *flags])
    assert asked == [("books-report", 100, {"context": 64, "prefix": "bos"})]


class Reached(Exception):  # noqa: N818
    """The models that were asked for are known."""


def test_flags_are_keyword_arguments(monkeypatch, tmp_path):
    """The command line, an `Options` and keyword arguments ask for the same, and nothing is taken that does nothing."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(*models, **options):
        asked.append((models, options))
        raise Reached

    monkeypatch.setattr(build, "load_trio", load)
    with pytest.raises(Reached):
        main(["report", "--original", "a", "--ln-free", "b", "--revision", "v", "--out", "r"])
    with pytest.raises(Reached):
        report.run(original="a", ln_free="b", revision="v", out="r")
    with pytest.raises(Reached):
        report.run(Options(original="a", revision="v"), ln_free="b")
    assert asked[0] == asked[1] == asked[2]
    with pytest.raises(TypeError, match="orginal"):
        report.run(orginal="a")
    with pytest.raises(TypeError, match=r"loaded models and texts, not text, tokens\. Use run\(\)"):
        report.write({}, {}, "r", tokens=1, text=["books-report"])


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
