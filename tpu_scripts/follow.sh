#!/usr/bin/env bash
# Shows the log of the training as it grows; Ctrl-C leaves the training running.
#   [HOST=0] tpu_scripts/follow.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"

tpu ssh "$NAME" --worker="${HOST:-0}" --command="tail -n 40 -F train.log"
