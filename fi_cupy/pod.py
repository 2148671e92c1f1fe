"""POD attention: one prompt and a batch of decoding requests in one call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from fi_cupy import decode, mixed, prefill_kernel, prefill_single
from fi_cupy.checks import check_device
from fi_cupy.choice_log import log_wrapper
from fi_cupy.decode_call import Call
from fi_cupy.decode_kernel import geometry as decode_geometry
from fi_cupy.decode_plan import Planned
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.errors import PlanError, UnsupportedError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.plan.decode import TILE
from fi_cupy.prefill_plan import Work, check_planned, launch, launch_values
from fi_cupy.variants import AttentionVariant, variant_of
from fi_cupy.workspace import PlanBuffer

_OP = "PODWithPagedKVCacheWrapper"


@lru_cache(maxsize=512)
def _apart_is_faster(
    problem: prefill_kernel.Problem, qo_len: int, kv_len: int, causal: bool, window_left: int, nbytes: int
) -> bool:
    """`mixed.apart_is_faster` of one prompt, which each `run` asks."""
    return mixed.apart_is_faster(mixed.prompt_operations(qo_len, kv_len, problem, causal, window_left), nbytes)


class Launched(NamedTuple):
    """What the latest `run` did, for `fi_cupy.attention.explain`."""

    mixed: mixed.Geometry | None
    prefill: prefill_kernel.Geometry
    work: Work
    scale: float
    head_scales: bool  # factors of q or k a head
    why: str  # why not one launch


class PODWithPagedKVCacheWrapper:
    """Prefill attention of one prompt over contiguous keys, and decode attention of a batch over a paged cache.

    One launch on the caller's stream, whose CTAs share the multiprocessors: half of them begin with tiles of the
    prompt, which compute, the others with decode items, which wait for memory, and each goes on with what is left.
    Results are those of `single_prefill_with_kv_cache` and of `BatchDecodeWithPagedKVCacheWrapper` up to rounding.
    `run` can be captured in a CUDA graph after it has run once with the same shapes.

    Parts that one kernel cannot hold take two launches, the prompt first: a prompt whose type or head dims
    (``head_dim_vo`` too) are not those of the decode part, arrays on different streams, ROPE_LLAMA, a variant, or a
    decode part that the decode kernel does not take. So do, on a Hopper GPU, a prompt so long beside the decode part
    that its own kernel gains more than overlapping would (`fi_cupy.mixed.apart_is_faster`). After a `run`,
    `fi_cupy.attention.explain` says which.

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
    jit_args : tuple, optional
        A variant in FlashInfer's form, see `BatchDecodeWithPagedKVCacheWrapper`.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`: of both parts. The prompt is batch 0 to it, and so is the first request.

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
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        self._variant: Any = variant_of(_OP, variant, jit_args, None)
        self._layout = kv_layout
        self._decode = decode.BatchDecodeWithPagedKVCacheWrapper(
            float_workspace_buffer, kv_layout, use_cuda_graph, True, paged_kv_indptr_buffer, paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer, jit_args=jit_args, variant=variant,
        )  # fmt: skip
        self._decode._pairs = False  # the mixed kernel's items are of one kv head
        self._decode._choose_geometry = decode_geometry  # and made for its CTAs, not for those that the tuner may know
        self._queues: PlanBuffer | None = None  # the launch's two queues, at an address that stays
        self._launched: Launched | None = None

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
        if self._queues is None and self._decode.device >= 0:
            self._queues = PlanBuffer(self._decode.device, 16, mixed.QUEUE_WORDS)
        self._launched = None

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
        variant_args: Mapping[str, Any] | None = None,
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
        q_scale, k_scale, v_scale : float, or float32 array [heads], optional
            Of the decode part, as in FlashInfer.
        use_fp16_qk_reduction : bool
            A hint; products are summed in fp32.
        enable_pdl : bool, optional
            Programmatic dependent launch; None: where the device has it. It does not change results.
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
        if self._variant is None and (args or variant_args):
            raise UnsupportedError(f"{op}: extra arguments belong to a variant; give one to the constructor (variant=)")
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
        options = {
            "custom_mask": custom_mask_p, "packed_custom_mask": packed_custom_mask_p, "causal": causal_p,
            "kv_layout": kv_layout_p, "pos_encoding_mode": pos_encoding_mode_p, "sm_scale": sm_scale_p,
            "window_left": window_left_p, "logits_soft_cap": logits_soft_cap_p, "rope_scale": rope_scale_p,
            "rope_theta": rope_theta_p, "return_lse": return_lse_p,
        }  # fmt: skip
        if self._variant is not None:
            o_p = prefill_single.single_prefill_with_kv_cache(
                q_p, k_p, v_p, **options, variant=self._variant, variant_args=(args, variant_args or {})
            )
            return o_p, self._decode.run(
                q_d, paged_kv_cache_d, *args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out_d, lse=lse_d,
                return_lse=return_lse_d, enable_pdl=enable_pdl, sinks=sinks_d, variant_args=variant_args,
            )  # fmt: skip
        prompt = prefill_single.prepare(op, q_p, k_p, v_p, **options)
        check_device(op, self._decode._workspace, q_p=prompt.x)
        if self._decode._by_prefill is not None:
            self._launch_prompt(
                prompt, f"the decode part takes the prefill kernel ({self._decode._why_prefill})", enable_pdl
            )
            log_wrapper(self, op)
            return prompt.result(), self._decode.run(
                q_d, paged_kv_cache_d, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out_d, lse=lse_d,
                return_lse=return_lse_d, enable_pdl=enable_pdl, sinks=sinks_d,
            )  # fmt: skip
        c = self._decode._checked(
            op, p, q_d, paged_kv_cache_d, q_scale, k_scale, v_scale, out_d, lse_d, return_lse_d, sinks_d
        )
        if prompt.x.is_cpu:
            prefill_single.run_on_cpu(prompt, kv_layout_p)
            self._decode._run_cpu(p, c)
        else:
            self._launch(p, prompt, c, enable_pdl)
        log_wrapper(self, op)
        return prompt.result(), c.result(out_d, lse_d, return_lse_d)

    forward = run

    def _launch(self, p: Planned, prompt: prefill_single.Call, c: Call, enable_pdl: bool | None) -> None:
        """One launch of the mixed kernel, or a launch for each part."""
        device = device_info(prompt.x.device)
        stream = c.x.stream()
        if p.rope:
            why = "the decode part rotates its keys (ROPE_LLAMA)"
        elif prompt.x.stream() != stream:
            why = "the parts' arrays are on different streams"
        else:
            part = mixed.Decode(
                p.num_kv_heads, p.num_qo_heads // p.num_kv_heads, p.head_dim, p.dtype, p.kv_dtype, p.out_dtype,
                p.page_size % TILE == 0, p.logits_soft_cap > 0, p.alibi,
            )  # fmt: skip
            both = mixed.geometry(prompt.problem, part, device)
            if both is None:
                why = "the parts differ in type or head dims, or the prompt is rotated"
            elif self._apart(p, prompt, c, device):
                why = "the Hopper kernel gains more on so long a prompt than one launch would by overlapping the parts"
            else:
                self._launch_both(both, p, prompt, c, stream, enable_pdl)
                return
        self._launch_prompt(prompt, why, enable_pdl)
        kernel = load_kernel(p.geometry.heads_spec, c.x.device) if c.scales.on_logits else p.kernel
        kernel.launch(p.grid, stream, *self._decode._values(p, c), *p.turns, pdl=enable_pdl)

    def _apart(self, p: Planned, prompt: prefill_single.Call, c: Call, device: DeviceInfo) -> bool:
        """Whether two launches are faster: the mixed kernel's tiles are those of the portable prefill kernel."""
        if prefill_single.geometry_of(prompt, device).hopper is None:
            return False
        keys = int(p.indptr[-1] - p.indptr[0]) * p.page_size
        if p.window_left >= 0:
            keys = min(keys, p.batch_size * (p.window_left + 1))
        return _apart_is_faster(
            prompt.problem, prompt.x.shape[0], prompt.kv_len, prompt.options.causal, prompt.options.window_left,
            2 * keys * p.num_kv_heads * p.head_dim * p.kv_dtype.itemsize,
        )  # fmt: skip

    def _launch_prompt(self, prompt: prefill_single.Call, why: str, enable_pdl: bool | None) -> None:
        """A launch of its own for the prompt."""
        device = device_info(prompt.x.device)
        g, work = prefill_single.schedule(prompt, device)
        scales = prompt.scales
        self._launched = Launched(None, g, work, prompt.options.sm_scale * scales.logit, scales.on_logits, why)
        launch(
            g, work, prompt.x, prompt.k, prompt.v, *prompt.strides, prompt.o, prompt.s, prompt.options, scales,
            mask=0 if prompt.mask is None else prompt.mask.packed.ptr, pdl=enable_pdl,
            kv_extent=prompt.kv_len,
        )  # fmt: skip

    def _launch_both(
        self,
        both: mixed.Geometry,
        p: Planned,
        prompt: prefill_single.Call,
        c: Call,
        stream: int,
        pdl: bool | None,
    ) -> None:
        """The mixed kernel."""
        device = prompt.x.device
        g, work = prefill_single.schedule(prompt, device_info(device), both.rows)
        scales, mask = prompt.scales, 0 if prompt.mask is None else prompt.mask.packed.ptr
        scale, head_scales = prompt.options.sm_scale * scales.logit, scales.on_logits or c.scales.on_logits
        self._launched = Launched(both, g, work, scale, head_scales, "")
        tiles = launch_values(
            g, work, prompt.x, prompt.k, prompt.v, *prompt.strides, prompt.o, prompt.s, prompt.options, scales, 0, 1,
            mask, 0,
        )  # fmt: skip
        assert self._queues is not None
        mixed.launch(
            both, device, stream, scale, head_scales, tiles, self._decode._values(p, c), self._queues.counters_ptr,
            work.num_items, g.num_kv_heads, p.grid // p.geometry.num_head_blocks, p.geometry.num_head_blocks, pdl,
        )  # fmt: skip

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""
