#!/usr/bin/env bash
# Asks the training on every host to stop, and waits until it has: it saves a checkpoint first.
#   tpu_scripts/stop.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
takes_only -- "$@"

on_all_hosts "cd ~
$RUNNING && kill -TERM \$(cat train.pid)
end=\$((SECONDS + 60 * $STOP_MINUTES))
while $RUNNING; do
  if [ \$SECONDS -gt \$end ]; then echo 'error: it has not stopped in $STOP_MINUTES minutes' >&2; exit 1; fi
  sleep 1
done
tail -n 3 train.log"
