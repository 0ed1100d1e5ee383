import warnings
from functools import partial

import numpy as np
import pytest
import torch
from dlsr import backends
from dlsr.encoders import create_encoder
from dlsr.errors import UserError
from dlsr.features import extract

from conftest import FakeEncoder, image_set, one_sentence, random_pixels

CPU = torch.device("cpu")


def needs_bf16():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")


@pytest.fixture(scope="module")
def lite0():
    return create_encoder("efficientnet_lite0")


def prepared(encoder, backend, *, precision="float32", batch_size=3):
    return backends.prepare(encoder, backend, precision=precision, device=CPU, batch_size=batch_size)


def test_openvino_is_chosen_on_a_cpu_where_the_images_repay_it(monkeypatch):
    for there, images, device, chosen in (
        (True, 10, "cpu", "torch"),
        (True, 1_000, "cpu", "openvino"),
        (True, 1_000, "cuda", "torch"),
        (False, 1_000, "cpu", "torch"),
    ):
        monkeypatch.setattr(backends, "find_spec", lambda name, there=there: there)
        assert backends.choose(images, torch.device(device)) == chosen


def test_a_precision_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for precision, told in (("int8", "float32 or bf16"), ("bf16", "this processor")):
        with pytest.raises(UserError, match=told) as error:
            extract(image_set(), FakeEncoder(), precision=precision, progress=False)
        one_sentence(error)


def test_an_images_features_are_the_same_alone_and_in_any_company(lite0):
    run, pixels = prepared(lite0, "torch"), random_pixels(3, size=(224, 224))
    together = run(pixels)
    assert (together.shape, together.dtype) == ((3, 2, sum(lite0.channels)), np.float32)
    np.testing.assert_array_equal(run(pixels[:2]), together[:2])
    np.testing.assert_array_equal(run(pixels[:1]), together[:1])
    np.testing.assert_allclose(run(pixels[1:]), together[1:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 0.25)])
def test_openvino_gives_pytorchs_features(precision, tolerance, lite0):
    pytest.importorskip("openvino", reason="dlsr[fast] is not installed")
    if precision == "bf16":
        needs_bf16()
    pixels = random_pixels(4, size=(224, 224))
    plain = prepared(lite0, "torch", batch_size=4)(pixels).reshape(4, -1)
    fast = prepared(lite0, "openvino", precision=precision, batch_size=4)
    found = fast(pixels).reshape(4, -1)
    apart = np.linalg.norm(found - plain, axis=1) / np.linalg.norm(plain, axis=1)
    assert apart.max() <= tolerance
    np.testing.assert_array_equal(fast(pixels[::-1])[::-1].reshape(4, -1), found)


def test_bf16_is_near_to_float32_and_has_a_key_of_its_own(lite0):
    needs_bf16()
    get = partial(extract, image_set(4), lite0, progress=False)
    exact, rough = get().values[:, 0], get(precision="bf16").values[:, 0]
    apart = np.linalg.norm(rough - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert 1e-4 < apart.max() < 0.25
    assert (get().backend, get(precision="bf16").backend) == ("torch, float32", "torch, bf16")


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_backend_that_fails_is_left_for_the_plain_pass_with_one_warning(fault, monkeypatch):
    def openvino(encoder, shape, precision):
        if fault == "raises":
            raise RuntimeError("an operation is unknown")
        return lambda pixels: encoder(pixels) * 1.01

    monkeypatch.setattr(backends, "_openvino", openvino)
    with pytest.warns(UserWarning, match="openvino is not used, because it") as told:
        found = extract(image_set(), FakeEncoder(), backend="openvino", progress=False)
    assert len(told) == 1
    assert found.backend == "torch, float32"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = extract(image_set(), FakeEncoder(), progress=False)
    np.testing.assert_array_equal(found.values, plain.values)


def test_a_batch_that_needs_too_much_memory_is_halved(monkeypatch):
    class Small(FakeEncoder):
        def __call__(self, pixels):
            if len(pixels) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().__call__(pixels)

    with pytest.warns(UserWarning, match="memory"):
        halved = extract(image_set(), Small(), progress=False)
    plain = extract(image_set(name="again"), FakeEncoder(tag="other"), progress=False)
    np.testing.assert_allclose(halved.values, plain.values, rtol=1e-6)
