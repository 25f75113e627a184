import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from avar_lightning.data import DemoDataModule

# Tiny models: threads cost more than they bring, and much more on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_seed_of_another_test():
    """`seed_everything`, which a command line calls, leaves its seed in the environment, where processes find it."""
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def no_process_group_of_another_test():
    """A run that was refused after its processes had met leaves their group, which forked processes inherit."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """Shards of 64 training and 10 validation samples, written once."""
    folder = tmp_path_factory.mktemp("demo")
    demo_data(folder).prepare_data()
    return folder


def demo_data(folder, **options):
    options = {
        "num_train": 64,
        "num_val": 10,
        "num_test": 10,
        "batch_size": 8,
        "num_workers": 0,
        "shuffle_window": 16,
    } | options
    return DemoDataModule(str(folder), **options)


@pytest.fixture
def make_data(demo_folder):
    """A data module over the shared demo shards."""
    return lambda **options: demo_data(demo_folder, **options)
