# Sourced by every script here: which slice or slices, and how to reach them. Variables of the environment win:
#   UNCLIP_NAME=big UNCLIP_TYPE=v5p-128 UNCLIP_VERSION=v2-alpha-tpuv5 UNCLIP_ZONE=us-east5-a tpu_scripts/create.sh
# Export them once for a terminal: every script needs the same. `--dry-run` as the first argument prints what would be
# run, and runs nothing; `--help` prints what a script does.
# shellcheck shell=bash disable=SC2034  # the scripts use these variables
NAME=${UNCLIP_NAME:-unclip} # of the slice
ZONE=${UNCLIP_ZONE:-us-east5-b} # where it is
TYPE=${UNCLIP_TYPE:-v6e-8} # accelerator type: v4-N, v5litepod-N, v5p-N or v6e-N
# Runtime. v4: tpu-ubuntu2204-base, v5litepod: v2-alpha-tpuv5-lite, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
VERSION=${UNCLIP_VERSION:-v2-alpha-tpuv6e}
SLICES=${UNCLIP_SLICES:-1} # such slices, which train together; several are always a queued resource
QUEUED=${UNCLIP_QUEUED:-} # 1: a queued resource, which waits until there is room for it
SPOT=${UNCLIP_SPOT:-} # 1: cheaper, and may be taken away
SLICE=${UNCLIP_SLICE:-0} # of several, the one whose log follow.sh shows
HOST=${UNCLIP_HOST:-0} # of that slice, the one whose log follow.sh shows
PYTHON=${UNCLIP_PYTHON:-3.12} # on the hosts; uv installs it, since their own may be too old
LOOK_EVERY=${UNCLIP_LOOK_EVERY:-30} # seconds between looks of resume.sh at a slice that is being made
WAIT_HOURS=${UNCLIP_WAIT_HOURS:-168} # after which resume.sh no longer waits for a slice
STOP_MINUTES=${UNCLIP_STOP_MINUTES:-60} # after which stop.sh no longer waits for a checkpoint
FOLDER=unclip_jax # of the code, in the home folder of every host

fail() {
  echo "error: $1" >&2
  exit 2
}

check() { # check VARIABLE PATTERN EXPECTED
  local value=${!1}
  [[ $value =~ ^($2)$ ]] || fail "UNCLIP_$1 is '$value': expected $3"
}
check NAME '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' 'small letters, digits and hyphens'
check ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-east5-b'
check TYPE '(v4|v5litepod|v5p|v6e)-[1-9][0-9]*' 'an accelerator type: v4-N, v5litepod-N, v5p-N or v6e-N'
check VERSION '[a-z0-9][-a-z0-9.]*' 'a runtime such as v2-alpha-tpuv6e'
check SLICES '[1-9][0-9]{0,3}' 'a number of slices, 1 or more'
check QUEUED '1?' '1 or nothing'
check SPOT '1?' '1 or nothing'
check SLICE '0|[1-9][0-9]{0,3}' 'the number of a slice, from 0'
check HOST '[0-9]+' 'the number of a host'
check PYTHON '3\.[0-9]+' 'a version of Python such as 3.12'
check LOOK_EVERY '[0-9]+' 'seconds'
check WAIT_HOURS '[0-9]+' 'hours'
check STOP_MINUTES '[0-9]+' 'minutes'
((SLICE < SLICES)) || fail "UNCLIP_SLICE is '$SLICE': expected a number below UNCLIP_SLICES, which is $SLICES"
if ((SLICES > 1)); then QUEUED=1; fi

dry_run=
case ${1:-} in
  --help | -h)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  --dry-run)
    dry_run=--dry-run
    shift
    ;;
esac
for argument; do
  if [[ $argument == --dry-run || $argument == --help || $argument == -h ]]; then fail "$argument must come first"; fi
done

takes_only() { # takes_only OPTION... -- ARGUMENT...: the arguments must be some of the options
  local options=()
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  local argument option known=("${options[@]}" --dry-run --help)
  for argument; do
    for option in "${options[@]}"; do if [[ $argument == "$option" ]]; then continue 2; fi; done
    fail "$(basename "$0") does not take '$argument', only ${known[*]}"
  done
}

run() {
  if [[ $dry_run ]]; then echo "${@@Q}"; else "$@"; fi
}

tpu() { # tpu VERB ARGUMENT...
  run gcloud compute tpus tpu-vm "$1" --zone="$ZONE" "${@:2}"
}

queue() { # queue VERB ARGUMENT...
  run gcloud compute tpus queued-resources "$1" --zone="$ZONE" "${@:2}"
}

# Several slices are nodes of one queued resource: $NAME-0, $NAME-1, ...
EVERY_HOST=(--worker=all)
ONE_HOST=(--worker="$HOST")
if ((SLICES > 1)); then
  EVERY_HOST+=(--node=all)
  ONE_HOST+=(--node="$SLICE")
fi

reach() { # reach ssh|scp ARGUMENT...
  if ((SLICES > 1)); then queue "$@"; else tpu "$@"; fi
}

on_all_hosts() { # on_all_hosts COMMAND
  reach ssh "$NAME" "${EVERY_HOST[@]}" --command="$1"
}

# For hosts: whether a training runs there. A number alone may be another program's since the host was started again.
# shellcheck disable=SC2016  # the hosts expand it
RUNNING='grep -qs unclip_jax.train "/proc/$(cat ~/train.pid 2>/dev/null)/cmdline"'
STOP_IF_RUNNING="if $RUNNING; then
  echo 'error: a training is running here: stop.sh ends it' >&2
  exit 1
fi"
