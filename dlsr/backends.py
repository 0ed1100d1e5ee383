"""What runs a frozen encoder: PyTorch, or on a CPU OpenVINO, which is faster and optional.

Batches are always full, a smaller one is padded, so that an image's features do not depend on how
many others there are.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from dlsr.data import INPUT_SIZE
from dlsr.encoders import FrozenEncoder
from dlsr.errors import UserError

BATCH = {"cpu": 16, "cuda": 256}  # images; on a CPU, less than 16 are rounded by other threads
REPAID = 700  # images from which OpenVINO's preparation, of some seconds, is repaid
TOLERANCE = {"float32": 1e-5, "bf16": 0.25}  # of ||a - b|| / ||b||, where b is PyTorch's in float32


class Unusable(Exception):
    """A backend that cannot be prepared here, with the reason."""


def choose(images: int, device: torch.device) -> str:
    """Return the fastest backend for so many images, ``openvino`` or ``torch``."""
    faster = device.type == "cpu" and images >= REPAID and find_spec("openvino")
    return "openvino" if faster else "torch"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `UserError` unless the device computes in ``float32`` or ``bf16``, as asked for."""
    if precision not in TOLERANCE:
        raise UserError(f"precision={precision!r} was given; choose float32 or bf16.")
    on_cpu = device.type == "cpu"
    if precision == "bf16" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UserError("precision='bf16' was given; this processor lacks it: choose float32.")


def prepare(
    encoder: FrozenEncoder, backend: str, *, precision: str, device: torch.device, batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function of 1 to ``batch_size`` images, (n, 224, 224, 3) uint8, to their features.

    Those are float32, (n, 2, c), as `FrozenEncoder` returns them. Raises `Unusable` if OpenVINO
    fails, or if its features differ from PyTorch's by more than `TOLERANCE`.
    """
    torch.backends.cudnn.allow_tf32 = False  # features of a GPU are float32 too
    run, shape = encoder.to(device), (batch_size, *INPUT_SIZE, 3)
    if backend == "openvino":
        noise = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        try:
            run = _openvino(encoder, shape, precision)
            a, b = (one(torch.from_numpy(noise)).flatten(1) for one in (run, encoder))
        except Exception as error:  # it raises almost anything
            raise Unusable(f"it failed: {error!r:.200}") from error
        apart = float(((a - b).norm(dim=1) / b.norm(dim=1)).max())
        if not apart <= TOLERANCE[precision]:
            raise Unusable(f"its features differ from PyTorch's by {apart:.1g}")
    elif precision == "bf16":  # where PyTorch takes it to be safe
        run = torch.autocast(device.type, torch.bfloat16)(encoder)

    def features(pixels: np.ndarray) -> np.ndarray:
        full = torch.from_numpy(np.resize(pixels, shape)).to(device)
        return _halved(run, full)[: len(pixels)].cpu().numpy()

    return features


def _openvino(encoder: FrozenEncoder, shape: tuple, precision: str) -> Callable:
    import openvino

    example, form = torch.zeros(shape, dtype=torch.uint8), [(shape, openvino.Type.u8)]
    with warnings.catch_warnings():  # it traces the encoder in a way that PyTorch calls old
        warnings.simplefilter("ignore")
        model = openvino.convert_model(encoder, example_input=example, input=form)
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    hints["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bf16": "bf16"}[precision]
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    return lambda pixels: torch.from_numpy(request.infer({0: pixels.numpy()})[0].copy())


def _halved(run: Callable, pixels: torch.Tensor) -> torch.Tensor:
    """Return ``run(pixels)``, in halves where the memory does not suffice for all."""
    try:
        return run(pixels)
    except RuntimeError as error:
        if "memory" not in str(error) or len(pixels) == 1:
            raise
        warnings.warn(f"A batch of {len(pixels)} needs too much memory; halves do.", stacklevel=2)
        return torch.cat([_halved(run, half) for half in pixels.chunk(2)])
