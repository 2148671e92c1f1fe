"""FlashInfer's modules by their names: ``gen_*_module`` gives a `JitSpec`, ``get_*_uri`` its name.

An attention module holds the instances that its options can take, for batches and group sizes of every usual kind;
whatever else a call needs is compiled when it is called. For compiling ahead of time by what a server will run:

>>> from fi_cupy.jit import build_jit_specs, gen_batch_decode_module, gen_norm_module
>>> half = ("float16",) * 3
>>> build_jit_specs([gen_norm_module(), gen_batch_decode_module(*half, "int32", 128, 128, 0, False, False)])  \
# doctest: +SKIP

Source: flashinfer.jit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

from fi_cupy.device import DeviceInfo, device_info, num_devices
from fi_cupy.dtypes import DType
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.jit.core import JitSpec, jit_spec_registry
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.jit.uris import encoding_number
from fi_cupy.jit.uris import get_batch_attention_uri as get_batch_attention_uri
from fi_cupy.jit.uris import get_batch_decode_uri as get_batch_decode_uri
from fi_cupy.jit.uris import get_batch_mla_uri as get_batch_mla_uri
from fi_cupy.jit.uris import get_batch_prefill_uri as get_batch_prefill_uri
from fi_cupy.jit.uris import get_pod_uri as get_pod_uri
from fi_cupy.jit.uris import get_single_decode_uri as get_single_decode_uri
from fi_cupy.jit.uris import get_single_prefill_uri as get_single_prefill_uri
from fi_cupy.profiles import MODULES, TYPICAL, family_specs

__all__ = [
    "gen_act_and_mul_module",
    "gen_batch_attention_module",
    "gen_batch_decode_module",
    "gen_batch_mla_module",
    "gen_batch_prefill_module",
    "gen_cascade_module",
    "gen_gemm_module",
    "gen_norm_module",
    "gen_page_module",
    "gen_pod_module",
    "gen_quantization_module",
    "gen_rope_module",
    "gen_sampling_module",
    "gen_single_decode_module",
    "gen_single_prefill_module",
    "gen_topk_module",
    "get_batch_attention_uri",
    "get_batch_decode_uri",
    "get_batch_mla_uri",
    "get_batch_prefill_uri",
    "get_pod_uri",
    "get_single_decode_uri",
    "get_single_prefill_uri",
    "register_all",
]

#: Group sizes of usual models (multi-head attention, Llama, multi-query) and the kv heads they are asked for with.
GROUPS, KV_HEADS = (1, 4, 8), 8
_BATCHES = (1, 16, 64, 256)
_ROWS = (16, 64, 128, 1024)
_PAGE_SIZE = 16


def _device(arch: str) -> DeviceInfo:
    """The GPU here if it has this target, else a usual one of its architecture."""
    for index in range(num_devices()):
        if device_info(index).arch == arch:
            return device_info(index)
    if arch not in TYPICAL:
        raise ArgumentError(f"jit: target {arch!r} is none of {', '.join(TYPICAL)}")
    return TYPICAL[arch]


def _made(name: str, kernels: Callable[[DeviceInfo], Iterator[KernelSpec]], **functions: Callable[..., Any]) -> JitSpec:
    spec = JitSpec(
        name, lambda arch: list(dict.fromkeys(kernels(_device(arch)))), functions=tuple(functions.items())
    )  # fmt: skip
    jit_spec_registry.register(spec)
    return spec


# --- attention -------------------------------------------------------------------------------------------------------


def _decode_kernels(
    device: DeviceInfo, batches: Sequence[int], q: DType, kv: DType, o: DType, dim: int, mode: int, soft_cap: bool,
    tile_in_page: bool,
) -> Iterator[KernelSpec]:  # fmt: skip
    """Instances of the decode kernel; none for what the prefill kernel does."""
    from fi_cupy import decode_kernel

    for group, batch, adjacent in product(GROUPS, batches, (True, False)):  # NHD, HND
        problem = decode_kernel.Problem(
            batch, group * KV_HEADS, KV_HEADS, dim, q, kv, o, tile_in_page, soft_cap, mode == 2, mode == 1, False,
            adjacent,
        )  # fmt: skip
        if not decode_kernel.why_not(problem):
            decode_kernel.check_problem("gen_decode_module", problem)
            yield decode_kernel.geometry(problem, device).spec


def _prefill_kernels(
    device: DeviceInfo, q: DType, kv: DType, o: DType, dims: tuple[int, int], mode: int, soft_cap: bool,
    backend: str = "auto", paged: bool = False, masks: Sequence[bool] = (False, True), rows: Sequence[int] = _ROWS,
) -> Iterator[KernelSpec]:  # fmt: skip
    from fi_cupy import prefill_kernel
    from fi_cupy.prefill_hopper import Load, refusal

    for group in GROUPS:
        for mask in masks:
            problem = prefill_kernel.Problem(
                group * KV_HEADS, KV_HEADS, *dims, q, paged, mask, mode == 2, soft_cap, None, mode == 1, kv, o,
                _PAGE_SIZE if paged else 0, "auto",
            )  # fmt: skip
            prefill_kernel.check_problem("gen_prefill_module", problem)
            if backend != "fa3":
                portable = problem._replace(backend="fa2")
                yield from (prefill_kernel.geometry(portable, n, device).spec for n in rows)
            if backend != "fa2" and not refusal(problem, device):
                for load in (Load(1, 128 * group, 128, 128, True), Load(64, 4096 * group, 4096, 4096, True)):
                    yield prefill_kernel.geometry(problem, load.rows, device, load).spec


def gen_single_decode_module(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int, pos_encoding_mode: int = 0,
    use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
) -> JitSpec:  # fmt: skip
    """The kernels of `single_decode_with_kv_cache`. A window is an option of every call, not of the kernel.

    Parameters
    ----------
    dtype_q, dtype_kv, dtype_o : dtype
    head_dim_qk, head_dim_vo : int
        Where they differ, the prefill kernel decodes.
    pos_encoding_mode : fi_cupy.utils.PosEncodingMode or its number
    use_sliding_window, use_logits_soft_cap : bool

    Returns
    -------
    JitSpec

    Raises
    ------
    ArgumentError, DTypeError, ShapeError, UnsupportedError
        When it is built: no kernel takes these types or sizes.
    """
    uri = get_single_decode_uri(
        dtype_q, dtype_kv, dtype_o, head_dim_qk, head_dim_vo, pos_encoding_mode, use_sliding_window, use_logits_soft_cap
    )
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))
    mode, dims = encoding_number(pos_encoding_mode), (head_dim_qk, head_dim_vo)

    def kernels(device: DeviceInfo) -> Iterator[KernelSpec]:
        found = []
        if head_dim_qk == head_dim_vo:
            found = list(_decode_kernels(device, (1,), q, kv, o, head_dim_qk, mode, use_logits_soft_cap, True))
        yield from found or _prefill_kernels(
            device, q, kv, o, dims, mode, use_logits_soft_cap, masks=(False,), rows=(16,)
        )

    return _made(uri, kernels)


def gen_batch_decode_module(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
) -> JitSpec:  # fmt: skip
    """The kernels of `BatchDecodeWithPagedKVCacheWrapper`; indices are int32. The rest: `gen_single_decode_module`."""
    uri = get_batch_decode_uri(
        dtype_q, dtype_kv, dtype_o, dtype_idx, head_dim_qk, head_dim_vo, pos_encoding_mode, use_sliding_window,
        use_logits_soft_cap,
    )  # fmt: skip
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))
    mode, dims = encoding_number(pos_encoding_mode), (head_dim_qk, head_dim_vo)

    def kernels(device: DeviceInfo) -> Iterator[KernelSpec]:
        found: list[KernelSpec] = []
        if head_dim_qk == head_dim_vo:
            for in_page in (True, False):
                found += _decode_kernels(
                    device, _BATCHES, q, kv, o, head_dim_qk, mode, use_logits_soft_cap, in_page
                )  # fmt: skip
        yield from found or _prefill_kernels(
            device, q, kv, o, dims, mode, use_logits_soft_cap, paged=True, masks=(False,), rows=(16,)
        )

    return _made(uri, kernels)


def gen_single_prefill_module(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
    use_fp16_qk_reduction: bool = False,
) -> JitSpec:  # fmt: skip
    """The kernels of `single_prefill_with_kv_cache`, with and without a custom mask.

    Parameters
    ----------
    backend : "auto", "fa2" (the portable kernel) or "fa3" (the Hopper kernel)
    dtype_q, dtype_kv, dtype_o, head_dim_qk, head_dim_vo, pos_encoding_mode, use_sliding_window, use_logits_soft_cap
        As in `gen_single_decode_module`.
    use_fp16_qk_reduction : bool
        Products are summed in fp32 either way.
    """
    uri = get_single_prefill_uri(
        backend, dtype_q, dtype_kv, dtype_o, head_dim_qk, head_dim_vo, pos_encoding_mode, use_sliding_window,
        use_logits_soft_cap, use_fp16_qk_reduction,
    )  # fmt: skip
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))
    mode, dims = encoding_number(pos_encoding_mode), (head_dim_qk, head_dim_vo)
    return _made(
        uri, lambda device: _prefill_kernels(device, q, kv, o, dims, mode, use_logits_soft_cap, backend)
    )  # fmt: skip


def gen_batch_prefill_module(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
    use_fp16_qk_reduction: bool = False,
) -> JitSpec:  # fmt: skip
    """The kernels of both batch prefill wrappers, paged and ragged. Parameters: `gen_single_prefill_module`."""
    uri = get_batch_prefill_uri(
        backend, dtype_q, dtype_kv, dtype_o, dtype_idx, head_dim_qk, head_dim_vo, pos_encoding_mode, use_sliding_window,
        use_logits_soft_cap, use_fp16_qk_reduction,
    )  # fmt: skip
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))
    mode, dims = encoding_number(pos_encoding_mode), (head_dim_qk, head_dim_vo)

    def kernels(device: DeviceInfo) -> Iterator[KernelSpec]:
        for paged in (True, False):
            yield from _prefill_kernels(device, q, kv, o, dims, mode, use_logits_soft_cap, backend, paged)

    return _made(uri, kernels)


def gen_batch_mla_module(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_ckv: int, head_dim_kpe: int,
    use_profiler: bool = False,
) -> JitSpec:  # fmt: skip
    """The kernels of `BatchMLAPagedAttentionWrapper` for 16 and 128 heads; `use_profiler` is not supported."""
    from fi_cupy import mla_kernel

    if use_profiler:
        raise UnsupportedError("gen_batch_mla_module: use_profiler is True, expected False: the kernels have none")
    uri = get_batch_mla_uri(
        backend, dtype_q, dtype_kv, dtype_o, dtype_idx, head_dim_ckv, head_dim_kpe, use_profiler
    )  # fmt: skip
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))

    def kernels(device: DeviceInfo) -> Iterator[KernelSpec]:
        for heads in (16, 128):
            for page_size in (1, 64):
                problem = mla_kernel.Problem(heads, q, kv, page_size, backend=backend)
                mla_kernel.check_problem("gen_batch_mla_module", problem, head_dim_ckv, head_dim_kpe, False)
                if backend == "fa3" and mla_kernel.refusal(problem, device):
                    continue
                call = mla_kernel.Call(out=None if o is q else o)
                yield from (mla_kernel.geometry(problem, n * heads, device).spec(call) for n in (1, 8))

    return _made(uri, kernels)


def _mixed_kernels(
    device: DeviceInfo, q: DType, kv: DType, o: DType, dim: int, paged: bool, soft_cap: bool, decode_cap: bool,
    alibi: bool, decode_alibi: bool,
) -> Iterator[KernelSpec]:  # fmt: skip
    """Tiles and decode items in one launch, where there is such a kernel."""
    from fi_cupy import mixed, prefill_kernel

    for group in GROUPS:
        tiles = prefill_kernel.Problem(
            group * KV_HEADS, KV_HEADS, dim, dim, q, paged, False, alibi, soft_cap, None, False, kv, o,
            _PAGE_SIZE if paged else 0,
        )  # fmt: skip
        found = mixed.geometry(
            tiles, mixed.Decode(KV_HEADS, group, dim, q, kv, o, True, decode_cap, decode_alibi), device
        )
        if found is not None:
            yield found.spec


def gen_batch_attention_module(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_logits_soft_cap: bool = False, use_profiler: bool = False,
) -> JitSpec:  # fmt: skip
    """The kernels of `BatchAttention`: of mixed batches, and of batches of prompts alone."""
    if use_profiler:
        raise UnsupportedError("gen_batch_attention_module: use_profiler is True, expected False")
    uri = get_batch_attention_uri(
        dtype_q, dtype_kv, dtype_o, dtype_idx, head_dim_qk, head_dim_vo, pos_encoding_mode, use_logits_soft_cap,
        use_profiler,
    )  # fmt: skip
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))
    mode, cap, dims = encoding_number(pos_encoding_mode), use_logits_soft_cap, (head_dim_qk, head_dim_vo)

    def kernels(device: DeviceInfo) -> Iterator[KernelSpec]:
        if head_dim_qk == head_dim_vo and mode != 1:
            yield from _mixed_kernels(device, q, kv, o, head_dim_qk, True, cap, cap, mode == 2, mode == 2)
        yield from _prefill_kernels(device, q, kv, o, dims, mode, cap, paged=True, masks=(False,))

    return _made(uri, kernels)


def gen_pod_module(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim: int, pos_encoding_mode_p: int, use_sliding_window_p: bool,
    use_logits_soft_cap_p: bool, use_fp16_qk_reduction: bool, dtype_idx: Any, pos_encoding_mode_d: int,
    use_sliding_window_d: bool, use_logits_soft_cap_d: bool,
) -> JitSpec:  # fmt: skip
    """The kernels of `PODWithPagedKVCacheWrapper`: in one launch, or where there is no such kernel, its two parts."""
    uri = get_pod_uri(
        dtype_q, dtype_kv, dtype_o, head_dim, pos_encoding_mode_p, use_sliding_window_p, use_logits_soft_cap_p,
        use_fp16_qk_reduction, dtype_idx, pos_encoding_mode_d, use_sliding_window_d, use_logits_soft_cap_d,
    )  # fmt: skip
    q, kv, o = (to_dtype(t) for t in (dtype_q, dtype_kv, dtype_o))
    prompt, items = encoding_number(pos_encoding_mode_p), encoding_number(pos_encoding_mode_d)

    def kernels(device: DeviceInfo) -> Iterator[KernelSpec]:
        found = []
        if 1 not in (prompt, items):
            found = list(
                _mixed_kernels(
                    device, q, kv, o, head_dim, False, use_logits_soft_cap_p, use_logits_soft_cap_d, prompt == 2,
                    items == 2,
                )
            )  # fmt: skip
        if not found:
            dims = (head_dim, head_dim)
            found += _prefill_kernels(device, q, kv, o, dims, prompt, use_logits_soft_cap_p, masks=(False,))
            found += _decode_kernels(device, _BATCHES, q, kv, o, head_dim, items, use_logits_soft_cap_d, True)
        yield from found

    return _made(uri, kernels)


def variant_specs(variant: Any, arch: str, dtype: Any, dims: tuple[int, int], group: int) -> list[KernelSpec]:
    """The kernels that a variant's calls take on a target: paged and contiguous keys, tall and low tiles.

    Parameters
    ----------
    variant : AttentionVariant or FlashInferVariant
    arch : str
    dtype : dtype
        Of q, k and v.
    dims : (int, int)
        head_dim_qk, head_dim_vo.
    group : int
        Query heads a kv head.
    """
    from fi_cupy import prefill_kernel
    from fi_cupy.prefill_hopper import Load

    found: list[KernelSpec] = []
    device, mask = _device(arch), getattr(variant, "mask_mode", "full") == "custom"
    for paged in (True, False):
        problem = prefill_kernel.Problem(
            group * KV_HEADS, KV_HEADS, *dims, to_dtype(dtype), paged, mask, False, False, variant.lowered(),
            page_size=_PAGE_SIZE if paged else 0,
        )  # fmt: skip
        prefill_kernel.check_problem("compile-variant", problem)
        for rows, load in ((16, None), (4096 * group, Load(64, 4096 * group, 4096, 4096, True))):
            g = prefill_kernel.geometry(problem, rows, device, load)
            found += [g.spec] if g.narrow_spec is None else [g.spec, g.narrow_spec]
    return [spec for spec in dict.fromkeys(found) if spec.supports(arch)]


# --- operators -------------------------------------------------------------------------------------------------------


def _family(module: str) -> JitSpec:
    return _made(module, lambda device: iter(family_specs(module)))


def gen_page_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.page`."""
    return _family("page")


