"""The pytest plugin `anychip-conformance`: inert unless --device names a platform."""

from __future__ import annotations

import pytest

from anychip.errors import DeviceUnavailable
from anychip.plugin_api import PlatformManifest
from anychip.registry.plugins import load_plugins


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("anychip")
    group.addoption("--device", default=None, help="the platform that anychip's conformance suite judges")


@pytest.fixture(scope="session")
def manifest(request: pytest.FixtureRequest) -> PlatformManifest:
    """The judged platform's manifest."""
    name = request.config.getoption("--device")
    if name is None:
        raise pytest.UsageError("the conformance suite needs --device NAME")
    plugins = load_plugins()
    if name not in plugins.platforms:
        raise DeviceUnavailable(f"device {name!r} is not installed; there are {', '.join(sorted(plugins.platforms))}")
    return plugins.platforms[name]
