import plotly.colors
import pytest

from analysis import palette


def luminance(colour: str) -> float:
    channels = [channel / 255 for channel in plotly.colors.hex_to_rgb(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("model", ["original", "control", "ln_free"])
@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_the_trio_is_legible_on_light_and_dark_pages(model, page):
    """WCAG 2.1, 1.4.11: graphics have a contrast of at least 3."""
    darker, lighter = sorted(luminance(colour) + 0.05 for colour in (palette.colour(model), page))
    assert lighter / darker >= 3


def test_a_model_keeps_its_colour_and_six_have_their_own(monkeypatch):
    monkeypatch.setattr(palette, "_COLOURS", dict(palette._COLOURS))
    names = ["ours", "original", "h24", "control", "b25", "ln_free"]
    first = [palette.colour(name) for name in names]
    assert len(set(first)) == 6
    assert [palette.colour(name) for name in names] == first
    assert palette.colour("a seventh") in first
