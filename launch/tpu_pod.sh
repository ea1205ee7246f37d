#!/usr/bin/env bash
# Trains on a Cloud TPU slice, or several: asks for it, installs this checkout, runs on every host and
# shows the log of all, and deletes the slice when the run is done. To be run at the top of a checkout.
#
#   bash launch/tpu_pod.sh --name=vdm --zone=us-central1-a --accelerator=v5litepod-32 \
#     --workdir=gs://BUCKET/imagenet64 --data=gs://BUCKET/tfds [--dry_run] [OPTIONS] \
#     -- --config=configs/imagenet64.py
#
#   --name=NAME         of the queued resource, and of its nodes
#   --zone=ZONE
#   --accelerator=TYPE  v5litepod-32, v6e-64, v4-128, ...
#   --workdir=gs://...  where everything is written
#   --data=gs://...     directory of TensorFlow Datasets, which `install` copies to a disk of every host
#                       for --config.data.dir; without it what follows -- says where data are
#   --runtime=VERSION   of the hosts' image (v2-alpha-tpuv5-lite; v2-alpha-tpuv6e, tpu-ubuntu2204-base)
#   --num_slices=N      slices, over the data-centre network (1)
#   --capacity=KIND     on_demand, spot or reserved (on_demand)
#   --project=PROJECT   (gcloud's own)
#   --steps=LIST        some of create,install,run,logs,delete (create,install,run,delete)
#   --dry_run           prints every command and runs none
#
# What follows -- goes to vdm.main. The run outlives the connection: --steps=logs shows its log again,
# --steps=run goes on after a stop, and is refused while it runs. A step that fails ends the launcher,
# and the slice stays, and costs, until --steps=delete.
set -euo pipefail
source "$(dirname "$0")/common.sh"

declare -A option=(
  [name]='?vdm' [zone]='?us-central1-a' [accelerator]='?v5litepod-32' [workdir]='?gs://BUCKET/NAME'
  [runtime]=v2-alpha-tpuv5-lite [num_slices]=1 [capacity]=on_demand [project]=''
  [steps]='create,install,run,delete' [data]=''
)
parse "$@"
[[ ! ${option[data]} || ${option[data]} == gs://* ]] ||
  die "--data=${option[data]} must be on gs://, from where every host copies it; leave it out for none."
[[ ${option[workdir]} == gs://* ]] ||
  die "--workdir=${option[workdir]} must be on gs://, where all hosts write; try gs://BUCKET/${option[name]}"
[[ ${option[num_slices]} =~ ^[1-9][0-9]*$ ]] ||
  die "--num_slices=${option[num_slices]} must be a whole number from 1; try 1."
case ${option[capacity]} in
  on_demand) capacity=() ;;
  spot | reserved) capacity=("--${option[capacity]}") ;;
  *) die "--capacity=${option[capacity]} must be on_demand, spot or reserved." ;;
esac
for step in ${option[steps]//,/ }; do
  [[ $step =~ ^(create|install|run|logs|delete)$ ]] ||
    die "--steps=$step must be some of create,install,run,logs,delete, with commas."
done

queue=(gcloud compute tpus queued-resources)
where=("--zone=${option[zone]}" ${option[project]:+"--project=${option[project]}"})
everywhere=("${where[@]}" --node=all --worker=all)
nodes=("--node-id=${option[name]}")
((option[num_slices] == 1)) || nodes=("--node-count=${option[num_slices]}" "--node-prefix=${option[name]}")

on_all() { run "${queue[@]}" ssh "${option[name]}" "${everywhere[@]}" "--command=$1"; }

create() {
  run "${queue[@]}" create "${option[name]}" "${where[@]}" "${nodes[@]}" "${capacity[@]}" \
    "--accelerator-type=${option[accelerator]}" "--runtime-version=${option[runtime]}"
  local state=
  until [[ $state == ACTIVE ]]; do
    run "${queue[@]}" describe "${option[name]}" "${where[@]}" '--format=value(state.state)'
    [[ ! $dry_run ]] || return 0
    state=$("${queue[@]}" describe "${option[name]}" "${where[@]}" '--format=value(state.state)')
    [[ ! $state =~ ^(FAILED|SUSPEND) ]] || die "${option[name]} is $state; --steps=delete, and try again."
    sleep 30
  done
}

# Ends the launcher if a run goes on on any host.
refuse_second() {
  on_all "! kill -0 \"\$(cat vdm_run/pid 2>/dev/null)\" 2>/dev/null ||\
 { echo 'a run goes on here: --steps=logs shows it' >&2; exit 1; }"
}

# uv brings a Python that is new enough: the hosts' own is 3.10.
install() {
  refuse_second
  on_all 'rm -rf vdm_run && mkdir vdm_run && python3 -m pip install --quiet --user uv'
  run "${queue[@]}" scp --recurse pyproject.toml README.md LICENSE vdm configs pretrained launch \
    "${option[name]}:vdm_run" "${everywhere[@]}"
  on_all "cd vdm_run && python3 -m uv venv --quiet --python=3.12 .venv &&\
 python3 -m uv pip install --quiet --python=.venv -e '.[tpu,tensorflow]'"
  [[ ! ${option[data]} ]] ||
    on_all "mkdir -p vdm_data && gcloud storage rsync --recursive $(quoted "${option[data]}") vdm_data"
}

follow="tail --pid=\"\$(cat ~/vdm_run/pid)\" --lines=+1 --follow ~/vdm_run/run.log"

train() {
  local main
  main=$(quoted .venv/bin/python -m vdm.main "--workdir=${option[workdir]}" "${main_args[@]}" \
    ${option[data]:+"--config.data.dir=../vdm_data"})
  refuse_second
  on_all "cd vdm_run || exit; export LIBTPU_INIT_ARGS='$TPU_FLAGS';\
 nohup bash launch/restart.sh $main >run.log 2>&1 & echo \$! >pid; $follow; wait \$!"
}

for step in ${option[steps]//,/ }; do
  case $step in
    run) train ;;
    logs) on_all "$follow" ;;
    delete) run "${queue[@]}" delete "${option[name]}" "${where[@]}" --force --quiet ;;
    *) "$step" ;;
  esac
done
