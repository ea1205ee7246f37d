"""The networks, by the name that `config.model.name` gives them."""

from vdm.nn.adm_unet import ADMUNet
from vdm.nn.dit import DiT
from vdm.nn.mlp import MLP
from vdm.nn.uvit import UViT
from vdm.nn.vdm_unet import VDMUNet

NETWORKS = {'vdm_unet': VDMUNet, 'adm_unet': ADMUNet, 'uvit': UViT, 'dit': DiT, 'mlp': MLP}
ORDER = (
  'attention',
  'checks',
  'layers',
  'conditioning',
  'convolution',
  'blocks',
  'vdm_unet',
  'adm_unet',
  'uvit',
  'dit',
  'mlp',
  '__init__',
)
