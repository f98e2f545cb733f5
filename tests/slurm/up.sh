#!/usr/bin/env bash
# Bring up a real Slurm on this machine alone, without systemd: munged, slurmctld and one slurmd, on loopback. As root.
#   SLURM_TEST_DIR=… tests/slurm/up.sh      prints the path of slurm.conf; everything but munge's key lies in that folder
# What it needs: apt-get install slurmctld slurmd slurm-client munge
set -euo pipefail
D=${SLURM_TEST_DIR:?a folder of its own}
HOST=$(hostname -s)
# Two jobs run at a time, whatever the machine; nproc would say what OMP_NUM_THREADS says.
CPUS=$(getconf _NPROCESSORS_ONLN)
[ "$CPUS" -ge 2 ] || CPUS=2
MEMORY=$(($(awk '/MemTotal/{print $2}' /proc/meminfo) / 1024 - 512))
mkdir -p "$D"/{state,spool,log,run}
chmod 755 "$D" "$D"/*
getent hosts "$HOST" >/dev/null || echo "127.0.0.1 $HOST" >>/etc/hosts

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
wait_for() { # SECONDS COMMAND…
    local end=$((SECONDS + $1)); shift
    until "$@"; do
        [ $SECONDS -lt $end ] || { echo "up.sh: in vain: $*" >&2; tail -n 20 "$D"/log/*.log >&2; exit 1; }
        sleep 0.2
    done
}

# munge: one that runs already is used, and not stopped afterwards.
munge_works() { munge -n 2>/dev/null | unmunge >/dev/null 2>&1; }
if ! munge_works; then
    [ -s /etc/munge/munge.key ] || dd if=/dev/urandom of=/etc/munge/munge.key bs=1 count=1024 status=none
    chown munge:munge /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
    install -d -o munge -g munge -m 755 /run/munge
    install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge
    setpriv --reuid=munge --regid=munge --clear-groups /usr/sbin/munged --force
    wait_for 20 munge_works
    cp /run/munge/munged.pid "$D/run/munged.pid"
fi

# cred_expire: a requeued job would wait two minutes otherwise. No cgroups, no accounting: neither is there in a container.
cat >"$D/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
InactiveLimit=0
MinJobAge=600
KillWait=5
OverTimeLimit=0
Waittime=0
CompleteWait=0
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd.log
PropagateResourceLimits=NONE
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$MEMORY State=UNKNOWN
PartitionName=main Nodes=$HOST Default=YES MaxTime=1:00:00 DefaultTime=10 State=UP OverSubscribe=NO
CONF
export SLURM_CONF=$D/slurm.conf
/usr/sbin/slurmctld -f "$SLURM_CONF"
wait_for 60 sh -c 'scontrol ping 2>/dev/null | grep -q UP'
/usr/sbin/slurmd -f "$SLURM_CONF" -N "$HOST"
is_up() {
    case $(sinfo -h -n "$HOST" -p main -o %T 2>/dev/null) in
        idle | mixed | allocated | completing) return 0 ;;
        down* | drained*) scontrol update NodeName="$HOST" State=RESUME 2>/dev/null || true ;;
    esac
    return 1
}
wait_for 60 is_up
echo "$SLURM_CONF"
