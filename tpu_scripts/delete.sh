#!/usr/bin/env bash
# Deletes the slice, or all of several, and the disks of the hosts, after asking; copy what you want to keep first:
#   gcloud compute tpus tpu-vm scp --recurse --zone=ZONE NAME:runs/clip/bundle .
#   [UNCLIP_QUEUED=1] [UNCLIP_SLICES=2] tpu_scripts/delete.sh [--dry-run] [--quiet]       (--quiet: does not ask)
# The variables as they were for create.sh: the request of a queued one is deleted too, or it would keep the name.
set -euo pipefail
source "$(dirname "$0")/common.sh"
takes_only --quiet -- "$@"

if [[ $QUEUED ]]; then
  queue delete "$NAME" --force "$@"
else
  tpu delete "$NAME" "$@"
fi
