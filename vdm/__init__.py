"""Variational diffusion models in JAX: VDM (arXiv 2107.00630) and VDM++ (arXiv 2303.00848)."""

__version__ = '0.1.0'
