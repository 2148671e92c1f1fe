"""Sampling: softmax, one token a row from logits or probabilities under top-k, top-p and min-p, and the filters alone.

Rules that hold for every function here:

* A filter keeps tokens by *value*, ties included. ``top_k >= vocab`` and ``top_p >= 1`` keep all. In device arrays a
  top_k below 1 counts as 1, and a top_p of 0 or less keeps the likeliest tokens.
* One uniform number a row, Philox4x32-10 of (seed, offset, output row), and inversion of the cumulative distribution in
  index order, in integer arithmetic: the token depends on nothing else. Rows of which only top-p keeps not all draw by
  rejection: from the whole row, and if top-p does not keep that token, from the likelier ones with the next number,
  until it keeps one (searching the threshold for one number would take twice as long). The same seed gives the same
  tokens on every GPU and on CPU arrays. With one seed *a row*, the row's number stays out of it, so that a request's
  token does not depend on its place in the batch.
* ``seed`` and ``offset`` are ints, or 1-D int64 or uint64 arrays of 1 or `rows` elements on the device of the input: a
  CUDA graph that reads them from the device draws anew at every replay that finds other values there.
* Output row i reads input row ``indices[i]``, and every parameter at i. The tokens have the dtype of `indices` (int32).
  An index that is no row is an error where the host has the indices; on a GPU its token is 0 and ``valid`` False.
* A row with NaN, or with nothing to draw from, gives token 0 and ``valid`` False.
* Results are deterministic whether or not `deterministic` asks for it.
"""

from __future__ import annotations

from typing import Any

from fi_cupy.random_state import Generator as Generator
from fi_cupy.random_state import default_generator as default_generator
from fi_cupy.random_state import get_seed_and_offset as get_seed_and_offset
from fi_cupy.random_state import manual_seed as manual_seed
from fi_cupy.sampling_kernels import MAX_VOCAB as MAX_VOCAB
from fi_cupy.sampling_kernels import kernel_specs as kernel_specs
from fi_cupy.sampling_launch import draw_tokens, filtered_rows, is_joint, softmax_rows
from fi_cupy.speculative import chain_speculative_sampling as chain_speculative_sampling


def softmax(logits: Any, temperature: Any = None, enable_pdl: bool | None = None) -> Any:
    """Softmax of every row of ``logits / temperature``.

    Parameters
    ----------
    logits : array, [batch, vocab], float32, float16 or bfloat16
        Rows may be strided.
    temperature : float or array, [batch], float32 or float64, optional
        0 means an inverse temperature of 0: *uniform* over the tokens that are not at -inf, not the argmax.
    enable_pdl : bool, optional
        Launch by programmatic dependent launch (sm_90 and later); does not change results.

    Returns
    -------
    array, [batch, vocab], float32
        A row of -inf gives zeros; a row with NaN gives NaN.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.sampling.softmax.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> fi_cupy.sampling.softmax(np.array([[1.0, 1.0, -np.inf]], np.float32), 0.0)
    array([[0.5, 0.5, 0. ]], dtype=float32)
    """
    return softmax_rows(logits, temperature, enable_pdl)


