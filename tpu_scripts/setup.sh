#!/usr/bin/env bash
# Puts the last commit of this checkout on every host of the slice or slices and installs it there, in ~/venv.
#   tpu_scripts/setup.sh [--dry-run]
# Run again after a commit, it replaces the code. The files themselves are copied, so no host needs access to git.
set -euo pipefail
source "$(dirname "$0")/common.sh"
takes_only -- "$@"

code=$(mktemp -d)
trap 'rm -rf "$code"' EXIT
run git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$code/$FOLDER.tar.gz" HEAD
reach scp "$code/$FOLDER.tar.gz" "$NAME:" "${EVERY_HOST[@]}"
on_all_hosts "set -e
$STOP_IF_RUNNING
rm -rf ~/$FOLDER && mkdir ~/$FOLDER && tar -xzf ~/$FOLDER.tar.gz -C ~/$FOLDER
[ -x ~/.local/bin/uv ] || curl --max-time 300 -LsSf https://astral.sh/uv/install.sh | sh
[ -d ~/venv ] || ~/.local/bin/uv venv --python $PYTHON ~/venv
cd ~/$FOLDER && ~/.local/bin/uv pip install --python ~/venv/bin/python -e '.[data,tpu]'
~/venv/bin/python -c 'import jax; print(jax.__version__)'"
