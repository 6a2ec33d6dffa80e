#!/usr/bin/env bash
# The oracles: programs that others wrote, on the same files as the service.
#
#   scripts/oracles.sh                 all of them
#   scripts/oracles.sh fast            transformers, openai and a short lm-eval, which ./test.sh runs
#   scripts/oracles.sh transformers    the merged folder loads as it is; logprobs, generations, tokens, chat template;
#                                      logits of every architecture
#   scripts/oracles.sh openai          the real openai client: streams, choices, log-probabilities, errors, hang-ups
#   scripts/oracles.sh clients         alpaca_eval, evalplus, promptbench and LiveBench's request, on small local data
#   scripts/oracles.sh mergekit        bytes of average and linear merges of the real models
#   scripts/oracles.sh methods         every method against mergekit, and the M3 formulas against numpy, on tiny models
#   scripts/oracles.sh install         only installs what `fast` and scripts/oracle_mergekit.sh need
#   scripts/oracles.sh lm-eval [N]     the real client against the service and lm-eval's own hf backend (N items a task)
#
# Their packages go into environments under target/oracle, with pinned versions.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

which=${1:-all}
case $which in all | fast | install | transformers | openai | clients | mergekit | methods | lm-eval) ;; *) sed -n 2,16p "$0" >&2; exit 2 ;; esac
wanted() {
    case $which in
    all | "$1") true ;;
    fast) [ "$1" = transformers ] || [ "$1" = openai ] || [ "$1" = lm-eval ] ;;
    *) false ;;
    esac
}

if [ "$which" = install ]; then
    mkdir -p "$oracle"
    environment mergekit scripts/requirements-mergekit.txt
    environment transformers scripts/requirements-oracles.txt
    environment openai scripts/requirements-openai.txt
    exit
fi
serve
if wanted mergekit; then
    environment mergekit scripts/requirements-mergekit.txt
    "$environment/bin/python" scripts/oracle_mergekit.py "$url"
fi
if wanted methods; then
    scripts/oracle_mergekit.sh
fi
if wanted transformers; then
    environment transformers scripts/requirements-oracles.txt
    "$environment/bin/python" scripts/oracle_transformers.py "$url"
    "$environment/bin/python" scripts/golden_architectures.py crates/lm/tests/data/architectures.json --check
    "$environment/bin/python" scripts/golden_masked.py crates/lm/tests/data/masked.json --check
fi
if wanted openai; then
    environment openai scripts/requirements-openai.txt
    "$environment/bin/python" scripts/oracle_openai.py "$url"
fi
if wanted clients; then
    environment clients scripts/requirements-clients.txt
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps promptbench==0.0.4
    "$environment/bin/python" scripts/oracle_clients.py "$url"
fi
if wanted lm-eval; then
    environment transformers scripts/requirements-oracles.txt
    if [ "$which" = fast ]; then set -- fast 6; fi
    "$environment/bin/python" scripts/oracle_lmeval.py "$url" "${@:2}"
fi
