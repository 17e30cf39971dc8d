#!/usr/bin/env bash
# Shows the log of the training as it grows; Ctrl-C leaves the training running.
#   [UNCLIP_SLICE=0] [UNCLIP_HOST=0] tpu_scripts/follow.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"
takes_only -- "$@"

reach ssh "$NAME" "${ONE_HOST[@]}" --command="tail -n 40 -F train.log"
