import os
import tempfile
from collections.abc import Callable

_cache = tempfile.TemporaryDirectory(prefix="noln-tests-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and what they start inherits it
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = _cache.name

import ipaddress  # noqa: E402
import socket  # noqa: E402

import pytest  # noqa: E402
import shape_checks  # noqa: E402
from hypothesis import settings  # noqa: E402
from transformers import GPT2LMHeadModel  # noqa: E402

shape_checks.install("finetune", "analysis")
settings.register_profile("fuzz")  # `make fuzz`

import models  # noqa: E402  # imports finetune, whose functions are to be checked

SLOW_FIXTURES = {"done", "folded", "made", "browser", "wheel"}
"""A whole sweep, a second run, a whole report, one in a browser, and the packages built and installed."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a slow fixture as slow."""
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch):
    """Fail a test that calls anyone but this computer, even if whoever called gets over the refusal."""
    refused = []

    def is_local(host: str | bytes | None) -> bool:
        host = host.decode() if isinstance(host, bytes) else host
        if host in (None, "", "localhost", socket.gethostname()):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
        except ValueError:
            return False

    def guard(owner: object, name: str, host_of: Callable) -> None:
        original = getattr(owner, name)

        def guarded(*args, **kwargs):
            if not is_local(host := host_of(*args, **kwargs)):
                refused.append(host)
                raise OSError(f"no network in tests: {host}")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("connect", "connect_ex"):
        guard(socket.socket, name, lambda self, address: None if self.family == socket.AF_UNIX else address[0])
    guard(socket, "getaddrinfo", lambda host, *_, **__: host)
    yield
    assert not refused


@pytest.fixture
def make_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Make a small random GPT-2: `models.random_model`."""
    return models.random_model
