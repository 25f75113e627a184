"""One folder a family for all tests, and the matrix of what passed: `pytest tests/families -m '' --write-matrix`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from avar_lightning.data import SampleEncoder
from avar_lightning.model import VLMConfig, load_model
from avar_lightning.processing import load_processor
from tests.families.matrix import Matrix
from tests.families.small import FAMILIES

CORE = ("Qwen3-VL", "SmolVLM", "Llama-3.2-Vision")
"""Checked by default, since nothing else in the suite has their layouts."""

ALL = [pytest.param(name, marks=() if name in CORE else pytest.mark.slow) for name in FAMILIES]
"""Each family, those that are not checked by default as slow tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write docs/families.md from the tests of this run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "capability(name): a column of docs/families.md")
    if config.getoption("--write-matrix", default=False):
        config.pluginmanager.register(Matrix(), "matrix")


class Opened:
    """A family's folder, opened as a user would."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.small = name, folder, FAMILIES[name]
        self.processor: Any = load_processor(folder)

    def model(self, **options: Any) -> Any:
        return load_model(VLMConfig(str(self.folder), **options))

    def encode(self, sample: Any, **options: Any) -> Any:
        return SampleEncoder(self.processor, **options)(sample)


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Opened]:
    @cache
    def open_family(name: str) -> Opened:
        folder = tmp_path_factory.mktemp("family") / name.replace(" ", "-")
        return Opened(name, FAMILIES[name].write(folder))

    return open_family


@pytest.fixture
def family(request: pytest.FixtureRequest, opened: Callable[[str], Opened]) -> Opened:
    torch.manual_seed(0)
    return opened(request.param)
