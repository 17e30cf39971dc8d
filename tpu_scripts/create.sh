#!/usr/bin/env bash
# Makes a slice, or several. It costs money from now on: delete.sh ends that.
#   [UNCLIP_SPOT=1] [UNCLIP_QUEUED=1] [UNCLIP_SLICES=2] tpu_scripts/create.sh [--dry-run]
# A queued one costs from when it is there, and the command that tells is printed; several are always queued.
# UNCLIP_NAME, UNCLIP_TYPE, UNCLIP_VERSION, UNCLIP_ZONE, UNCLIP_SLICES, UNCLIP_SPOT and UNCLIP_QUEUED are explained in
# common.sh; the project is gcloud's current one.
set -euo pipefail
source "$(dirname "$0")/common.sh"
takes_only -- "$@"

options=(--accelerator-type="$TYPE")
if [[ $SPOT ]]; then options+=(--spot); fi
if [[ $QUEUED ]]; then
  nodes=(--node-id="$NAME")
  if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$NAME"); fi
  queue create "$NAME" "${nodes[@]}" --runtime-version="$VERSION" "${options[@]}"
  echo "asked for; there when this says ACTIVE:" >&2
  echo "gcloud compute tpus queued-resources describe $NAME --zone=$ZONE --format='value(state.state)'" >&2
else
  tpu create "$NAME" --version="$VERSION" "${options[@]}"
fi
