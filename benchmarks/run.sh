#!/bin/sh
# Run the benchmarks in an environment that also holds the peers: run.sh ENVIRONMENT [GROUP]
set -eu
venv=$1
shift
peers="$venv/peers"
if [ ! -f "$peers/.installed" ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps --target "$peers" -r benchmarks/peers.txt
    touch "$peers/.installed"
fi
"$venv/bin/python" -m benchmarks.data fetch all
# idle threads of a peer's pool would take the core of the one that is timed
export OMP_WAIT_POLICY=PASSIVE
exec "$venv/bin/python" -m benchmarks.runner --peers "$peers" "$@"
