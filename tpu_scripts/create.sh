#!/usr/bin/env bash
# Makes a slice. It costs money from now on: delete.sh ends that.
#   [SPOT=1] tpu_scripts/create.sh [--dry-run]       (SPOT: cheaper, and may be taken away)
# NAME, TYPE, VERSION and ZONE are explained in common.sh; the project is gcloud's current one.
set -euo pipefail
source "$(dirname "$0")/common.sh"

options=(--accelerator-type="$TYPE" --version="$VERSION")
if [[ ${SPOT:-} ]]; then options+=(--spot); fi
tpu create "$NAME" "${options[@]}"
