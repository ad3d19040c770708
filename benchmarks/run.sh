#!/bin/sh
# Run the benchmarks in an environment that also holds the peers: run.sh ENVIRONMENT [NAME]
set -eu
venv=$1
only=${2:-}
peers="$venv/peers"
if [ ! -f "$peers/.installed" ]; then
    "$venv/bin/python" -m pip install --quiet --no-deps --target "$peers" -r benchmarks/peers.txt
    touch "$peers/.installed"
fi
# peers come after the environment's own packages, so that they replace none of them
run() { echo "== $*"; "$venv/bin/python" -c "
import runpy, sys
sys.path.append('$peers')
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)" "$@"; }
wanted() { [ -z "$only" ] || [ "$only" = "$1" ]; }

"$venv/bin/python" -m benchmarks.data fetch all
if wanted backbone; then run benchmarks.backbone; fi
if wanted cluster; then run benchmarks.cluster; fi
if wanted performative; then
    run benchmarks.performative
    run benchmarks.performative_selection
    run benchmarks.performative_real
    run benchmarks.performative_speed
fi
if wanted influence; then
    OMP_WAIT_POLICY=PASSIVE run benchmarks.influence --search --memory
    run benchmarks.influence_damping
    run benchmarks.influence_use
fi
if wanted components; then
    for network in resnet rnet minilm; do
        for fraction in 0.1 0.05; do
            run benchmarks.components curve --network $network --fraction $fraction
        done
    done
    for seed in 1 2; do
        for fraction in 0.1 0.05; do
            run benchmarks.components curve --network rnet --fraction $fraction --seed $seed
        done
    done
    run benchmarks.components curve --network lite0 --n-test 60
    run benchmarks.components race
    run benchmarks.components speed
    run benchmarks.components coverage
    run benchmarks.components plot
    run benchmarks.components_edits
fi
if wanted reprogramming; then
    run benchmarks.reprogramming --seeds 0 1 2
    run benchmarks.reprogramming --encoder lite0 --seeds 0 1 2
    run benchmarks.reprogramming_peers
    run benchmarks.reprogramming_cost
fi
