"""Shards for the training of `training.py`."""

import pytest

from avar_lightning.data.writer import write_shards
from tests.data.conftest import make_sample


@pytest.fixture(scope="session")
def write(tmp_path_factory):
    """A folder of shards with so many samples, of different lengths."""

    def write(count):
        folder = tmp_path_factory.mktemp("shards")
        write_shards([make_sample(index, words=1 + index * 5 % 11) for index in range(count)], folder)
        return str(folder)

    return write
