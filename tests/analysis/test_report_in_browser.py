"""The page in a real browser."""

import shutil

import numpy as np
import pytest
import tokenizers
import torch
from models import random_model
from transformers import PreTrainedTokenizerFast

from analysis import graph, load_trio, report
from analysis.graph import page as graph_page
from analysis.texts import Sample

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

HOSTILE = "</script><img src=x onerror='window.harmed=1'><b>&amp;{{ 1 }}\u2028"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

TIMEOUT = 120_000
"""Milliseconds: a busy machine takes its time to draw all figures."""


def hostile_models():
    """Small models with a tokenizer of hostile tokens."""
    vocabulary = {"<|endoftext|>": 0} | {f"{i}{HOSTILE}": i for i in range(1, 61)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<|endoftext|>")),
        eos_token="<|endoftext|>",
    )
    shape = {"vocab_size": 61, "n_positions": 12}
    return load_trio(random_model(**shape), None, random_model(frozen=True, **shape), tokenizer)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report of all that needs no prompts, in which every text that is data is hostile."""
    models = hostile_models()
    models = {"original": models["original"], HOSTILE: models["original"], "ln_free": models["ln_free"]}
    sample = Sample(torch.randint(61, (4, 12)), np.arange(48).reshape(4, 12) // 20, HOSTILE)
    only = [analysis.name for analysis in report.ANALYSES if analysis.name != "patching"]
    out = tmp_path_factory.mktemp("hostile") / "report"
    return report.write(models, {HOSTILE: sample}, out, names=dict.fromkeys(models, HOSTILE), only=only)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, page_file, request):
    """The page, opened; whatever it complained of or asked for fails the test."""
    width, scheme = getattr(request, "param", (1280, "light"))
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(TIMEOUT)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda asked: wrong.append(asked.url) if asked.url != page_file.absolute().as_uri() else None)
    page.goto(page_file.absolute().as_uri())
    yield page
    page.wait_for_timeout(200)
    page.close()
    assert not wrong


@pytest.mark.parametrize("page", [(1280, "light"), (390, "dark")], indirect=True)
def test_every_figure_is_drawn(page):
    drawn = page.evaluate(
        "[...document.querySelectorAll('.plot')].map((plot) => plot._fullData.length && "
        "plot.querySelectorAll('.scatterlayer .trace, .barlayer .trace, .heatmaplayer image, .boxlayer .trace').length)"
    )
    assert len(drawn) == page.locator("script[data-figure]").count() >= 10
    assert all(drawn)


def test_the_mode_bar_shows_on_hover_above_the_titles(page):
    for plot in page.locator(".plot").all():
        bar = plot.locator(".modebar-group").first
        assert bar.evaluate("(bar) => getComputedStyle(bar).opacity") == "0"
        plot.hover(position={"x": 5, "y": 5})
        page.wait_for_timeout(400)
        assert bar.evaluate("(bar) => getComputedStyle(bar).opacity") == "1"
        bottom = plot.locator(".modebar").evaluate("(bar) => bar.getBoundingClientRect().bottom")
        titles = plot.locator(".annotation-text").all()
        assert all(bottom <= title.evaluate("(title) => title.getBoundingClientRect().top") for title in titles)
    assert page.locator(".modebar-btn").count()
    assert page.get_by_label("Share chart").count() == page.locator("[data-title^=Share]").count() == 0


def test_there_is_no_mode_bar_where_nothing_can_hover(browser, page_file):
    page = browser.new_page(has_touch=True, is_mobile=True)
    page.set_default_timeout(TIMEOUT)
    page.goto(page_file.absolute().as_uri())
    assert page.locator(".plot .main-svg").count()
    assert page.locator(".modebar").count() == 0


@pytest.mark.parametrize("page", [(390, "light"), (1280, "light")], indirect=True)
def test_no_horizontal_scrolling(page):
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_text_is_only_text(page):
    assert page.evaluate("window.harmed") is None
    page.locator(".tokens span").nth(3).hover()
    assert page.locator("img[src=x], .page b:not(:empty)").count() == 0
    assert HOSTILE in page.locator(".tokens span").nth(3).text_content()
    assert "onerror" in page.locator(".details td").first.text_content()
    assert page.evaluate("window.harmed") is None


def test_tokens_can_be_read_with_the_keyboard(page):
    page.locator(".tokens span[tabindex='0']").focus()
    assert "nothing before it" in page.locator(".details").text_content()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement === document.querySelectorAll('.tokens span')[2]")
    assert page.locator(".details tr").count() == 15
    page.keyboard.press("ArrowLeft")
    assert page.locator(".tokens span[aria-selected='true']").count() == 1


def test_colours_of_tokens_follow_the_switches(page):
    colours = "[...document.querySelectorAll('.tokens span')].map((span) => span.style.background).join()"
    seen = {page.evaluate(colours)}
    for name, value in (("measure", "jsd"), ("model", HOSTILE)):
        page.evaluate(
            "([name, value]) => [...document.getElementsByName(name)].find((x) => x.value === value).click()",
            [name, value],
        )
        seen.add(page.evaluate(colours))
    assert len(seen) == 3


@pytest.mark.parametrize("page", [(1280, "dark")], indirect=True)
def test_figures_follow_light_dark_and_print(page):
    ink = "document.querySelector('.plot')._fullLayout.font.color"
    dark = page.evaluate(ink)
    page.emulate_media(color_scheme="light")
    for _ in range(100):  # the page's policy forbids `wait_for_function`, which evaluates strings
        if page.evaluate(ink) != dark:
            break
        page.wait_for_timeout(100)
    else:
        pytest.fail("the figures stayed dark")
    assert page.pdf()[:4] == b"%PDF"


def test_figures_keep_to_their_places_in_print(page):
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_timeout(500)
    bottoms = page.evaluate(
        "[...document.querySelectorAll('.plot')].map((plot) => [plot.getBoundingClientRect().bottom, "
        "Math.max(...[...plot.querySelectorAll('.main-svg')].map((drawn) => drawn.getBoundingClientRect().bottom))])"
    )
    assert len(bottoms) >= 10
    assert all(drawn <= place + 1 for place, drawn in bottoms)


def test_a_graph_by_keyboard(browser, tmp_path):
    graphs = graph.build_all(hostile_models(), torch.arange(1, 5), (3, 4))
    file = graph_page.write(graphs, tmp_path / "out", names={"original": HOSTILE, "ln_free": HOSTILE})
    page, wrong = browser.new_page(), []
    page.set_default_timeout(TIMEOUT)
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(file.absolute().as_uri())
    page.locator("tbody[data-graph] tr").first.focus()
    page.keyboard.press("ArrowDown")
    label = page.evaluate("document.activeElement.cells[0].textContent").split("@")[0]
    layer = page.locator("#graph-original .hoverlayer").filter(has_text=f"{label} at ")
    layer.wait_for(state="attached")  # plotly moves a label some time later
    shown = "".join(layer.all_text_contents())
    assert "logits" in shown
    assert page.evaluate("window.harmed") is None
    assert not wrong
