#!/usr/bin/env bash
# Trains on a GKE cluster of TPUs that xpk made (pip install xpk): creates one workload, a JobSet whose
# hosts JAX finds by itself.
#
#   bash launch/gke_xpk.sh --name=vdm --cluster=CLUSTER --zone=us-central1-a --tpu_type=v5litepod-32 \
#     --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/vdm:tpu --workdir=gs://BUCKET/imagenet64 \
#     [--dry_run] [OPTIONS] -- --config=configs/imagenet64.py
#
#   --name=NAME          of the workload
#   --cluster=CLUSTER
#   --zone=ZONE
#   --tpu_type=TYPE      v5litepod-32, v6e-64, v5p-128, ...
#   --image=IMAGE        made by launch/docker/Dockerfile
#   --workdir=gs://...   where everything is written
#   --num_slices=N       slices, over the data-centre network (1)
#   --max_restarts=N     of the whole job: after status 75, and when a host was lost (100)
#   --grace_seconds=N    from the notice of an eviction to its end, to save in (120)
#   --project=PROJECT    (gcloud's own)
#   --dry_run            prints the command and does not run it
#
# What follows -- goes to vdm.main.
set -euo pipefail
source "$(dirname "$0")/common.sh"

declare -A option=(
  [name]='?vdm' [cluster]='?my-cluster' [zone]='?us-central1-a' [tpu_type]='?v5litepod-32'
  [image]='?us-docker.pkg.dev/PROJECT/REPOSITORY/vdm:tpu' [workdir]='?gs://BUCKET/NAME'
  [num_slices]=1 [max_restarts]=100 [grace_seconds]=120 [project]=''
)
parse "$@"
[[ ${option[workdir]} == gs://* ]] ||
  die "--workdir=${option[workdir]} must be on gs://, where all hosts write; try gs://BUCKET/${option[name]}"
for name in num_slices max_restarts grace_seconds; do
  [[ ${option[$name]} =~ ^[1-9][0-9]*$ ]] || die "--$name=${option[$name]} must be a whole number from 1; try 1."
done

# xpk itself restarts on 127 to 255, so also on 134, with which JAX ends the hosts that have lost one.
run xpk workload create "--workload=${option[name]}" "--cluster=${option[cluster]}" "--zone=${option[zone]}" \
  ${option[project]:+"--project=${option[project]}"} \
  "--tpu-type=${option[tpu_type]}" "--num-slices=${option[num_slices]}" "--docker-image=${option[image]}" \
  "--max-restarts=${option[max_restarts]}" --restart-on-exit-codes=75 \
  "--termination-grace-period-seconds=${option[grace_seconds]}" \
  "--env=LIBTPU_INIT_ARGS=$TPU_FLAGS" \
  "--command=$(quoted python -m vdm.main "--workdir=${option[workdir]}" "${main_args[@]}")"