def sampling_from_logits(
    logits: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token a row from ``softmax(logits)``.

    Parameters
    ----------
    logits : array, [batch, vocab], float32, float16 or bfloat16
        Rows may be strided. +inf takes all.
    indices : array, [rows], int32 or int64, optional
        Input row of each output row (default: the row itself).
    deterministic : bool
        Results are deterministic either way.
    generator : optional
        See `get_seed_and_offset`; not together with `seed`.
    check_nan : bool
        Raise if a row has NaN; waits for the GPU.
    seed, offset : int or array, [1] or [rows], int64 or uint64, optional
        See the module's rules. `offset` defaults to 0 when `seed` is given.
    return_valid : bool
        Also return which rows are valid.

    Returns
    -------
    array, [rows], dtype of `indices` or int32
        With `return_valid`: (tokens, bool array [rows]).

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, UnsupportedError
    ArgumentError
        NaN with `check_nan`, `seed` with `generator`, `offset` without `seed`.

    Source
    ------
    flashinfer.sampling.sampling_from_logits.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> fi_cupy.sampling.sampling_from_logits(np.array([[0.0, 99.0, 0.0]], np.float32), seed=1)
    array([1], dtype=int32)
    """
    return draw_tokens(
        "sampling_from_logits", "logits", logits, indices=indices, generator=generator, check_nan=check_nan,
        seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def sampling_from_probs(
    probs: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token a row from probabilities, which need not sum to 1 (negative ones count as 0).

    Parameters, returns, errors: `sampling_from_logits`. Source: flashinfer.sampling.sampling_from_probs.
    """
    return draw_tokens(
        "sampling_from_probs", "probs", probs, indices=indices, generator=generator, check_nan=check_nan,
        seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def top_p_sampling_from_probs(
    probs: Any,
    top_p: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw from the smallest set of likeliest tokens whose probabilities sum to at least `top_p`, ties kept.

    ``top_p``: float or array, [rows], float32 or float64. The rest: `sampling_from_logits`.
    Source: flashinfer.sampling.top_p_sampling_from_probs.
    """
    return draw_tokens(
        "top_p_sampling_from_probs", "probs", probs, top_p=top_p, joint=True, indices=indices, generator=generator,
        check_nan=check_nan, seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def top_k_sampling_from_probs(
    probs: Any,
    top_k: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw from the tokens that have fewer than `top_k` strictly likelier ones.

    ``top_k``: int or array, [rows], int32 or int64. The rest: `sampling_from_logits`.
    Source: flashinfer.sampling.top_k_sampling_from_probs.
    """
    return draw_tokens(
        "top_k_sampling_from_probs", "probs", probs, top_k=top_k, indices=indices, generator=generator,
        check_nan=check_nan, seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def min_p_sampling_from_probs(
    probs: Any,
    min_p: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw from the tokens with a probability of at least ``min_p * max(probs)``.

    ``min_p``: float or array, [rows], float32 or float64. The rest: `sampling_from_logits`.
    Source: Nguyen et al. 2024 (arXiv:2407.01082); flashinfer.sampling.min_p_sampling_from_probs.
    """
    return draw_tokens(
        "min_p_sampling_from_probs", "probs", probs, min_p=min_p, indices=indices, generator=generator,
        check_nan=check_nan, seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def top_k_top_p_sampling_from_logits(
    logits: Any,
    top_k: Any,
    top_p: Any,
    indices: Any = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw from ``softmax(logits)`` under top-k and top-p.

    What is not said here is as in `sampling_from_logits`.

    Parameters
    ----------
    top_k : int or array, [rows], int32 or int64
    top_p : float or array, [rows], float32 or float64
    filter_apply_order : {"top_k_first", "joint"}
        "top_k_first": top-p works on what top-k left, renormalised. "joint": both work on the whole distribution.

    Source
    ------
    flashinfer.sampling.top_k_top_p_sampling_from_logits.
    """
    op = "top_k_top_p_sampling_from_logits"
    return draw_tokens(
        op, "logits", logits, top_k=top_k, top_p=top_p, joint=is_joint(op, filter_apply_order), indices=indices,
        generator=generator, check_nan=check_nan, seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def top_k_top_p_sampling_from_probs(
    probs: Any,
    top_k: Any,
    top_p: Any,
    indices: Any = None,
    filter_apply_order: str = "top_k_first",
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw from probabilities under top-k and top-p, as `top_k_top_p_sampling_from_logits` does from logits.

    Source: flashinfer.sampling.top_k_top_p_sampling_from_probs.
    """
    op = "top_k_top_p_sampling_from_probs"
    return draw_tokens(
        op, "probs", probs, top_k=top_k, top_p=top_p, joint=is_joint(op, filter_apply_order), indices=indices,
        generator=generator, check_nan=check_nan, seed=seed, offset=offset, return_valid=return_valid,
    )  # fmt: skip


def top_p_renorm_probs(probs: Any, top_p: Any, is_deterministic: bool = False) -> Any:
    """Set everything outside the top-p set to 0 and divide the rest by its sum.

    Parameters
    ----------
    probs : array, [batch, vocab], float32, float16 or bfloat16
    top_p : float or array, [batch], float32 or float64
    is_deterministic : bool
        Results are deterministic either way.

    Returns
    -------
    array
        Shape and dtype of `probs`; a row with NaN becomes 0.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ArgumentError, UnsupportedError

    Source
    ------
    flashinfer.sampling.top_p_renorm_probs.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> fi_cupy.sampling.top_p_renorm_probs(np.array([[0.5, 0.25, 0.25]], np.float32), 0.4)
    array([[1., 0., 0.]], dtype=float32)
    """
    return filtered_rows("top_p_renorm_probs", "probs", probs, None, top_p)


def top_k_renorm_probs(probs: Any, top_k: Any) -> Any:
    """Set everything below the k-th largest probability to 0 and divide the rest by its sum, ties kept.

    ``top_k``: int or array, [batch], int32 or int64. The rest: `top_p_renorm_probs`.
    Source: flashinfer.sampling.top_k_renorm_probs.
    """
    return filtered_rows("top_k_renorm_probs", "probs", probs, top_k, None)


def top_k_mask_logits(logits: Any, top_k: Any) -> Any:
    """Set everything below the k-th largest logit to -inf, ties kept; a row with NaN becomes -inf.

    ``top_k``: int or array, [batch], int32 or int64. The rest: `top_p_renorm_probs`.
    Source: flashinfer.sampling.top_k_mask_logits.
    """
    return filtered_rows("top_k_mask_logits", "logits", logits, top_k, None)


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs
