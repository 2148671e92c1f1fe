"""Arguments at the edge of what functions take: strides without meaning, sizes of NumPy's types, nothing, and nonsense.

What is wrong raises an error of fi_cupy that says what, and no other.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import emulate
import ml_dtypes
import numpy as np
import pytest

import fi_cupy
from fi_cupy import decode_call, errors, mla_kernel, prefill_hopper, quantization, rope
from fi_cupy.arrays import view
from fi_cupy.checks import as_sizes
from fi_cupy.decode_kernel import Problem as DecodeProblem
from fi_cupy.decode_kernel import geometry as decode_geometry
from fi_cupy.dtypes import bfloat16
from fi_cupy.mla_kernel import hopper_maps
from fi_cupy.plan.decode import plan_decode
from fi_cupy.prefill_hopper import TILES, map_values, mappable
from fi_cupy.prefill_kernel import Problem, check_problem, geometry
from fi_cupy.workspace import PlanBuffer

USUAL, ADDRESS = TILES[128, 128], 1 << 20
F32 = np.float32


@pytest.fixture
def encoded(monkeypatch):
    """The arguments of every encoded map, held to the driver's rules."""
    calls = []

    def encode(*args):
        calls.append(args)
        return emulate.tensor_map(*args)

    monkeypatch.setattr(prefill_hopper, "_encode", encode)
    monkeypatch.setattr(mla_kernel, "encode_map", encode)
    for cached in (map_values, hopper_maps):
        cached.cache_clear()
    yield calls
    for cached in (map_values, hopper_maps):
        cached.cache_clear()


def maps(q=(1024, 128, 1), k=(0, 1024, 128), v=(0, 1024, 128), rows=300, group=2, heads=4, extent=400, page_size=0):
    return map_values(
        USUAL, "bfloat16", ADDRESS, rows, q, group, heads, ADDRESS, ADDRESS, k, v, extent, page_size
    )  # fmt: skip


# --- tensor maps


@pytest.mark.parametrize(
    "odd",
    [
        {"q": (3, 128, 1), "rows": 1},
        {"q": (1024, 3, 1), "group": 1, "heads": 1},
        {"k": (0, 1024, -4), "heads": 1},
        {"k": (0, 5, 128), "v": (0, -7, 128), "extent": 1},
        {"k": (0, 5, 3), "v": (0, -7, 3), "extent": 0},
        {"k": (3, 1024, 128), "v": (-8, 1024, 128), "extent": 1, "page_size": 16},
        {"k": (1 << 14, 128, 77), "heads": 1, "extent": 9, "page_size": 16},
        {"k": (-1, -2, -3), "v": (-1, -8, -3), "extent": 0, "page_size": 16},
    ],
)
def test_the_stride_of_a_single_one_means_nothing(encoded, odd):
    """A map has none that is no multiple of 16 bytes, or negative, whatever it is multiplied with."""
    if odd.get("extent") == 0 and odd.get("page_size"):
        odd = odd | {"k": (-1, 128, -3), "v": (-1, 128, -3)}  # pages of several tokens
    maps(**odd)
    assert len(encoded) == 3


@pytest.mark.parametrize(
    ("backwards", "name"),
    [
        ({"q": (-1024, 128, 1)}, "q"),
        ({"q": (1024, -128, 1)}, "q"),
        ({"k": (0, -1024, 128)}, "k"),
        ({"v": (0, 1024, -128)}, "v"),
        ({"v": (-(1 << 14), 1024, 128), "page_size": 16}, "v"),
        ({"k": (1 << 14, -1024, 128), "page_size": 16}, "k"),
        # Units counted backwards would leave the map, where the copy engine writes zeros.
        ({"k": (1 << 14, 1024, -128), "page_size": 16}, "k"),
    ],
)
def test_no_map_goes_backwards(encoded, backwards, name):
    with pytest.raises(errors.LayoutError, match=f"prefill: {name} has a stride of -.*expected none that is negative"):
        maps(**backwards)


def test_strides_of_0_have_maps(encoded):
    """Keys that are expanded over their heads; an H100 takes them."""
    maps(q=(0, 0, 1), k=(0, 1024, 0), v=(0, 0, 0))
    assert [call[3] for call in encoded] == [(0, 0, 128, 0), (2048, 128, 0), (0, 128, 0)]
    _, numbers = maps(k=(1 << 14, 1024, 0), v=(0, 1024, 0), page_size=16)
    assert numbers[6] == numbers[9] == 0


def test_latent_caches_have_maps_or_a_reason(encoded):
    pages = (ADDRESS, 3, 576), (ADDRESS, -5, 576)
    hopper_maps("bfloat16", 16, 1, *pages)
    for i in range(2):
        for page, token in ((-8 * 576, 576), (16 * 576, -576)):
            given = [(ADDRESS, 16 * 576, 576)] * 2
            given[i] = ADDRESS, page, token
            with pytest.raises(errors.LayoutError, match=f"latent attention: {['ckv', 'kpe'][i]} has a stride of -"):
                hopper_maps("bfloat16", 16, 9, *given)


