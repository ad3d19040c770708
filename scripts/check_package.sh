#!/bin/sh
# Build wheel and sdist; use the wheel where there is no source, then run the sdist's own tests.
# check_package.sh PYTHON [TESTS]      all tests by default, which takes as long as `make test`
set -eu
python=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet -c constraints.txt hatchling
rm -rf dist
"$work/build/bin/python" -m hatchling build
size=$(wc -c < "$(ls dist/*.whl)")
echo "wheel: $size bytes"
[ "$size" -lt 8000000 ] || { echo "the wheel has grown beyond 8 MB" && exit 1; }

"$python" -m venv "$work/wheel"
"$work/wheel/bin/pip" install --quiet -c constraints.txt torch==2.13.0 dist/*.whl
"$work/wheel/bin/pip" check
(cd "$work" && "$work/wheel/bin/python" - <<'END'
from importlib.metadata import metadata
from importlib.resources import files

import numpy as np

import skperf
from skperf.datasets import load_fashion_cnn, load_fashion_mnist

fashion = load_fashion_mnist(subset="test")
X, y = fashion.images[:200, None].astype(np.float32) / 255, fashion.target[:200]
scorer = skperf.InfluenceScorer(load_fashion_cnn()).fit(X, y)
assert scorer.influence(X[:2], y[:2]).shape == (2, 200)
assert (files("skperf") / "py.typed").is_file()
assert metadata("skperf")["License-Expression"].startswith("BSD-3-Clause")
try:
    skperf.InfluenceDisplay.from_estimator(scorer, X[:1], y[:1])
except ImportError as error:
    assert "skperf[plot]" in str(error), error
else:
    raise AssertionError("matplotlib is not an ordinary requirement")
print("wheel: works, without matplotlib too")
END
)

# the same environment, so that torch is installed once
mkdir "$work/sdist"
tar xzf dist/*.tar.gz -C "$work/sdist" --strip-components=1
cd "$work/sdist"
"$work/wheel/bin/pip" install --quiet -c constraints.txt '.[test]'
"$work/wheel/bin/pip" check
[ $# -gt 0 ] || set -- tests
"$work/wheel/bin/python" -m pytest -q -m 'not slow' -n 2 "$@"
