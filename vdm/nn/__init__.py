"""The networks, by the name that `config.model.name` gives them."""

from vdm.nn.mlp import MLP
from vdm.nn.vdm_unet import VDMUNet

NETWORKS = {'vdm_unet': VDMUNet, 'mlp': MLP}
