"""Crops of a brain in three dimensions, as a file of arrays with a mask.

  pip install nilearn
  python examples/brain.py brain.npz
  python -m vdm.main --config=configs/brain3d.py --config.data.path=brain.npz

The brain is the MNI152 template, an average of 152 people's T1-weighted scans that comes with the
package nilearn (1 mm, symmetric, ICBM 2009a). Crops of 16^3 voxels, 8 apart, that are at least half
brain; the mask has what is brain. The back of the head is held out, not one half of it, for left
and right are mirror images: no voxel is in both parts.
"""

import sys

import numpy as np

SIZE, STRIDE = 16, 8
HELD_OUT = 0.25  # of the brain's length, from the back


def crops(volume: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns crops [N 16 16 16 1] of a volume [X Y Z] that are at least half mask, and masks."""
  found, masks = [], []
  for corner in np.ndindex(*[(n - SIZE) // STRIDE + 1 for n in volume.shape]):
    box = tuple(slice(STRIDE * i, STRIDE * i + SIZE) for i in corner)
    if mask[box].mean() >= 0.5:
      found.append(volume[box])
      masks.append(mask[box])
  return np.stack(found)[..., None].astype(np.float32), np.stack(masks)[..., None]


def main(path: str):
  """Writes the file, the crops for training first, and says where those held out begin."""
  from nilearn import datasets

  volume = datasets.load_mni152_template(resolution=1).get_fdata()
  mask = datasets.load_mni152_brain_mask(resolution=1).get_fdata() > 0
  inside = np.flatnonzero(mask.any(axis=(0, 2)))
  border = inside[0] + round(HELD_OUT * (inside[-1] - inside[0]))
  front, back = (
    crops(volume[:, part], mask[:, part]) for part in (slice(border, None), slice(border))
  )
  x, masks = (np.concatenate(pair) for pair in zip(front, back, strict=True))
  np.savez(path, x=x, mask=masks)
  print(f'{path}: {len(front[0])} crops for training, then {len(back[0])} that are held out')


if __name__ == '__main__':
  main(*sys.argv[1:])
