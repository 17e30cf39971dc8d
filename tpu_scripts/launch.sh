#!/usr/bin/env bash
# Starts one training command on every host, from its home folder; it goes on when this terminal closes.
#   tpu_scripts/launch.sh [--dry-run] --config=configs/clip.py:paper --workdir=gs://BUCKET/clip [--config.KEY=VALUE ...]
# The hosts of a slice, and of several, find each other. Each writes ~/train.log (see follow.sh) and keeps the logs of
# earlier launches, as train.TIME.log. The same command again goes on from the last checkpoint.
set -euo pipefail
source "$(dirname "$0")/common.sh"
if (($# == 0)); then
  fail "give the arguments of unclip_jax.train, such as --config=configs/clip.py:paper --workdir=runs/clip"
fi

on_all_hosts "cd ~
$STOP_IF_RUNNING
if [ -e train.log ]; then mv train.log \"train.\$(date -u -r train.log +%Y%m%d-%H%M%S).log\"; fi
nohup ~/venv/bin/python -m unclip_jax.train ${*@Q} >train.log 2>&1 </dev/null &
echo \$! >train.pid"
