"""Matrix products: plain, batched, one weight a segment, and fp8 with dequantisation scales.

16-bit and fp8 operands are upcast to float32 and multiplied by BLAS; scales apply before the product is rounded.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fi_cupy.reference._common import BFLOAT16, Array, compute_dtype, is_fp8, round_to, upcast
from fi_cupy.reference.activation import silu


def _out_dtype(a: Array, out_dtype: DTypeLike | None) -> np.dtype:
    if out_dtype is not None:
        return np.dtype(out_dtype)
    return BFLOAT16 if is_fp8(a.dtype) else a.dtype


def mm(
    a: Array,
    b: Array,
    bias: Array | None = None,
    out_dtype: DTypeLike | None = None,
    residual: Array | None = None,
) -> Array:
    """``a @ b + bias + residual``, rounded once.

    Parameters
    ----------
    a : [m, k]
    b : [k, n]
        Any strides; FlashInfer's column-major `b` is the transposed view of an ``[n, k]`` array.
    bias : [n], optional
    out_dtype : optional
        Default: dtype of `a`, bf16 if that is fp8.
    residual : [m, n], optional

    Returns
    -------
    Array
        ``[m, n]``.

    Source: flashinfer.gemm.mm_bf16.
    """
    ct = compute_dtype(a, b, bias, residual)
    out = upcast(a, ct) @ upcast(b, ct)
    for term in (bias, residual):
        if term is not None:
            out = out + upcast(term, ct)
    return round_to(out, _out_dtype(a, out_dtype))


def mm_swiglu(a: Array, b: Array, bias: Array | None = None, out_dtype: DTypeLike | None = None) -> Array:
    """``silu(a @ b[:, :n] + bias[:n]) * (a @ b[:, n:] + bias[n:])``, rounded once.

    Parameters
    ----------
    a : [m, k]
    b : [k, 2 * n]
        The gate's columns first.
    bias : [2 * n], optional
    out_dtype : default dtype of `a`

    Returns
    -------
    Array
        ``[m, n]``.

    Source: Shazeer 2020 (arXiv:2002.05202); flashinfer.gemm.mm_bf16_swiglu.
    """
    ct = compute_dtype(a, b, bias)
    both = upcast(a, ct) @ upcast(b, ct)
    if bias is not None:
        both = both + upcast(bias, ct)
    n = both.shape[1] // 2
    return round_to(silu(both[:, :n]) * both[:, n:], _out_dtype(a, out_dtype))


def bmm(a: Array, b: Array, out_dtype: DTypeLike | None = None) -> Array:
    """Batched product ``[batch, m, k] @ [batch, k, n]``; see `mm`.

    Source: flashinfer.gemm.bmm_bf16.
    """
    ct = compute_dtype(a, b)
    return round_to(upcast(a, ct) @ upcast(b, ct), _out_dtype(a, out_dtype))


def scaled_mm(
    a: Array,
    b: Array,
    a_scale: ArrayLike,
    b_scale: ArrayLike,
    bias: Array | None = None,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """``a @ b * a_scale * b_scale + bias`` with one multiplier an operand, or one a row of `a` and a column of `b`.

    Parameters
    ----------
    a : fp8 [m, k] or [batch, m, k]
    b : fp8 [k, n] or [batch, k, n]
    a_scale, b_scale : one element, or [m] and [n] elements in any shape
    bias : [n], optional
    out_dtype : default bf16

    Source: flashinfer.gemm.mm_fp8; torch._scaled_mm.
    """
    ct = compute_dtype(a, b)
    rows, columns = (upcast(np.asarray(s), ct).reshape(-1) for s in (a_scale, b_scale))
    out = (upcast(a, ct) @ upcast(b, ct)) * rows[:, None] * columns
    if bias is not None:
        out = out + upcast(bias, ct)
    return round_to(out, _out_dtype(a, out_dtype))


def bmm_fp8(a: Array, b: Array, a_scale: ArrayLike, b_scale: ArrayLike, out_dtype: DTypeLike | None = None) -> Array:
    """``a @ b * a_scale * b_scale`` with one dequantisation *multiplier* an operand.

    Parameters
    ----------
    a : fp8 [batch, m, k]
    b : fp8 [batch, k, n]
    a_scale, b_scale : float or one-element array
    out_dtype : default bf16

    Source: flashinfer.gemm.bmm_fp8.
    """
    ct = compute_dtype(a, b)
    scale = float(np.asarray(a_scale).reshape(-1)[0]) * float(np.asarray(b_scale).reshape(-1)[0])
    return round_to((upcast(a, ct) @ upcast(b, ct)) * scale, _out_dtype(a, out_dtype))


def segment_gemm(
    x: Array,
    weights: Array,
    seg_indptr: Array,
    weight_indices: Array | None = None,
    weight_column_major: bool = False,
    out_dtype: DTypeLike | None = None,
    bias: Array | None = None,
) -> Array:
    """Multiply every segment of rows with its own weight (LoRA, MoE experts).

    Parameters
    ----------
    x : [total_rows, d_in]
    weights : [num_weights, d_in, d_out], or [num_weights, d_out, d_in] if `weight_column_major`
    seg_indptr : int [segments + 1]
    weight_indices : int [segments], optional
        Which weight a segment uses; None: segment i uses weight i.
    weight_column_major : bool
    out_dtype : default dtype of `x`, bf16 if that is fp8
    bias : [num_weights, d_out], optional

    Returns
    -------
    Array
        ``[total_rows, d_out]``; rows outside every segment are zero.

    Source: flashinfer.gemm.SegmentGEMMWrapper.
    """
    ct = compute_dtype(x, weights)
    d_out = weights.shape[1] if weight_column_major else weights.shape[2]
    out = np.zeros((x.shape[0], d_out), dtype=ct)
    for i in range(len(seg_indptr) - 1):
        start, stop = int(seg_indptr[i]), int(seg_indptr[i + 1])
        if start == stop:
            continue
        number = i if weight_indices is None else int(weight_indices[i])
        w = weights[number]
        out[start:stop] = upcast(x[start:stop], ct) @ upcast(w.T if weight_column_major else w, ct)
        if bias is not None:
            out[start:stop] += upcast(bias[number], ct)
    return round_to(out, _out_dtype(x, out_dtype))


def gemm_fp8_nt_groupwise(
    a: Array,
    b: Array,
    a_scale: Array,
    b_scale: Array,
    scale_major_mode: str = "MN",
    scale_granularity_mnk: tuple[int, int, int] = (1, 128, 128),
    out_dtype: DTypeLike | None = None,
    m_indptr: Array | None = None,
    outside: Array | None = None,
) -> Array:
    """``dequant(a) @ dequant(b).T`` with a scale for every block of `scale_granularity_mnk` = (gm, gn, gk).

    Parameters
    ----------
    a : fp8 [m, k]
    b : fp8 [n, k]
    a_scale : float32 [k / gk, m / gm] for "MN" (m may be padded), [m / gm, k / gk] for "K"
    b_scale : float32 [k / gk, n / gn] for "MN", [n / gn, k / gk] for "K"
    scale_major_mode : "MN" or "K"
    scale_granularity_mnk : (gm, gn, gk)
    out_dtype : default bf16
    m_indptr : int [groups + 1], optional
        Rows of each group; `b` and `b_scale` have a leading axis of groups then.
    outside : [m, n], optional
        What rows outside every group hold, zero by default.

    Returns
    -------
    Array
        ``[m, n]``.

    Source: DeepSeek-V3 report, section 3.3; flashinfer.gemm.gemm_fp8_nt_groupwise.
    """
    ct = compute_dtype(a, b, a_scale, b_scale)
    gm, gn, gk = scale_granularity_mnk
    if scale_major_mode == "MN":
        a_scale, b_scale = a_scale.swapaxes(-1, -2), b_scale.swapaxes(-1, -2)

    def dequantise(x: Array, scale: Array, block: int) -> Array:
        rows, cols = np.arange(x.shape[0]) // block, np.arange(x.shape[1]) // gk
        return upcast(x, ct) * upcast(scale, ct)[rows[:, None], cols]

    left, kind = dequantise(a, a_scale, gm), _out_dtype(a, out_dtype)
    if m_indptr is None:
        return round_to(left @ dequantise(b, b_scale, gn).T, kind)
    out = np.zeros((a.shape[0], b.shape[1]), kind) if outside is None else outside.copy()
    for g in range(len(m_indptr) - 1):
        rows = slice(int(m_indptr[g]), int(m_indptr[g + 1]))
        out[rows] = round_to(left[rows] @ dequantise(b[g], b_scale[g], gn).T, kind)
    return out


def masked_numbers(masked_m: Array, rows: int) -> Array:
    """The group of each of ``groups * rows`` rows of which a group's first `masked_m` count, else -1."""
    groups = len(masked_m)
    counted = np.arange(rows) < np.asarray(masked_m)[:, None]
    return np.where(counted, np.arange(groups)[:, None], -1).reshape(-1)


def grouped_rows(
    a: Array,
    b: Array,
    a_scale: Array,
    b_scale: Array,
    numbers: Array,
    scale_granularity_mnk: tuple[int, int, int],
    out: Array,
) -> Array:
    """``dequant(a[i]) @ dequant(b[numbers[i]]).T`` for every row i with a group's number; other rows as in `out`.

    Parameters
    ----------
    a : fp8 [m, k]
    b : fp8 [groups, n, k]
    a_scale, b_scale : float32 [m, k / gk], [groups, n / gn, k / gk]
    numbers : int [m]
    scale_granularity_mnk : (1, gn, gk)
    out : [m, n], of which the dtype is that of the result

    Returns
    -------
    Array
        ``[m, n]``.

    Source: DeepGEMM's m_grouped_fp8_gemm_nt_contiguous and _masked.
    """
    made = out.copy()
    for g in range(len(b)):
        rows = np.asarray(numbers) == g
        made[rows] = gemm_fp8_nt_groupwise(
            a[rows], b[g], a_scale[rows], b_scale[g], "K", scale_granularity_mnk, out.dtype
        )
    return made
