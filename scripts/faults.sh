#!/usr/bin/env bash
# The fault tests of docs/RELIABILITY.md, one by one and with what they print: faults.sh [--long] [NAME...]. Without names all.
# --long: as often as the table there says; without it as often as with all other tests. CAULDRON_SEED repeats a failure.
#
#   kills       kill -9 at random moments, with a ledger of what was acknowledged
#   publish     an abort at each step of a merge and its publishing
#   nodes       two nodes on one PostgreSQL queue that race; one is stopped past its lease and wakes again
#   database    PostgreSQL stops and starts; its connections are killed under load
#   disk        a full disk under the cache, and under the database (needs root, for small file systems in memory)
#   damage      every kind of damage to a checkpoint
#   cancels     cancellations at random moments
#   remote      a bucket behind the cache: damage, a killed fetch, a bucket that is away
#   simulation  random schedules of the queue beside a model
set -euo pipefail
cd "$(dirname "$0")/.."
long=0
names=()
for argument in "$@"; do
    case $argument in
        --long) long=1 ;;
        -h | --help) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit ;;
        *) names+=("$argument") ;;
    esac
done
[ ${#names[@]} -gt 0 ] || names=(kills publish nodes database disk damage cancels remote simulation)
if [ $long = 1 ]; then
    export CAULDRON_KILLS=${CAULDRON_KILLS:-1000} CAULDRON_CANCELS=${CAULDRON_CANCELS:-200}
    export CAULDRON_POSTGRES_SECONDS=${CAULDRON_POSTGRES_SECONDS:-120} CAULDRON_SCHEDULES=${CAULDRON_SCHEDULES:-100000}
fi
export CAULDRON_REQUIRE_POSTGRES=1 CAULDRON_REQUIRE_S3=1
scripts/s3_server.sh
for name in "${names[@]}"; do
    case $name in
        kills) tests=faults::kills_at_random_moments ;;
        publish) tests=faults::a_kill_at_each_step ;;
        nodes) tests=faults::two_nodes ;;
        database) tests=faults::a_database_that_stops\ faults::database_connections ;;
        disk) tests=faults::a_full_ ;;
        damage) tests=faults::every_kind_of_damage ;;
        cancels) tests=faults::cancellations ;;
        remote) tests=remote:: ;;
        simulation) tests=simulation:: ;;
        *) echo "faults.sh: no test named $name" >&2; exit 2 ;;
    esac
    echo "== $name" >&2
    # shellcheck disable=SC2086 # several filters
    cargo test --locked --test service -- $tests --nocapture --test-threads 1
done
