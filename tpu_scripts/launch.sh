#!/usr/bin/env bash
# Starts one training command on every host, from its home folder; it goes on when this terminal closes.
#   tpu_scripts/launch.sh [--dry-run] --config=configs/clip.py:paper --workdir=gs://BUCKET/clip [--config.KEY=VALUE ...]
# The hosts of a slice find each other. Each writes ~/train.log (see follow.sh). The same command again goes on from the
# last checkpoint.
set -euo pipefail
source "$(dirname "$0")/common.sh"
if (($# == 0)); then
  echo "error: give the arguments of unclip_jax.train, such as --config=configs/clip.py:paper --workdir=runs/clip" >&2
  exit 2
fi

on_all_hosts "cd ~
$STOP_IF_RUNNING
nohup ~/venv/bin/python -m unclip_jax.train ${*@Q} >train.log 2>&1 </dev/null &
echo \$! >train.pid"
