#!/usr/bin/env bash
# Runs a command, again and again while it ends with status 75: vdm.main's "saved after a signal,
# start me again". Any other status, 0 or an error, ends it, with that status.
#
#   bash launch/restart.sh [--dry_run] python -m vdm.main --config=configs/imagenet64.py --workdir=W
set -uo pipefail
source "$(dirname "$0")/common.sh"

dry_run=
[[ ${1-} != --help ]] || help
[[ ${1-} != --dry_run ]] || { dry_run=true; shift; }
(($#)) || die 'The command is missing; give for example python -m vdm.main --config=configs/digits.py'
while true; do
  run "$@"
  status=$?
  ((status == 75)) || exit "$status"
  echo 'status 75: saved, starting again'
done