def gen_norm_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.norm`."""
    return _family("norm")


def gen_rope_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.rope`."""
    return _family("rope")


def gen_sampling_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.sampling`."""
    return _family("sampling")


def gen_quantization_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.quantization`."""
    return _family("quantization")


def gen_cascade_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.cascade`."""
    return _family("cascade")


def gen_topk_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.topk`."""
    return _family("topk")


def gen_gemm_module() -> JitSpec:
    """The canonical kernels of `fi_cupy.gemm`."""
    return _family("gemm")


def gen_act_and_mul_module(act_func_name: str, act_func_def: str | None = None) -> JitSpec:
    """The kernels of a gated activation: "silu", "gelu", "gelu_tanh", or one of the caller's own as CUDA text.

    The loaded module has the function ``<act_func_name>_and_mul(out, input, enable_pdl)``.

    Parameters
    ----------
    act_func_name : str
    act_func_def : str, optional
        ``__device__ float <act_func_name>(const float& x) {...}``, as in `fi_cupy.activation.define_activation`.
    """
    from fi_cupy import activation

    specs = activation.act_specs(act_func_name, act_func_def)
    name = f"{act_func_name}_and_mul"
    operator = (
        getattr(activation, name) if act_func_def is None
        else activation.define_activation(act_func_name, act_func_def)
    )  # fmt: skip

    def act_and_mul(out: Any, input: Any, enable_pdl: bool | None = None) -> None:
        operator(input, out=out, enable_pdl=enable_pdl)

    return _made(name, lambda device: iter(specs), **{name: act_and_mul})


def register_all() -> int:
    """Name a module for every family of operators in the registry; returns how many there are."""
    for module in MODULES:
        _family(module)
    return len(MODULES)
