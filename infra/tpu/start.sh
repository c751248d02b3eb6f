#!/usr/bin/env bash
# Startup script of a TPU VM. It runs at every boot: installs saex-pipe where it is missing, then runs the command that
# the VM's metadata hold, which continues where an earlier VM was stopped. Metadata keys:
#   saex-repository   what git clones, with constraints.txt in it
#   saex-command      arguments of saex-pipe, in shell syntax: harvest recipe.toml --out gs://bucket/run
set -euo pipefail

metadata() {
  curl -sf -H "Metadata-Flavor: Google" "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

home=/opt/saex-pipe
export HOME=${HOME:-/root} SAEX_CACHE=$home/cache
if [ ! -e "$home/installed" ]; then
  rm -rf "$home"
  git clone --quiet --depth 1 "$(metadata saex-repository)" "$home/source"
  # The system's Python is 3.10 on Ubuntu 22.04, for which pip would find a JAX of years ago, and say nothing.
  python3 -m pip install --quiet uv
  python3 -m uv venv --quiet --python 3.12 --seed "$home/venv"
  "$home/venv/bin/pip" install --quiet -c "$home/source/constraints.txt" "$home/source[tpu,gcs]"
  touch "$home/installed"
fi

# Without a TPU stop rather than compute on the host.
export JAX_PLATFORMS=tpu,cpu
cd "$home/source"
# exec: systemd sends SIGTERM to the processes of a unit when the VM goes away, and saex-pipe must get it once.
eval "exec '$home/venv/bin/saex-pipe' $(metadata saex-command)"
