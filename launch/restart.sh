#!/usr/bin/env bash
# Runs a command, again and again while it ends with status 75: vdm.main's "saved after a signal,
# start me again". Any other status, 0 or an error, ends it, with that status. A signal to this script
# (SIGTERM, SIGHUP, Ctrl-C) goes to the command, and nothing is started again.
#
#   bash launch/restart.sh [--dry_run] python -m vdm.main --config=configs/imagenet64.py --workdir=W
set -uo pipefail
source "$(dirname "$0")/common.sh"

dry_run=
[[ ${1-} != --help ]] || help
[[ ${1-} != --dry_run ]] || { dry_run=true; shift; }
(($#)) || die 'The command is missing; give for example python -m vdm.main --config=configs/digits.py'
if [[ $dry_run ]]; then
  run "$@"
  exit
fi
stopped='' signalled='' child=''
# shellcheck disable=SC2329  # the traps call it
pass_on() {
  stopped=true signalled=true
  [[ ! $child ]] || kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM HUP INT
while true; do
  quoted "$@"
  "$@" &
  child=$!
  while true; do # a signal ends the wait, not the command; its status waits for the next one
    signalled=''
    wait "$child"
    status=$?
    [[ $signalled ]] || break
  done
  if [[ $stopped ]] || ((status != 75)); then exit "$status"; fi
  echo 'status 75: saved, starting again'
done
