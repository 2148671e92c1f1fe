"""POD attention: one prompt and a batch of decoding requests in one call."""

from __future__ import annotations

from typing import Any

from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.errors import PlanError, UnsupportedError
from fi_cupy.prefill import single_prefill_with_kv_cache
from fi_cupy.prefill_plan import check_planned

_OP = "PODWithPagedKVCacheWrapper"


class PODWithPagedKVCacheWrapper:
    """Prefill attention of one prompt over contiguous keys, and decode attention of a batch over a paged cache.

    Both parts are queued on the caller's stream, the prompt first: two launches (a third one merges, where the prompt
    is short and its keys are many), not the single launch in which the two share the multiprocessors. Results are those
    of `single_prefill_with_kv_cache` and of `BatchDecodeWithPagedKVCacheWrapper`, bit by bit. `run` can be captured in
    a CUDA graph after it has run once with the same shapes.

    Parameters
    ----------
    float_workspace_buffer : array
        As in `BatchDecodeWithPagedKVCacheWrapper`, whose part it serves. A CPU array selects the NumPy reference.
    kv_layout : "NHD" or "HND"
        Of the paged cache.
    use_cuda_graph : bool
        Keep the decode part's addresses and grid fixed, so that a captured `run` follows later plans.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : int32 arrays
        CUDA-graph mode, see `BatchDecodeWithPagedKVCacheWrapper`.
    jit_args : None
        Kept for FlashInfer's signature.

    Source
    ------
    flashinfer.pod.PODWithPagedKVCacheWrapper; Kamath et al. 2024 (arXiv:2410.18038).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.PODWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 2], [5, 1], [3], 8, 2, 64, 16, q_data_type="float32")        # one request, 16 + 3 keys
    >>> q_p, k_p = np.ones((7, 8, 64), np.float32), np.ones((7, 2, 64), np.float32)
    >>> q_d, cache = np.ones((1, 8, 64), np.float32), np.ones((6, 2, 16, 2, 64), np.float32)
    >>> o_p, o_d = wrapper.run(q_p, k_p, k_p, q_d, cache, causal_p=True)
    >>> o_p.shape, o_d.shape
    ((7, 8, 64), (1, 8, 64))
    """

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        jit_args: Any = None,
    ) -> None:
        if jit_args is not None:
            raise UnsupportedError(f"{_OP}: jit_args is not supported; leave it out")
        self._layout = kv_layout
        self._decode = BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph, True, paged_kv_indptr_buffer, paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )  # fmt: skip

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper keeps addresses and grid fixed."""
        return self._decode.is_cuda_graph_enabled

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another scratch buffer from the next `plan` on. The wrapper owns its integer buffer: pass None for it."""
        self._decode.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        **decode_options: Any,
    ) -> None:
        """Make the schedule of the decode part, see `BatchDecodeWithPagedKVCacheWrapper.plan`.

        `decode_options` are further keywords of that function (logits_soft_cap, seq_lens, fixed_split_size ...). The
        prompt needs no plan: its schedule is kept by its lengths.
        """
        self._decode.plan(
            indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            pos_encoding_mode=pos_encoding_mode, window_left=window_left, q_data_type=q_data_type,
            kv_data_type=kv_data_type, data_type=data_type, sm_scale=sm_scale, rope_scale=rope_scale,
            rope_theta=rope_theta, non_blocking=non_blocking, **decode_options,
        )  # fmt: skip

    begin_forward = plan

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the first seven by position."""
        return self._decode.workspace_size(*args, **kwargs)

    def run(
        self,
        q_p: Any,
        k_p: Any,
        v_p: Any,
        q_d: Any,
        paged_kv_cache_d: Any,
        custom_mask_p: Any = None,
        packed_custom_mask_p: Any = None,
        causal_p: bool = False,
        kv_layout_p: str = "NHD",
        pos_encoding_mode_p: str = "NONE",
        sm_scale_p: float | None = None,
        window_left_p: int = -1,
        rope_scale_p: float | None = None,
        rope_theta_p: float | None = None,
        return_lse_p: bool = False,
        custom_mask_d: Any = None,
        packed_custom_mask_d: Any = None,
        causal_d: bool = False,
        kv_layout_d: str = "NHD",
        pos_encoding_mode_d: str = "NONE",
        sm_scale_d: float | None = None,
        window_left_d: int = -1,
        rope_scale_d: float | None = None,
        rope_theta_d: float | None = None,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        return_lse_d: bool = False,
        use_fp16_qk_reduction: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
        logits_soft_cap_p: float | None = None,
        out_d: Any = None,
        lse_d: Any = None,
        sinks_d: Any = None,
    ) -> tuple[Any, Any]:
        """Attention of both parts.

        Parameters
        ----------
        q_p, k_p, v_p : arrays
            The prompt's ``[qo_len, num_qo_heads, head_dim]`` and ``[kv_len, num_kv_heads, head_dim]`` (`kv_layout_p`).
        q_d : array, [batch, num_qo_heads, head_dim]
        paged_kv_cache_d : array, or (keys, values)
        custom_mask_p, ..., rope_theta_p, logits_soft_cap_p
            See `single_prefill_with_kv_cache`.
        custom_mask_d, packed_custom_mask_d : None
            A decoding query sees all keys; with a mask it is prefill.
        causal_d : bool
            The same either way: the one query of a request is its last.
        kv_layout_d, pos_encoding_mode_d, sm_scale_d, window_left_d, rope_scale_d, rope_theta_d
            Defaults, or what the constructor and `plan` were given.
        q_scale, k_scale, v_scale : float, optional
            Of the decode part, as in FlashInfer.
        use_fp16_qk_reduction : bool
            A hint; products are summed in fp32.
        enable_pdl : bool, optional
            Of the decode part; the prompt's launch uses it where the device has it. It does not change results.
        return_lse_p, return_lse_d : bool
        out_d, lse_d, sinks_d : arrays, optional
            See `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns
        -------
        (o_p, o_d)
            Each is a pair (out, lse) where its `return_lse` asks for it. (FlashInfer computes that lse and drops it.)

        Raises
        ------
        PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{_OP}.run"
        p = self._decode._planned
        if p is None:
            raise PlanError(f"{op}: plan() must come first")
        if args:
            raise UnsupportedError(
                f"{op}: {len(args)} extra arguments; they belong to JIT variants, which this has not"
            )
        if custom_mask_d is not None or packed_custom_mask_d is not None:
            raise UnsupportedError(
                f"{op}: custom_mask_d is not supported; BatchPrefillWithPagedKVCacheWrapper takes masks"
            )
        check_planned(op, "kv_layout_d", kv_layout_d, "NHD", self._layout)
        check_planned(op, "pos_encoding_mode_d", pos_encoding_mode_d, "NONE", p.options["pos_encoding_mode"])
        check_planned(op, "sm_scale_d", sm_scale_d, None, p.sm_scale)
        check_planned(op, "window_left_d", max(window_left_d, -1), -1, p.window_left)
        check_planned(op, "rope_scale_d", rope_scale_d, None, p.options["rope_scale"])
        check_planned(op, "rope_theta_d", rope_theta_d, None, p.options["rope_theta"])
        prefill = single_prefill_with_kv_cache(
            q_p, k_p, v_p, custom_mask=custom_mask_p, packed_custom_mask=packed_custom_mask_p, causal=causal_p,
            kv_layout=kv_layout_p, pos_encoding_mode=pos_encoding_mode_p, sm_scale=sm_scale_p,
            window_left=window_left_p, logits_soft_cap=logits_soft_cap_p, rope_scale=rope_scale_p,
            rope_theta=rope_theta_p, return_lse=return_lse_p,
        )  # fmt: skip
        decode = self._decode.run(
            q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse_d,
            enable_pdl=enable_pdl, out=out_d, lse=lse_d, sinks=sinks_d,
        )  # fmt: skip
        return prefill, decode

    forward = run

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""

    def _parts(self) -> list[tuple[str, Any]]:
        """What `fi_cupy.attention.explain` looks into."""
        return [("decode part, after the prompt's single_prefill_with_kv_cache", self._decode)]
