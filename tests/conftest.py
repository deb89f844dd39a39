"""The project's files are modules at its top level, wherever pytest is started from."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars; read once, when torch imports tqdm

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(autouse=True, scope="session")
def caches_of_their_own(tmp_path_factory):
    """The tests leave nothing in the caches of whoever runs them, and find nothing there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Most models here are so small that waiting for a second thread costs more than it wins: so
    one, or as many as OMP_NUM_THREADS says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)  # which train.main sets
