#!/usr/bin/env bash
# After a preemption: makes the slice again where it is gone, waits until it is READY, sets it up, and launches the same
# command, which goes on from the last checkpoint.
#   [UNCLIP_SPOT=1] [UNCLIP_QUEUED=1] [UNCLIP_SLICES=2] tpu_scripts/resume.sh [--dry-run] ARGUMENTS-OF-LAUNCH
# A slice that is there stays; of several, all are made again where one is gone. `--dry-run` prints what a preempted one
# takes. All that the arguments name must be in a bucket: the hosts' disks are lost with them.
set -euo pipefail
shopt -s inherit_errexit # a state that could not be asked for is not taken for a slice that is gone
source "$(dirname "$0")/common.sh"
here=$(dirname "$0")

workdir=
for ((i = 1; i <= $#; i++)); do
  case ${!i} in
    --workdir=*) workdir=${!i#*=} ;;
    --workdir) ((++i)) && workdir=${!i:-} ;;
  esac
done
if [[ $workdir != gs://* ]]; then
  fail "--workdir is '$workdir', which is lost with the slice: give one like gs://BUCKET/clip"
fi

ask_request() { # prints its state; nothing where there is none
  queue list --filter="name~\"/$NAME\$\"" --format='value(state.state)'
}

ask_slices() { # prints the state of each that is there, a line each
  local number=
  if ((SLICES > 1)); then number='-[0-9]+'; fi
  tpu list --filter="name~\"/$NAME$number\$\"" --format='value(state)'
}

state() { # READY, PREEMPTED, ..., or GONE; of one that is queued and not yet there: that of its request
  local request=ACTIVE slices slice ready=0
  if [[ $QUEUED ]]; then request=$(ask_request); fi
  if [[ $request != ACTIVE ]]; then
    echo "${request:-GONE}"
    return
  fi
  slices=$(ask_slices)
  for slice in $slices; do # of several, the first that is not READY counts
    if [[ $slice != READY ]]; then
      echo "$slice"
      return
    fi
    ready=$((ready + 1))
  done
  if ((ready == SLICES)); then echo READY; elif [[ $QUEUED ]]; then echo ACTIVE; else echo GONE; fi
}

make() {
  if [[ $1 != GONE ]]; then "$here/delete.sh" ${dry_run:+"$dry_run"} --quiet; fi
  "$here/create.sh" ${dry_run:+"$dry_run"}
}

if [[ $dry_run ]]; then
  if [[ $QUEUED ]]; then ask_request; fi
  ask_slices
  make PREEMPTED
else
  said=''
  made=''
  while true; do
    found=$(state)
    if [[ $found != "$said" ]]; then echo "$NAME is $found" >&2; fi
    said=$found
    case $found in
      READY) break ;;
      GONE | PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        if [[ $made ]]; then
          fail "the new slice is $found as well: run this again, or look for room in another zone"
        fi
        make "$found"
        made=1
        ;;
      *)
        if ((SECONDS > 3600 * WAIT_HOURS)); then fail "$NAME is still $found after $WAIT_HOURS hours"; fi
        sleep "$LOOK_EVERY"
        ;;
    esac
  done
fi
"$here/setup.sh" ${dry_run:+"$dry_run"}
"$here/launch.sh" ${dry_run:+"$dry_run"} "$@"
