#!/usr/bin/env bash
# The tests that need a SLURM, on one of this machine's own, which is stopped whatever happens.
set -euo pipefail
here=$(dirname "$0")
packages=(slurmctld slurmd slurm-client munge)
if ! command -v slurmctld slurmd sbatch munged >/dev/null; then
  as_root=()
  (($(id -u))) && as_root=(sudo)
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
(($(id -u) == 0)) || { echo "test-slurm: slurmd needs root" >&2; exit 1; }
dir=$(mktemp -d)
trap '"$here/stop.sh" "$dir"; rm -rf "$dir"' EXIT
eval "$("$here/start.sh" "$dir")"
"${PYTHON:-python}" -m pytest -m slurm "$here" "$@"
