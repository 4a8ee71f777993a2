"""What int8 makes of features: within half a step, and never worse for being stored again."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llava_core.shards.quantize import dataset_specs, dequantise, pack, quantise, row_bytes

SMALLEST_NORMAL = 2.0**-14

numbers = st.floats(width=16, allow_nan=False, allow_infinity=False)  # subnormal ones, -0.0 and 65504 too
features = arrays(np.dtype("<f2"), st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=numbers)


def back(quantised: np.ndarray, scales: np.ndarray) -> np.ndarray:
    out = np.empty(quantised.shape, "<f2")
    dequantise(quantised, scales, out)
    return out


@given(features)
def test_no_value_moves_by_more_than_half_a_step(given: np.ndarray) -> None:
    quantised, scales = quantise(given)
    assert (quantised.dtype.str, scales.dtype.str) == ("|i1", "<f2")
    exact = quantised.astype(np.float64) * scales
    assert (np.abs(exact - given) <= scales.astype(np.float64) / 2).all()
    read = back(quantised, scales)
    assert np.array_equal(read, exact.astype(np.float16))  # rounded once
    assert np.isfinite(read).all()
    assert (read[:, ~given.any(0)] == 0).all()


@given(features)
def test_what_was_read_is_stored_as_the_same_bytes(given: np.ndarray) -> None:
    quantised, scales = quantise(given)
    normal = (scales >= SMALLEST_NORMAL) | (scales == 0)
    again, again_scales = quantise(back(quantised, scales))
    assert np.array_equal(again_scales[normal], scales[normal])
    assert np.array_equal(again[:, normal], quantised[:, normal])


def test_every_magnitude_that_fp16_has() -> None:
    """Each as the largest of a channel of its own, with its negative and a zero below it."""
    largest = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16)
    given = np.stack([largest, -largest, np.zeros_like(largest)])
    quantised, scales = quantise(given)
    assert (np.abs(quantised.astype(np.float64) * scales - given) <= scales.astype(np.float64) / 2).all()
    normal = scales >= SMALLEST_NORMAL
    assert (quantised[:2, normal] == [[127], [-127]]).all()
    assert np.isfinite(back(quantised, scales)).all()
    again, again_scales = quantise(back(quantised, scales))
    assert np.array_equal(again_scales[normal], scales[normal])
    assert np.array_equal(again[:, normal], quantised[:, normal])


def test_more_numbers_than_are_converted_at_once() -> None:
    given = np.random.default_rng(0).normal(size=(197, 768)).astype(np.float16)
    given.flags.writeable = False
    quantised, scales = pack("int8", given)
    expected = np.abs(given.astype(np.float32)).max(0) / 127
    assert np.allclose(scales, expected, rtol=2**-10)
    assert np.array_equal(quantised, np.rint(given.astype(np.float32) / scales.astype(np.float32)))
    assert np.array_equal(back(quantised, scales), quantised * scales)


def test_bytes_of_a_row() -> None:
    assert row_bytes("float16", 197, 768) == 302_592
    assert row_bytes("int8", 197, 768) == 152_832
    shapes = {name: (dtype.str, shape) for name, (dtype, shape) in dataset_specs("int8", 5, 12).items()}
    assert shapes == {"features": ("|i1", (5, 12)), "scales": ("<f2", (12,))}
