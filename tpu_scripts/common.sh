# Sourced by every script here: which slice, and how to reach it. Variables of the environment win:
#   NAME=big TYPE=v5litepod-8 VERSION=v2-alpha-tpuv5-lite ZONE=us-west4-a tpu_scripts/create.sh
# `--dry-run` as the first argument prints what would be run, and runs nothing.
# shellcheck shell=bash disable=SC2034  # the scripts use these variables
NAME=${NAME:-unclip} # of the slice
ZONE=${ZONE:-us-east5-b} # where it is
TYPE=${TYPE:-v6e-8} # accelerator type
VERSION=${VERSION:-v2-alpha-tpuv6e} # runtime of that type; v5litepod: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5
FOLDER=unclip_jax # of the code, in the home folder of every host

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

run() {
  if [[ $dry_run ]]; then echo "${@@Q}"; else "$@"; fi
}

tpu() { # tpu VERB ARGUMENT...
  run gcloud compute tpus tpu-vm "$1" --zone="$ZONE" "${@:2}"
}

on_all_hosts() { # on_all_hosts COMMAND
  tpu ssh "$NAME" --worker=all --command="$1"
}
