"""Arguments of a batch decode plan: checks, host values of the page table, the caller's CUDA-graph buffers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_dtype, check_ndim, check_shape
from fi_cupy.decode_kernel import Geometry, check_pos_encoding, rope_turns
from fi_cupy.dtypes import INDEX_TYPES, DType, int32
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DeviceError, UnsupportedError
from fi_cupy.jit.kernel import Kernel
from fi_cupy.plan.decode import check_page_table, kv_lengths
from fi_cupy.workspace import copy_device, copy_to_device

#: indptr, indices and last_page_len of CUDA-graph mode.
Buffers = tuple[View, View, View]


class Planned:
    """What `plan` leaves for `run`: fixed until the next plan."""

    alibi: bool
    rope: bool
    turns: tuple[bytes, ...]  # frequencies for the launch of a kernel with rope
    batch_size: int
    copied_indices: int  # words in front of the wrapper's own copy of the page numbers; 0: the caller's array is read
    counts: tuple[int, ...]
    dtype: DType
    geometry: Geometry
    grid: int
    head_dim: int
    indices: Any  # View on the GPU, ndarray on the CPU
    indptr: np.ndarray[Any, Any]
    items_ptr: int
    kernel: Kernel
    kv_dtype: DType
    last_page_len: np.ndarray[Any, Any]
    logits_soft_cap: float
    max_index: int  # largest page number where the host knows it, else -1
    num_kv_heads: int
    num_qo_heads: int
    options: dict[str, Any]
    out_dtype: DType
    page_size: int
    partial_md: int
    partial_out: int
    q_len_per_req: int  # more than one query token a request implies causal
    sm_scale: float
    split: tuple[int | None, bool]  # fixed_split_size in keys, disable_split_kv
    table: tuple[View, View, View]  # indptr, indices, last_page_len as given
    window_left: int


def _host_ints(x: View) -> np.ndarray[Any, Any]:
    """The values as int64; a GPU array is copied, which waits for it."""
    return x.host().astype(np.int64)


def prepare(
    op: str, device: int, buffers: Buffers | None,
    indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: int, num_kv_heads: int, head_dim: int,
    page_size: int, pos_encoding_mode: str = "NONE", window_left: int = -1, logits_soft_cap: float | None = None,
    q_data_type: Any = "float16", kv_data_type: Any = None, o_data_type: Any = None, data_type: Any = None,
    sm_scale: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
    non_blocking: bool = True, block_tables: Any = None, seq_lens: Any = None, fixed_split_size: int | None = None,
    disable_split_kv: bool = False, q_len_per_req: int = 1, *, window_right: int = 0, indptr_host: Any = None,
) -> tuple[Planned, np.ndarray[Any, Any]]:  # fmt: skip
    """Check the arguments of `plan`.

    Parameters
    ----------
    op : str
        Starts every message.
    device : int
        Where the wrapper works, -1 for the CPU.
    buffers : (indptr, indices, last_page_len), optional
        The fixed arrays of CUDA-graph mode.
    indptr, ...
        As `plan` of the wrapper.

    Returns
    -------
    (planned, kv_len)
        What `run` needs to know, and the keys of every request (int64).
    """
    if block_tables is not None:
        raise UnsupportedError(f"{op}: block_tables is not supported; the page table is indptr and indices")
    if q_len_per_req < 1:
        raise ArgumentError(f"{op}: q_len_per_req is {q_len_per_req}, expected at least 1")
    if window_right != 0:
        raise UnsupportedError(f"{op}: window_right is {window_right}, expected 0")
    if fixed_split_size is not None and fixed_split_size < 1:
        fixed_split_size = None
    if data_type is not None:
        kv_data_type = data_type if kv_data_type is None else kv_data_type
        q_data_type = data_type if q_data_type == "float16" else q_data_type
    mode = check_pos_encoding(op, pos_encoding_mode)
    p = Planned()
    p.q_len_per_req = int(q_len_per_req)
    p.alibi, p.rope, p.window_left = mode == "ALIBI", mode == "ROPE_LLAMA", max(int(window_left), -1)
    p.turns = rope_turns(head_dim, rope_scale, rope_theta) if p.rope and device >= 0 and head_dim <= 256 else ()
    p.logits_soft_cap = max(float(logits_soft_cap or 0.0), 0.0)
    p.num_qo_heads, p.num_kv_heads, p.head_dim, p.page_size = num_qo_heads, num_kv_heads, head_dim, page_size
    p.dtype = to_dtype(q_data_type)
    p.kv_dtype = p.dtype if kv_data_type is None else to_dtype(kv_data_type)
    p.out_dtype = p.dtype if o_data_type is None else to_dtype(o_data_type)
    p.sm_scale = 1.0 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale)
    if page_size < 1:
        raise ArgumentError(f"{op}: page_size is {page_size}, expected at least 1")
    p.options = {
        "pos_encoding_mode": pos_encoding_mode, "window_left": p.window_left, "logits_soft_cap": p.logits_soft_cap,
        "rope_scale": rope_scale, "rope_theta": rope_theta,
    }  # fmt: skip
    if num_kv_heads < 1 or num_qo_heads % num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {num_qo_heads}, expected a multiple of num_kv_heads = {num_kv_heads}"
        )
    p.split = (None if fixed_split_size is None else fixed_split_size * page_size, disable_split_kv)
    return p, _read_table(op, buffers, p, indptr, indices, last_page_len, seq_lens, indptr_host)


def _read_table(
    op: str,
    buffers: Buffers | None,
    p: Planned,
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    seq_lens: Any,
    indptr_host: Any,
) -> np.ndarray[Any, Any]:
    """Put views and host values of the page table into `p`; the keys of every request."""
    views = []
    for name, x in (("indptr", indptr), ("indices", indices), ("last_page_len", last_page_len)):
        x = np.asarray(x, dtype=np.int64 if not len(x) else None) if isinstance(x, (list, tuple)) else x
        v = view(x, op, name)
        check_ndim(op, name, v, 1)
        check_dtype(op, name, v, INDEX_TYPES)
        views.append(v)
    v_indptr, v_indices, v_last = views
    batch = v_indptr.shape[0] - 1
    if batch < 0:
        raise ArgumentError(f"{op}: indptr is empty, expected batch + 1 entries")
    check_shape(op, "last_page_len", v_last, (batch,), "= len(indptr) - 1")
    if buffers is not None:
        check_shape(op, "last_page_len", v_last, buffers[2].shape, "= the batch size of the CUDA-graph buffers")
        if v_indices.shape[0] > buffers[1].shape[0]:
            raise ArgumentError(
                f"{op}: indices has {v_indices.shape[0]} entries, more than paged_kv_indices_buffer's "
                f"{buffers[1].shape[0]}"
            )
    p.batch_size = batch
    p.indptr = _host_ints(v_indptr if indptr_host is None else view(indptr_host, op, "indptr_host"))
    check_shape(op, "indptr_host", view(p.indptr), (batch + 1,), "= len(indptr)")
    pages = np.diff(p.indptr)
    if seq_lens is not None:
        kv_len = _host_ints(view(seq_lens, op, "seq_lens"))
        check_shape(op, "seq_lens", view(kv_len), (batch,), "= len(last_page_len)")
        if (-(-kv_len // p.page_size) != pages).any():
            raise ArgumentError(f"{op}: seq_lens and indptr disagree on the number of pages")
        p.last_page_len = np.where(kv_len > 0, (kv_len - 1) % p.page_size + 1, 1)
    elif p.page_size == 1:
        p.last_page_len = np.ones(batch, np.int64)
    else:
        p.last_page_len = _host_ints(v_last)
    check_page_table(op, p.indptr, p.last_page_len, p.page_size, v_indices.shape[0])
    p.max_index = -1
    if v_indices.is_cpu:
        used = v_indices.numpy()[p.indptr[0] : p.indptr[-1]]
        if len(used):
            p.max_index = int(used.max())
            if int(used.min()) < 0:
                raise ArgumentError(f"{op}: indices holds a negative page number ({int(used.min())})")
    p.indices, p.table = v_indices, (v_indptr, v_indices, v_last)
    return kv_lengths(p.indptr, p.last_page_len, p.page_size)


def keep_on_host(op: str, buffers: Buffers | None, p: Planned) -> None:
    """CPU: keep copies for `run`, and fill the caller's fixed buffers as on the GPU."""
    if not p.indices.is_cpu:
        raise DeviceError(f"{op}: indices is on a GPU, expected the CPU like float_workspace_buffer")
    p.indices = p.indices.numpy().copy()
    if buffers is not None:
        for buffer, values in zip(buffers, (p.indptr, p.indices, p.last_page_len), strict=True):
            buffer.numpy()[: len(values)] = values


def fill_graph_buffers(buffers: Buffers, p: Planned, device: int, stream: int) -> None:
    """CUDA-graph mode: copy the page table into the caller's fixed buffers."""
    indptr, indices, last_page_len = p.table
    used = int(p.indptr[-1])
    for buffer, given, values, count in (
        (buffers[0], indptr, p.indptr, p.batch_size + 1),
        (buffers[1], indices, None, used),
        (buffers[2], last_page_len, p.last_page_len, p.batch_size),
    ):
        if given.is_cpu or given.dtype is not int32 or given.strides[0] != 1:
            host = given.numpy()[:count] if values is None else values
            copy_to_device(buffer.ptr, host.astype(np.int32), stream, device)
        elif given.ptr != buffer.ptr:
            copy_device(buffer.ptr, given.ptr, 4 * count, stream, device)