def test_arrays_that_go_backwards_take_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(prefill_hopper, "has_driver_binding", lambda: True)
    x = view(np.zeros((4, 1, 64), F32))
    assert mappable(x, view(x.numpy()[:, ::-1])) and mappable(view(np.broadcast_to(x.numpy(), (4, 9, 64))))
    assert not mappable(x, view(x.numpy()[::-1]))
    usual = Problem(8, 2, 128, 128, bfloat16, False, False, False, False)
    assert geometry(usual, 1000, emulate.HOPPER).hopper is not None
    g = geometry(usual._replace(mappable=False), 1000, emulate.HOPPER)
    assert g.hopper is None and "a stride is negative" in g.choice
    with pytest.raises(errors.UnsupportedError, match=r"'fa3', but the Hopper kernel .* a stride is negative"):
        geometry(usual._replace(mappable=False, backend="fa3"), 1000, emulate.HOPPER)


# --- sizes


def test_sizes():
    made = as_sizes("op", a=np.int32(3), b=np.int64(1), c=7, d=np.asarray(5))
    assert made == [3, 1, 7, 5] and {type(x) for x in made} == {int}
    for value, text in ((0, "at least 1"), (-2, "at least 1"), (1.0, "an integer"), ("3", "an integer")):
        with pytest.raises(errors.ArgumentError, match=f"op: page_size is {value!r}, expected {text}"):
            as_sizes("op", heads=2, page_size=value)


TABLE = [0, 2, 3], [4, 1, 2], [1, 3]  # page size 4
SIZES = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 4}
F = {"q_data_type": "float32"}


def plans(n):
    """Plan of every wrapper with sizes `n`, and the wrapper."""
    space = np.zeros(1 << 16, np.uint8)
    sizes = n["num_qo_heads"], n["num_kv_heads"], n["head_dim"]
    page = n["page_size"]
    return {
        "decode": (fi_cupy.BatchDecodeWithPagedKVCacheWrapper(space), (*TABLE, *sizes, page), F),
        "paged": (fi_cupy.BatchPrefillWithPagedKVCacheWrapper(space), ([0, 2, 5], *TABLE, *sizes, page), F),
        "ragged": (fi_cupy.BatchPrefillWithRaggedKVCacheWrapper(space), ([0, 2, 5], [0, 5, 9], *sizes), F),
        "sparse": (fi_cupy.BlockSparseAttentionWrapper(space), ([0, 2, 3], [0, 2, 1], 8, 12, 4, page, *sizes), F),
        "latent": (
            fi_cupy.BatchMLAPagedAttentionWrapper(space),
            ([0, 2, 5], *TABLE[:2], [5, 3], sizes[0], 512, 64, page, True, 0.1, "float32", "float32"),
            {},
        ),
    }


@pytest.mark.parametrize("integer", [np.int32, np.int64])
@pytest.mark.parametrize("which", ["decode", "paged", "ragged", "sparse", "latent"])
def test_numpys_integers_are_sizes(which, integer):
    """Which have no bit_length before NumPy 2.x, and whose sums with addresses overflow."""
    wrapper, args, options = plans({name: integer(n) for name, n in SIZES.items()})[which]
    wrapper.plan(*args, **options)
    planned = wrapper._prefill._planned if which == "sparse" else wrapper._planned
    numbers = [planned.problem, planned] if hasattr(planned, "problem") else [planned]
    names = ("num_qo_heads", "num_kv_heads", "num_heads", "head_dim", "head_dim_qk", "head_dim_vo", "page_size")
    found = [getattr(x, name) for x in numbers for name in names if hasattr(x, name)]
    assert len(found) > 2 and all(type(x) is int for x in found)


#: What the ragged and the latent wrapper do not have.
ABSENT = {("ragged", "page_size"), ("latent", "num_kv_heads"), ("latent", "head_dim")}
EVERY = [(x, name) for x in ("decode", "paged", "ragged", "sparse", "latent") for name in SIZES]


@pytest.mark.parametrize("value", [0, -4])
@pytest.mark.parametrize(("which", "name"), [x for x in EVERY if x not in ABSENT])
def test_sizes_of_nothing(which, name, value):
    wrapper, args, options = plans(SIZES | {name: value})[which]
    with pytest.raises(errors.ArgumentError, match=rf"is {value}, expected (at least 1|.*block size)"):
        wrapper.plan(*args, **options)


