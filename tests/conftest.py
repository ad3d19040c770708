"""Settings for all tests."""

import os

# scikit-learn skips its array API checks unless this is set before it is imported
os.environ.setdefault("SCIPY_ARRAY_API", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    there = torch.cuda.is_available() or "SKPERF_TEST_DEVICE" in os.environ
    for item in items:
        if item.get_closest_marker("cuda") and not there:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))
