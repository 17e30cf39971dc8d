#!/usr/bin/env bash
# Asks the training on every host to stop, and waits until it has: it saves a checkpoint first.
#   tpu_scripts/stop.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"

# shellcheck disable=SC2016  # the hosts expand it
on_all_hosts 'cd ~
kill -TERM $(cat train.pid)
while kill -0 $(cat train.pid) 2>/dev/null; do sleep 1; done
tail -n 3 train.log'
