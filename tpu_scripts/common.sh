# Sourced by every script here: which slice, and how to reach it. Variables of the environment win:
#   NAME=big TYPE=v5p-128 VERSION=v2-alpha-tpuv5 ZONE=us-east5-a tpu_scripts/create.sh
# Export them once for a terminal: every script needs the same. `--dry-run` as the first argument prints what would be
# run, and runs nothing.
# shellcheck shell=bash disable=SC2034  # the scripts use these variables
NAME=${NAME:-unclip} # of the slice
ZONE=${ZONE:-us-east5-b} # where it is
TYPE=${TYPE:-v6e-8} # accelerator type: v4-N, v5litepod-N, v5p-N or v6e-N
# Runtime. v4: tpu-ubuntu2204-base, v5litepod: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
VERSION=${VERSION:-v2-alpha-tpuv6e}
QUEUED=${QUEUED:-} # 1: a queued resource, which waits until there is room for it
SPOT=${SPOT:-} # 1: cheaper, and may be taken away
FOLDER=unclip_jax # of the code, in the home folder of every host

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=--dry-run
  shift
fi

run() {
  if [[ $dry_run ]]; then echo "${@@Q}"; else "$@"; fi
}

tpu() { # tpu VERB ARGUMENT...
  run gcloud compute tpus tpu-vm "$1" --zone="$ZONE" "${@:2}"
}

queue() { # queue VERB ARGUMENT...
  run gcloud compute tpus queued-resources "$1" --zone="$ZONE" "${@:2}"
}

on_all_hosts() { # on_all_hosts COMMAND
  tpu ssh "$NAME" --worker=all --command="$1"
}

# For hosts: whether a training runs there. A number alone may be another program's since the host was started again.
# shellcheck disable=SC2016  # the hosts expand it
RUNNING='grep -qs unclip_jax.train "/proc/$(cat ~/train.pid 2>/dev/null)/cmdline"'
STOP_IF_RUNNING="if $RUNNING; then
  echo 'error: a training is running here: stop.sh ends it' >&2
  exit 1
fi"
