#!/usr/bin/env bash
# Asks the training on every host to stop, and waits until it has: it saves a checkpoint first.
#   tpu_scripts/stop.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"

on_all_hosts "cd ~
$RUNNING && kill -TERM \$(cat train.pid)
while $RUNNING; do sleep 1; done
tail -n 3 train.log"
