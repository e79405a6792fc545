#!/usr/bin/env bash
# A SLURM of one node on loopback, without systemd, for tests: start.sh DIR starts it as root, with
# all of its files in DIR, and prints what to export; stop.sh DIR ends it. Nothing listens elsewhere.
set -euo pipefail
dir=$(realpath -m "$1")
host=$(hostname -s)
port=${SLURM_TEST_PORT:-26817}
mkdir -p "$dir"/{state,spool,log}
chmod 755 "$dir"
head -c 1024 /dev/urandom > "$dir/munge.key"
chmod 400 "$dir/munge.key"
munged --force --socket="$dir/munge.sock" --key-file="$dir/munge.key" --seed-file="$dir/munge.seed" \
  --log-file="$dir/log/munged.log" --pid-file="$dir/munged.pid" --num-threads=2
memory=$(slurmd -C | sed -n 's/.*RealMemory=\([0-9]*\).*/\1/p')
# cred_expire: a requeued job begins after seconds instead of minutes.
cat > "$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$port
SlurmdPort=$((port + 1))
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
InactiveLimit=0
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=$memory
PartitionName=low Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=10
PartitionName=high Nodes=$host MaxTime=INFINITE PriorityTier=20 PreemptMode=OFF
CONF
export SLURM_CONF="$dir/slurm.conf"
slurmctld -c
slurmd -c
for _ in $(seq 100); do
  [[ $(sinfo -h -p low -o %t 2>/dev/null) == idle ]] && break
  sleep 0.2
done
[[ $(sinfo -h -p low -o %t) == idle ]] || { tail -n 20 "$dir"/log/*.log >&2; exit 1; }
echo "export SLURM_CONF=$SLURM_CONF"
