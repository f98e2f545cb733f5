#!/usr/bin/env bash
# Stop what up.sh started, by process id, after cancelling its jobs. May be run again.
set -uo pipefail
D=${SLURM_TEST_DIR:?the folder that up.sh was given}
export SLURM_CONF=$D/slurm.conf
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
if alive "$D/run/slurmctld.pid"; then
    timeout 20 squeue -h -o %A 2>/dev/null | xargs -r timeout 20 scancel 2>/dev/null
    for _ in $(seq 100); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
fi
stop() {
    alive "$1" || return 0
    local pid; pid=$(cat "$1")
    kill "$pid"
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null
    rm -f "$1"
}
stop "$D/run/slurmd.pid"
stop "$D/run/slurmctld.pid"
stop "$D/run/munged.pid"
exit 0
