import base64
import functools
import html
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest

from analysis import load_trio, patching, report
from analysis.report import page
from analysis.report.options import Options
from analysis.report.sections import Table, benchmark_section
from analysis.texts import read_text


def test_the_page_is_whole_and_small(made):
    whole = (made / "report.html").read_text()
    assert len(whole.encode()) < 15e6
    assert whole.count("* plotly.js v") == 1
    assert not re.search(r"""<(script|img|link|iframe)[^>]+(src|href)=["'](?!data:)""", whole)
    assert "nothing prepended" in whole
    assert "transformers " in whole
    assert whole.count('<article class="card">') == 7
    assert "How far the sum over all components is from the logit" in whole
    assert "The prompt, token by token: " in whole
    assert "Largest change of entropy by one neuron" in whole
    assert "0 of 2 pairs are patched" in whole
    assert "patching.measure_pairs" in whole
    assert "patching.measure(" not in whole
    assert "&lt;NA&gt;" not in whole


@pytest.mark.slow
@pytest.mark.parametrize("name", [analysis.name for analysis in report.ANALYSES])
def test_the_python_of_each_section_makes_its_tables(name, tiny, tmp_path, monkeypatch):
    models = load_trio(**tiny)
    samples = {"books-validation": read_text("books-validation", models["original"], 128)}
    # Pairs that these models can do: what is patched is not what is tested here.
    monkeypatch.setattr(patching, "measure_pairs", functools.partial(_solved, patching.measure_pairs))
    out = report.write(models, samples, tmp_path / "r", names=tiny, only=[name]).parent
    analysis = next(analysis for analysis in report.ANALYSES if analysis.name == name)
    shown = []
    monkeypatch.setattr(go.Figure, "show", lambda figure: shown.append(figure))
    code = re.search(r"<pre tabindex=\"0\"><code>(.*?)</code></pre>", (out / "report.html").read_text(), re.DOTALL)
    exec(html.unescape(code[1]), {})
    plotted = [table for table in analysis.tables if table.plot is not None]
    for table, figure in zip(plotted, shown, strict=True):
        saved = plotly.io.read_json(out / f"{name}-{table.name}.json")
        for one, other in zip(figure.data, saved.data, strict=True):
            if isinstance(other.y, dict):
                y = np.frombuffer(base64.b64decode(other.y["bdata"]), other.y["dtype"])
                np.testing.assert_allclose(np.asarray(one.y, float), y, rtol=1e-4, atol=1e-5)


def _solved(measure, *args, **options):
    return measure(*args, **options).assign(clean_difference=1.0, corrupt_difference=-1.0)


def test_the_python_of_a_revision_and_of_pairs():
    analysis = next(analysis for analysis in report.ANALYSES if analysis.module is patching)
    options = Options(revision="v1", pairs=Path("p.json"))
    code = page.python_code(analysis, {"original": "gpt2", "ln_free": "x"}, options, "t", 10)
    assert "load_trio('gpt2', None, 'x', revision='v1')" in code
    assert "read_text('t', models['original'], 10)" in code
    assert "choose_pairs(tokenizer, 'p.json')" in code
    assert "patching.measure_pairs(models, pairs, tokenizer)" in code


def test_the_python_of_a_context_and_a_prefix():
    analysis = next(analysis for analysis in report.ANALYSES if analysis.module is patching)
    options = Options(context=64, prefix="bos")
    code = page.python_code(analysis, {"original": "gpt2", "ln_free": "x"}, options, "t", 10)
    assert "read_text('t', models['original'], 10, context=64, prefix='bos')" in code
    assert "patching.measure_pairs(models, pairs, tokenizer, prefix='bos')" in code
    assert "only=patching.solved_by_all(frame), prefix='bos')" in code
    section = benchmark_section(["hellaswag"])
    code = page.python_code(section, {"original": "gpt2", "ln_free": "x"}, options, "t", 10)
    assert "benchmarks.measure(models, ['hellaswag'], prefix='bos')" in code


def test_cells_show_numbers_shortly():
    numbers = pd.array([1, None, 3], "Int64")
    frame = pd.DataFrame({"a": [0.000123456, math.nan, -2.0], "b": ["x\ny", "<b>", ""], "c": numbers})
    table = page.table_data(Table("t", "T", None, ""), "a-t", frame, None)
    assert table["rows"] == [["0.0001235", "x⏎y", "1"], ["", "<b>", ""], ["−2", "", "3"]]
    assert [column["is_text"] for column in table["columns"]] == [False, True, False]
