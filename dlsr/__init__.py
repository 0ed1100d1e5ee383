"""Diffusion-based layer-wise semantic reconstruction for out-of-distribution detection."""

from importlib.metadata import version

__version__ = version("dlsr")
