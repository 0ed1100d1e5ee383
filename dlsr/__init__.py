"""A reproduction of layer-wise diffusion for out-of-distribution detection (arXiv 2411.10701).

The names below are the method and how it is measured. A module is imported when one of its names
is first used, so that ``import dlsr`` takes a fraction of a second.
"""

import os
from importlib import import_module

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads leave their cores to others
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch takes large pages: 1.3 to 1.8 x faster

__version__ = "0.2.0"

_MODULES = """
errors: UserError
data: load_images registry set_title
encoders: create_encoder
features: extract layer_slices layer_zscore
lfdn: LFDN
diffusion: noise_schedule add_noise fixed_noise ddim_released ddim one_step random_strides
diffusion: reconstruct in_batches
training: train fit_network diffusion_loss
scores: mse lr mfsim mse_by_layer mfsim_by_layer
metrics: auroc fpr95 bootstrap
baselines: fit_knn fit_gaussian
conformal: benjamini_hochberg cross_conformal stream_alarm stream_p_values
detector: DLSRDetector
evaluation: settings score_sets evaluate beside_paper paper_values read_scores save_results origin
plots: show_table comparison_table
"""
_ROWS = (row.split(": ") for row in _MODULES.strip().splitlines())
_WHERE = {name: module for module, names in _ROWS for name in names.split()}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'dlsr' has no attribute {name!r}")
    return getattr(import_module(f"dlsr.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
