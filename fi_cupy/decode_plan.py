"""Arguments of a batch decode plan: checks, host values of the page table, the caller's CUDA-graph buffers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_shape
from fi_cupy.decode_kernel import Geometry, check_pos_encoding, check_rope, rope_turns
from fi_cupy.dtypes import DType
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DeviceError, UnsupportedError
from fi_cupy.jit.kernel import Kernel
from fi_cupy.page_table import PageTable, read_page_table
from fi_cupy.workspace import copy_device, copy_to_device

#: indptr, indices and last_page_len of CUDA-graph mode.
Buffers = tuple[View, View, View]
NAMES = ("indptr", "indices", "last_page_len")


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
    table: PageTable
    window_left: int


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
    num_qo_heads, num_kv_heads, head_dim, page_size, q_len_per_req = as_sizes(
        op, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, page_size=page_size,
        q_len_per_req=q_len_per_req,
    )  # fmt: skip
    if window_right != 0:
        raise UnsupportedError(f"{op}: window_right is {window_right}, expected 0")
    if fixed_split_size is not None and fixed_split_size < 1:
        fixed_split_size = None
    if data_type is not None:
        kv_data_type = data_type if kv_data_type is None else kv_data_type
        q_data_type = data_type if q_data_type == "float16" else q_data_type
    mode = check_pos_encoding(op, pos_encoding_mode)
    check_rope(op, rope_scale, rope_theta)
    p = Planned()
    p.q_len_per_req = q_len_per_req
    p.alibi, p.rope, p.window_left = mode == "ALIBI", mode == "ROPE_LLAMA", max(int(window_left), -1)
    p.turns = rope_turns(head_dim, rope_scale, rope_theta) if p.rope and device >= 0 and head_dim <= 256 else ()
    p.logits_soft_cap = max(float(logits_soft_cap or 0.0), 0.0)
    p.num_qo_heads, p.num_kv_heads, p.head_dim, p.page_size = num_qo_heads, num_kv_heads, head_dim, page_size
    p.dtype = to_dtype(q_data_type)
    p.kv_dtype = p.dtype if kv_data_type is None else to_dtype(kv_data_type)
    p.out_dtype = p.dtype if o_data_type is None else to_dtype(o_data_type)
    p.sm_scale = 1.0 / math.sqrt(head_dim) if sm_scale is None else float(sm_scale)
    p.options = {
        "pos_encoding_mode": pos_encoding_mode, "window_left": p.window_left, "logits_soft_cap": p.logits_soft_cap,
        "rope_scale": rope_scale, "rope_theta": rope_theta,
    }  # fmt: skip
    if num_qo_heads % num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {num_qo_heads}, expected a multiple of num_kv_heads = {num_kv_heads}"
        )
    p.split = (None if fixed_split_size is None else int(fixed_split_size) * page_size, disable_split_kv)
    return p, _read_table(op, buffers, p, indptr, indices, last_page_len, seq_lens, indptr_host)


def _read_table(
    op: str, buffers: Buffers | None, p: Planned, indptr: Any, indices: Any, last_page_len: Any, seq_lens: Any,
    indptr_host: Any,
) -> np.ndarray[Any, Any]:  # fmt: skip
    """Put the page table into `p`; the keys of every request."""
    pointers = indptr if indptr_host is None else indptr_host
    table, _ = read_page_table(op, NAMES, pointers, indices, last_page_len, seq_lens, p.page_size)
    p.batch_size = len(table.last_page_len)
    if indptr_host is not None:
        check_shape(op, "indptr_host", view(table.indptr), view(indptr, op, "indptr").shape, "= indptr.shape")
    if buffers is not None:
        last = view(table.last_page_len)
        check_shape(op, "last_page_len", last, buffers[2].shape, "= the batch size of the CUDA-graph buffers")
        if table.indices.shape[0] > buffers[1].shape[0]:
            raise ArgumentError(
                f"{op}: indices has {table.indices.shape[0]} entries, more than paged_kv_indices_buffer's "
                f"{buffers[1].shape[0]}"
            )
    p.indptr, p.last_page_len, p.indices, p.table = table.indptr, table.last_page_len, table.indices, table
    p.max_index = table.max_index
    return table.kv_len


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
    for buffer, values in zip(buffers, (p.indptr, p.table.host_indices, p.last_page_len), strict=True):
        if values is not None:
            copy_to_device(buffer.ptr, values.astype(np.int32, copy=False), stream, device)
        elif p.indices.ptr != buffer.ptr:
            copy_device(buffer.ptr, p.indices.ptr, 4 * int(p.indptr[-1]), stream, device)
