"""What tests are fuzzed with."""

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=500 if settings.get_current_profile_name() == "fuzz" else 50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
"""What fuzzing tests are tried with: `make fuzz` has ten times as many examples as the suite."""

numbers = st.sampled_from(
    [0, -1, 1, 2, 10**6, 2**31, 2**63, 10**30, 0.0, -0.5, 0.5, 1e-300, 1e308, math.inf, -math.inf, math.nan]
)
words = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\0",
        "~",
        "..",
        "é\ud7ff",
        "a" * 300,
        "mlp",
        "h.0.qk",
        "h.99.v",
        "auto",
        "uniform",
        "1e3",
        "<b>",
        "---",
    ]
)
leaves = st.one_of(st.none(), st.booleans(), numbers, words, st.integers(), st.floats(), st.text(max_size=5))
anything = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)
"""Values at and beyond limits, of every type that YAML and JSON have."""