def test_heads_and_dims_of_nothing_in_calls():
    for shape in ((5, 0, 64), (5, 4, 0)):
        q, k = np.zeros(shape, F32), np.zeros((9, 2, shape[2]), F32)
        with pytest.raises(errors.ShapeError, match="expected at least 1"):
            fi_cupy.single_prefill_with_kv_cache(q, k, k)
        with pytest.raises(errors.ShapeError, match="expected at least 1"):
            fi_cupy.single_decode_with_kv_cache(q[0], k, k)


def test_more_kv_heads_than_a_grid_has():
    p = Problem(70000, 70000, 8, 8, bfloat16, False, False, False, False)
    check_problem("op", p._replace(num_qo_heads=65535, num_kv_heads=65535))
    with pytest.raises(errors.UnsupportedError, match="op: num_kv_heads is 70000, expected at most 65535"):
        check_problem("op", p)


# --- decode


@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("dim", [64, 128])
def test_no_requests_have_a_geometry_and_a_plan(dim, kv):
    kind = fi_cupy.dtypes.dtype(kv)
    p = DecodeProblem(0, 8, 2, dim, bfloat16, kind, bfloat16, True, False, False, False, False)
    g = decode_geometry(p, emulate.HOPPER)
    none = np.zeros(0, np.int64)
    assert plan_decode(none, none, num_head_blocks=g.num_head_blocks, slots=g.slots).num_items == 0


def test_a_plan_of_nothing_has_an_address(monkeypatch):
    class Memory(np.ndarray):
        data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data))

    class Device:
        __init__ = __exit__ = lambda *args: None

        def __enter__(self):
            return self

    stream = SimpleNamespace(synchronize=lambda: None)
    cuda = SimpleNamespace(Device=Device, get_current_stream=lambda: stream)
    fake = SimpleNamespace(zeros=lambda n, t: np.zeros(n, t).view(Memory), cuda=cuda)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    buffer = PlanBuffer(0, 0)
    assert buffer.ptr and buffer.counters_ptr
    before = buffer.ptr
    buffer.reserve(0, 0)
    assert buffer.ptr == before


def test_queries_are_read_in_pairs():
    """On a GPU a load that is not aligned ends the process' work there."""
    with emulate.emulated(emulate.HOPPER):
        wide = emulate.device(np.zeros((2, 4, 66), ml_dtypes.bfloat16))
        cache = emulate.device(np.zeros((3, 2, 16, 2, 64), ml_dtypes.bfloat16))
        made = object.__new__(decode_call.DecodeCalls)
        made.device, made._layout = 0, "NHD"
        p = SimpleNamespace(
            dtype=bfloat16, kv_dtype=bfloat16, out_dtype=bfloat16, batch_size=2, q_len_per_req=1, num_qo_heads=4,
            num_kv_heads=2, head_dim=64, page_size=16, max_index=2,
        )  # fmt: skip
        more = cache, None, None, None, None, None, False, None
        made._checked("op", p, wide[..., 2:], *more)
        with pytest.raises(errors.LayoutError, match=r"op: q starts at address .*expected multiples of 4 bytes"):
            made._checked("op", p, wide[..., 1:65], *more)


# --- errors of fi_cupy, and no others


def _rotated(**other):
    made = {
        "q_rope": np.zeros((3, 4, 32), np.float16), "k_rope": np.zeros((3, 2, 32), np.float16), "q_nope": None,
        "k_nope": None, "v": np.zeros((3, 2, 64), np.float16), "cos_sin_cache": np.zeros((9, 32), F32),
        "pos_ids": np.zeros(3, np.int32), "kv_indices": np.int32([4, 1, 2]), "kv_indptr": np.int32([0, 2, 3]),
        "batch_indices": np.int32([0, 0, 1]), "positions": np.int32([3, 4, 2]), "page_size": 4,
        "paged_kv_cache": (np.zeros((6, 4, 2, 32), np.float16), np.zeros((6, 4, 2, 64), np.float16)),
    }  # fmt: skip
    return lambda: rope.rope_append_paged_kv_cache(**{**made, **other})


def _table(**other):
    made = {
        "input": np.arange(120, dtype=F32).reshape(3, 40), "lengths": np.int32([40, 3, 17]), "k": 5,
        "src_page_table": np.zeros((3, 40), np.int32),
    }  # fmt: skip
    return lambda: fi_cupy.top_k_page_table_transform(**{**made, **other})


def _latent(indptr, indices):
    wrapper = fi_cupy.BatchMLAPagedAttentionWrapper(np.zeros(256, np.uint8))
    return lambda: wrapper.plan(
        [0, 1, 2], indptr, indices, [4, 3], 2, 512, 64, 4, False, 0.1, "float32", "float32"
    )  # fmt: skip


