#!/usr/bin/env bash
# Deletes the slice and the disks of its hosts, after asking; copy what you want to keep first:
#   gcloud compute tpus tpu-vm scp --recurse --zone=ZONE NAME:runs/clip/bundle .
#   tpu_scripts/delete.sh [--dry-run]
set -euo pipefail
source "$(dirname "$0")/common.sh"

tpu delete "$NAME"
