"""The launch shapes of the sampling kernels."""

from __future__ import annotations

from itertools import product

import pytest

from fi_cupy import sampling_kernels as kernels
from fi_cupy import topk
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import float32


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
def test_launch_shapes_fit(arch):
    """Whatever the rows: segments have threads, warps their places, and all of it shared memory."""
    memory = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99}[arch] << 10
    device = DeviceInfo(
        arch, {90: "90a", 100: "100a", 120: "120a"}.get(arch, str(arch)), 132, memory, memory, 1 << 25, ""
    )
    made = {
        "draw": lambda *a: kernels.sample_spec(float32, True, "none", *a),
        "reject": lambda *a: kernels.sample_spec(float32, True, "top_p", *a),
        "min_p": lambda *a: kernels.sample_spec(float32, False, "min_p", *a),
        "select": lambda *a: kernels.sample_spec(float32, True, "top_k_top_p", *a),
        "fill": lambda *a: kernels.filter_spec(float32, True, *a, "top_k"),
        "keep": lambda *a: kernels.filter_spec(float32, False, *a, "top_k_top_p"),
        "top_k": lambda *a: topk.top_k_spec(float32, *a),
        "renorm": lambda *a: kernels.renorm_spec(float32, *a),
        "softmax": lambda *a: kernels.softmax_spec(float32, *a),
        "speculative": lambda *a: kernels.speculative_spec(float32, *a),
    }
    for kind, rows, vocab in product(made, (1, 7, 33, 64, 67, 512), (1, 1000, 32000, 128256, 262144, 524288)):
        shape = kernels.launch_shape(kind, rows, vocab, device)
        room = kernels.room(vocab)
        spec = made[kind](room, shape)
        assert spec.supports(device.arch), (kind, rows, vocab, shape)
        assert shape.threads >= room or kind in ("softmax", "renorm")
        assert shape.cluster * shape.threads // 32 <= 256 and shape.cluster & shape.cluster - 1 == 0
        size = kernels.launched_bytes(spec, vocab, float32, shape)
        assert 0 < size <= min(memory, spec.smem_bytes), (kind, rows, vocab, shape, size)
        if arch == 90 and not shape.hold:  # what is held depends on the vocabulary
            assert max(shape.min_blocks, 1) * (size + 1024) <= 228 << 10, (kind, rows, vocab, shape, size)
