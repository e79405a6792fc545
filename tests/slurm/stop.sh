#!/usr/bin/env bash
# Ends what start.sh DIR has started, and its jobs.
dir=$(realpath -m "$1")
export SLURM_CONF="$dir/slurm.conf"
scancel --quiet --me 2>/dev/null
for _ in $(seq 75); do  # the daemons clear up after the jobs
  [[ -z $(squeue -h 2>/dev/null) ]] && break
  sleep 0.2
done
for name in slurmd slurmctld munged; do
  [[ -s $dir/$name.pid ]] && kill "$(<"$dir/$name.pid")" 2>/dev/null
done
for name in slurmd slurmctld munged; do
  for _ in $(seq 50); do
    [[ -s $dir/$name.pid ]] && kill -0 "$(<"$dir/$name.pid")" 2>/dev/null || break
    sleep 0.1
  done
done
for pid in $(pgrep slurmstepd); do  # left behind by a job that was killed
  grep -qsF "$dir/" "/proc/$pid/environ" && kill -9 "$pid"
done
true