def _ragged(plan, **run):
    def call():
        wrapper = fi_cupy.BatchPrefillWithRaggedKVCacheWrapper(np.zeros(256, np.uint8))
        wrapper.plan([0, 2], [0, 3], 1, 1, 16, **F, **plan)
        wrapper.run(*(np.zeros((n, 1, 16), F32) for n in (2, 3, 3)), **run)

    return call


def _append(page_size=4, indptr=(0, 2)):
    cache = np.zeros((3, 2, page_size, 1, 8), F32)
    row, zero = np.zeros((1, 1, 8), F32), np.int32([0])
    return lambda: fi_cupy.append_paged_kv_cache(
        row, row, zero, zero, cache, np.int32([1, 2]), np.int32(indptr), np.int32([1])
    )  # fmt: skip


ROTATED = {"pos_encoding_mode": "ROPE_LLAMA"}
WRONG = {
    "a page list too short": (_latent([0, 1, 2], []), "kv_indptr ends at 2, but kv_indices has 0 entries"),
    "pages behind the list": (_latent([7, 8, 9], [1]), "kv_indptr ends at 9, but kv_indices has 1 entries"),
    "no k_rope": (_rotated(k_rope=None), "k_rope is a builtins.NoneType, expected an array"),
    "no q_rope": (_rotated(q_rope=None), "q_rope is a builtins.NoneType, expected an array"),
    "a request too many": (_rotated(batch_indices=np.int32([0, 0, 2])), "batch_indices has 2, expected less than 2"),
    "a position outside": (_rotated(positions=np.int32([3, 9, 2])), "position 9 of request 0 lies outside its 2 pages"),
    "a page outside": (_rotated(kv_indices=np.int32([4, 6, 2])), "kv_indices go from 2 to 6, expected 0 to 5"),
    "no offsets": (_rotated(kv_indptr=np.int32([])), r"kv_indptr has shape \(0,\), expected \(requests \+ 1,\)"),
    "offsets below 0": (_append(indptr=(-5, 2)), "position 0 of request 0 lies outside"),
    "pages of no tokens": (_append(page_size=0), "lies outside its 2 pages of 0 tokens"),
    "a line outside": (_table(row_to_batch=np.int32([0, 3, 1])), r"row_to_batch\[1\] is 3, expected 0 to 2"),
    "a line below": (_table(row_to_batch=np.int32([0, -1, 1])), r"row_to_batch\[1\] is -1, expected 0 to 2"),
    "slots outside": (_table(src_page_table=np.zeros((3, 7), np.int32)), "row 0 looks up slots .* expected 0 to 6"),
    "a page of 2^40": (_table(page_size=1 << 40), "page_size is 1099511627776, expected at least 1 in 31 bits"),
    "offsets that fall": (
        lambda: fi_cupy.get_batch_indices_positions(np.int32([0, 2, 1]), np.int32([5, 5]), 2),
        "append_indptr must start at >= 0 and not decrease",
    ),
    "a reciprocal of 0": (
        lambda: fi_cupy.fp4_quantize(np.ones((2, 16), np.float16), 0.0, is_global_scale_inversed=True),
        "global_scale is 0 with is_global_scale_inversed=True",
    ),
    "an output scale of 0": (_ragged({}, o_scale=0), "o_scale is 0, expected a finite number that is not 0"),
    "a negative base": (_ragged({**ROTATED, "rope_theta": -1.0}), "rope_theta is -1.0, expected a positive number"),
    "a scale that is none": (_ragged({**ROTATED, "rope_scale": np.nan}), "rope_scale is nan, expected a positive"),
    "a workspace for a layout": (
        lambda: fi_cupy.BatchAttention(np.zeros(9, np.uint8)),
        "kv_layout is array.*expected 'NHD' or 'HND'",
    ),
    "one tile extent": (
        lambda: quantization.dequantize_fp8(
            np.zeros((4, 8), ml_dtypes.float8_e4m3fn), np.ones((4, 1), F32), tile_shape=(1.5, 8)
        ),
        r"tile_shape\[0\] is 1.5, expected an integer",
    ),
    "states of nothing": (
        lambda: fi_cupy.merge_states(np.zeros((2, 3, 1, 0), F32), np.zeros((2, 3, 1), F32)),
        "expected a head_dim of at least 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_have_typed_errors(name):
    call, text = WRONG[name]
    with np.errstate(all="ignore"), pytest.raises(errors.ArgumentError, match=text):
        call()


def test_formats_of_no_columns():
    """Tiles of scales of nothing."""
    x = np.zeros((5, 0), np.float16)
    for made in (
        fi_cupy.nvfp4_quantize(x, F32([1])), fi_cupy.mxfp4_quantize(x), fi_cupy.mxfp8_quantize(x),
        (fi_cupy.block_scale_interleave(np.zeros((130, 0), np.uint8)),),
    ):  # fmt: skip
        assert all(y.size == 0 for y in made)
