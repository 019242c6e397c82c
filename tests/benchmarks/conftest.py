import pytest


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch: pytest.MonkeyPatch):
    """Let what a benchmark starts use every core, unlike the tests, which run side by side."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
