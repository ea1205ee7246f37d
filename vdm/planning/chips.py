"""This table has what vendors state of accelerators: arithmetic, memory, links."""

import os
from typing import NamedTuple

GIB = 2**30
# of the environment, for GPUs; XLA refuses to be given both
SHARE = 'XLA_CLIENT_MEM_FRACTION', 'XLA_PYTHON_CLIENT_MEM_FRACTION'
OF_GPUS = 0.75  # JAX's own


class Chip(NamedTuple):
  """Describes one device, as JAX counts them."""

  kind: str  # jax.Device.device_kind
  bfloat16_flops: float  # dense peak, FLOP/s
  float32_flops: float  # what JAX's default precision makes of float32: TF32, or bfloat16 on TPU
  hbm_bytes: int
  hbm_bandwidth: float  # bytes/s
  link_bandwidth: float  # bytes/s that it can send to others of a slice or node, all links together
  share: float = 1.0  # of the HBM that JAX takes, unless it is told by SHARE

  @property
  def room(self) -> float:
    """Returns the bytes of HBM that a run gets."""
    told = [os.environ[name] for name in SHARE if os.environ.get(name)]
    return self.hbm_bytes * float(told[0] if told and self.share < 1 else self.share)

  def flops(self, dtype: str) -> float:
    """Returns the peak in FLOP/s for activations of this dtype."""
    return self.bfloat16_flops if dtype == 'bfloat16' else self.float32_flops


# Cloud TPU documentation, "TPU v4", "v5e", "v5p", "v6e": peak compute, HBM capacity and bandwidth,
# inter-chip interconnect bandwidth (stated in Gbit/s). What the compiler lets a program use of the
# HBM is a little less.
TPUS = {
  'v4': Chip('TPU v4', 275e12, 275e12, 32 * GIB, 1228e9, 2400e9 / 8),
  'v5e': Chip('TPU v5 lite', 197e12, 197e12, 16 * GIB, 819e9, 1600e9 / 8),
  'v5p': Chip('TPU v5', 459e12, 459e12, 95 * GIB, 2765e9, 4800e9 / 8),
  'v6e': Chip('TPU v6 lite', 918e12, 918e12, 32 * GIB, 1638e9, 3584e9 / 8),
}
# NVIDIA's data sheets "A100 Tensor Core GPU", "H100", "H200", SXM unless the name says PCIe: half
# of each figure that is "with sparsity", half of NVLink's, which adds both directions; 10^9 bytes
# per gigabyte of HBM.
GPUS = {
  'a100': Chip('NVIDIA A100-SXM4-80GB', 312e12, 156e12, 80 * 10**9, 2039e9, 300e9, OF_GPUS),
  'a100_40g': Chip('NVIDIA A100-SXM4-40GB', 312e12, 156e12, 40 * 10**9, 1555e9, 300e9, OF_GPUS),
  'h100': Chip('NVIDIA H100 80GB HBM3', 989.4e12, 494.7e12, 80 * 10**9, 3350e9, 450e9, OF_GPUS),
  'h100_pcie': Chip('NVIDIA H100 PCIe', 756e12, 378e12, 80 * 10**9, 2000e9, 300e9, OF_GPUS),
  'h200': Chip('NVIDIA H200', 989.4e12, 494.7e12, 141 * 10**9, 4800e9, 450e9, OF_GPUS),
}


def of_kind(device_kind: str) -> Chip | None:
  """Returns the chip of a device at hand; None for one not in the tables, such as a CPU."""
  chips = (*TPUS.values(), *GPUS.values())
  return next((chip for chip in chips if chip.kind == device_kind), None)
