# shellcheck shell=bash
# What the launchers share: flags, --dry_run, one-line errors, and the flags of XLA. To be sourced.

# TPU (LIBTPU_INIT_ARGS). The scheduler hides latency by itself; these let it hide more:
# * *async_collective_fusion*, overlap_compute_collective_tc: the all-reduce of the gradients and, with
#   config.parallel.fsdp, the all-gather of the parameters run inside the convolutions beside them;
# * data_parallel_*: between slices (--num_slices > 1) the all-reduce over the data-centre network is
#   pipelined through the backward pass.
export TPU_FLAGS="--xla_enable_async_all_gather=true \
--xla_enable_async_all_reduce=true \
--xla_tpu_enable_async_collective_fusion=true \
--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true \
--xla_tpu_overlap_compute_collective_tc=true \
--xla_tpu_enable_data_parallel_all_reduce_opt=true \
--xla_tpu_data_parallel_opt_different_sized_ops=true"
# GPU (XLA_FLAGS). NCCL's collectives are asynchronous already; the latency-hiding scheduler, off by
# default, moves convolutions between their start and their end, and pipelining does it across the
# turns of a loop (config.model.scan_blocks, config.train.microbatches). It costs memory: leave it out
# where a model just fits.
export GPU_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_enable_pipelined_all_gather=true \
--xla_gpu_enable_pipelined_all_reduce=true \
--xla_gpu_enable_pipelined_reduce_scatter=true"

die() {
  echo "$*" >&2
  exit 1
}

# The words as one could type them.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+~-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

# Prints a command, and runs it unless --dry_run was given.
run() {
  quoted "$@"
  [[ $dry_run ]] || "$@"
}

# The comment at the top of the script.
help() {
  sed -n '2,/^[^#]/{s/^# //p;s/^#$//p}' "$0"
  exit
}

# Reads --name=value into option[name], which holds the defaults; one that begins with ? must be given,
# and goes on with an example. What follows -- goes to vdm.main, in main_args.
parse() {
  local name
  dry_run='' main_args=()
  while (($#)); do
    name=${1%%=*} name=${name#--}
    case $1 in
      --help) help ;;
      --dry_run) dry_run=true ;;
      --) shift && main_args=("$@") && break ;;
      --*=*)
        [[ -v "option[$name]" ]] || die "--$name is not one of ${!option[*]}; flags of vdm.main go after --."
        option["$name"]=${1#*=}
        ;;
      *) die "$1 is not --flag=value; see --help. Flags of vdm.main go after --." ;;
    esac
    shift
  done
  for name in "${!option[@]}"; do
    [[ ${option[$name]} != '?'* ]] || die "--$name is missing; give for example --$name=${option[$name]#?}"
  done
  [[ " ${main_args[*]}" == *' --config='* ]] ||
    die '--config is missing; give it after --, for example -- --config=configs/imagenet64.py'
  [[ " ${main_args[*]}" != *' --workdir='* ]] || die '--workdir after -- is not read; give it before --.'
}
