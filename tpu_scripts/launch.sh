#!/usr/bin/env bash
# Starts one training command on every host, from its home folder; it goes on when this terminal closes.
#   tpu_scripts/launch.sh [--dry-run] --config=configs/clip.py:paper --workdir=runs/clip [--config.KEY=VALUE ...]
# Each host writes ~/train.log (see follow.sh). The same command again goes on from the last checkpoint.
set -euo pipefail
source "$(dirname "$0")/common.sh"
if (($# == 0)); then
  echo "error: give the arguments of unclip_jax.train, such as --config=configs/clip.py:paper --workdir=runs/clip" >&2
  exit 2
fi

on_all_hosts "cd ~
if [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null; then
  echo 'error: a training is running here: stop.sh ends it' >&2
  exit 1
fi
nohup ~/venv/bin/python -m unclip_jax.train ${*@Q} >train.log 2>&1 </dev/null &
echo \$! >train.pid"
