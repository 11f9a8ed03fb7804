"""Pytest on the pretended GPU: ``-p tests.pretended_gpu.plugin``. A race, or an error of a kernel, fails its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.pretended_gpu import device


def pytest_configure() -> None:
    device.install()


@pytest.fixture(autouse=True)
def nothing_to_complain_of() -> Iterator[None]:
    device.complaints()
    yield
    told = device.complaints()
    if told:
        pytest.fail(told, pytrace=False)
