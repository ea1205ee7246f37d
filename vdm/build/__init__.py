"""The one bridge from a config to objects, and the checks that need no device."""

from vdm.build.bounds import within_bounds
from vdm.build.checks import check_config, check_devices, check_ode, works_on
from vdm.build.factories import other_schedule, sampler, schedule, threshold
from vdm.build.model import Model, model
from vdm.build.optimizer import ema_shares, optimizer
from vdm.build.platform import dtype, for_platform, scan_blocks
from vdm.build.sample_checks import check_sampling
from vdm.build.state import InitState, init_state

ORDER = (
  'platform',
  'conditioning',
  'factories',
  'optimizer',
  'leaves',
  'checks',
  'sample_checks',
  'bounds',
  'model',
  'by_hand',
  'state',
  '__init__',
)

__all__ = [
  'InitState',
  'Model',
  'check_config',
  'check_devices',
  'check_ode',
  'check_sampling',
  'dtype',
  'ema_shares',
  'for_platform',
  'init_state',
  'model',
  'optimizer',
  'other_schedule',
  'sampler',
  'scan_blocks',
  'schedule',
  'threshold',
  'within_bounds',
  'works_on',
]
