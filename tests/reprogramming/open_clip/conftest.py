"""Run by ``make test-open-clip`` in an environment of its own; collected nowhere else."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("open_clip") else ["test_*.py"]
