"""Variants in FlashInfer's own form: ``gen_customize_*_module``, ``jit_args``, CUDA structs for its fa2 kernels.

The text of such a variant compiles as it is: kernels/attention/prefill_flashinfer.cuh has its macros and base struct.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device
from fi_cupy.dtypes import DType, bfloat16, bool_, float16, float32, int32, int64, uint8, uint16, uint32
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DTypeError, LayoutError, UnsupportedError
from fi_cupy.jit.attention.variants import attention_sink_decl
from fi_cupy.jit.lower import Lowered, is_name
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, KernelSpec, UserSource
from fi_cupy.utils import MaskMode, PosEncodingMode

#: C element type -> the dtypes that an array of it may have.
_ELEMENTS: dict[str, tuple[DType, ...]] = {
    "float": (float32,), "half": (float16,), "nv_half": (float16,), "__half": (float16,), "nv_bfloat16": (bfloat16,),
    "__nv_bfloat16": (bfloat16,), "int": (int32,), "int32_t": (int32,), "int64_t": (int64,), "uint8_t": (uint8, bool_),
    "uint16_t": (uint16,), "uint32_t": (uint32,), "bool": (bool_,),
}  # fmt: skip
#: C scalar type -> (the type it has in the kernel, its kind in a ParamsStruct). Doubles are passed as floats: their
#: arithmetic is up to 64 times slower.
_SCALARS = {
    "double": ("float", "f32"), "float": ("float", "f32"), "int64_t": ("int64_t", "i64"), "int": ("int32_t", "i32"),
    "int32_t": ("int32_t", "i32"), "uint32_t": ("uint32_t", "u32"), "bool": ("int32_t", "i32"),
}  # fmt: skip
#: Scalars that the call's own options stand for when they are left out.
_DERIVED = ("sm_scale", "logits_soft_cap")
_FA3 = re.compile(r"\bGetAttentionUpdater\b|\bAttentionUpdater\b|\badditional_params\b|\bMainloopParams\b")


@dataclass(frozen=True)
class FlashInferLowered(Lowered):
    """`Lowered` for a struct in FlashInfer's form."""

    struct: str = ""
    members: tuple[tuple[str, str, str], ...] = ()  # (name, C type, kind), pointers first, then by size

    @property
    def portable_only(self) -> str:
        return "it is written for FlashInfer's fa2 kernels"

    @property
    def splittable(self) -> bool:
        return self.use_softmax and "output" not in self.stages

    def fields(self) -> list[tuple[str, str]]:
        return [(f"user.{name}", kind) for name, _, kind in self.members]

    def specialise(
        self, spec: KernelSpec, alibi: bool, soft_cap: bool, head_scales: bool = False, positive_scale: bool = False
    ) -> KernelSpec:
        """As `Lowered.specialise`; a soft cap is the text's own affair."""
        if alibi:
            raise UnsupportedError(f"variant {self.name}: pos_encoding_mode 'ALIBI' belongs into the variant's text")
        flags = ", ".join(
            "true" if on else "false" for on in (*(x in self.stages for x in ("mask", "output")), head_scales)
        )
        members = "".join(f"  {ctype} {name};\n" for name, ctype, _ in self.members)
        values = "".join(f", params.user.{name}" for name, _, _ in self.members)
        user = "  VariantUser user;\n" if self.members else ""
        params = f"{spec.params.name.removesuffix('Params')}VariantParams"
        text = (
            f'#line 1 "fi_cupy, for variant {self.name}"\nstruct VariantUser {{\n{members}}};\n'
            f"struct {params} : {spec.params.name} {{\n{user}}};\n"
            f"struct FlashInferParams : FlashInferBase {{\n{members}}};\n"
            f"FI_DEVICE FlashInferParams flashinfer_params(const {params}& params, "
            "const FlashInferBase& base) {\n"
            f"  return FlashInferParams{{base{values}}};\n}}\n"
            f'#line 1 "variant:{self.name}"\n{self.text}'
        )
        logits = CppType(f"fi::FlashInferLogits<fi::{self.struct}, {flags}>")
        return replace(
            spec,
            header="attention/prefill_flashinfer.cuh",
            symbol=f"{spec.symbol}_v_{self.name}",
            params=ParamsStruct(params, [*spec.params.fields, *self.fields()]),
            config=tuple((n, logits if n == "Logits" else value) for n, value in spec.config),
            user=UserSource("variant", self.name, text),
            spills="a variant's values come on top of a full register file",
        )


@dataclass(frozen=True)
class FlashInferVariant:
    """A variant from ``gen_customize_*_module``: also the module that those return, already "built".

    Attributes
    ----------
    name : str
        From FlashInfer's uri.
    struct, text : str
        Name and declaration of the variant struct.
    tensors, scalars : tuple of (name, C type)
        The additional arguments, in the order `run` takes them.
    """

    name: str
    struct: str
    text: str
    tensors: tuple[tuple[str, str], ...]
    scalars: tuple[tuple[str, str], ...]
    mask_mode: str = "full"

    @property
    def use_softmax(self) -> bool:
        """What the text sets; true where it says nothing."""
        found = re.search(r"\buse_softmax\s*=\s*(true|false)", self.text)
        return found is None or found[1] == "true"

    def lowered(self) -> FlashInferLowered:
        """The variant as CUDA."""
        return _lower(self)

    def build_and_load(self) -> FlashInferVariant:
        """FlashInfer's way to the module: here it is compiled when first run."""
        return self

    def bind(
        self, op: str, args: tuple[Any, ...], named: Mapping[str, Any], like: View, logit_scale: float = 1.0,
        **derived: float,
    ) -> BoundFlashInferVariant:  # fmt: skip
        """The variant with the arguments of one call.

        `logit_scale` is the product of the numbers q_scale and k_scale, which multiplies the text's sm_scale; `derived`
        are options that may stand for scalars left out.
        """
        label = f"{op}: variant {self.name}"
        if like.is_cpu:
            raise UnsupportedError(
                f"{label}: it is CUDA text, which the NumPy reference cannot run; use define_variant"
            )
        order = [name for name, _ in (*self.tensors, *self.scalars)]
        if len(args) < len(order):  # FlashInfer's wrappers fill these in
            order = [n for n in order if n not in derived and not n.startswith("maybe_")]
        if len(args) > len(order):
            raise ArgumentError(f"{label}: got {len(args)} extra arguments, expected {len(order)}: {', '.join(order)}")
        given = dict(zip(order, args, strict=False))
        for name in named:
            if name not in {n for n, _ in (*self.tensors, *self.scalars)}:
                raise ArgumentError(f"{label}: {name} is unknown; it takes {', '.join(order) or 'no extra arguments'}")
            if name in given:
                raise ArgumentError(f"{label}: {name} is given twice")
        values = {**derived, **given, **named}
        pointers: list[View] = []
        packed: dict[str, Any] = {}
        for name, ctype in self.tensors:
            packed[name] = _pointer(label, name, ctype, values.get(name), like, pointers)
        for name, ctype in self.scalars:
            if values.get(name) is None:
                raise ArgumentError(f"{label}: {name} ({ctype}) is missing")
            packed[name] = float(values[name]) if _SCALARS[ctype][1] == "f32" else int(values[name])
        if logit_scale != 1.0:
            if re.search(r"\bparams\.sm_scale\b", self.text) is None:
                raise UnsupportedError(
                    f"{label}: its text does not read params.sm_scale, which q_scale and k_scale multiply as numbers; "
                    "pass them as arrays, one factor a head"
                )
            if "sm_scale" in packed:  # else it is the plan's, which has them already
                packed["sm_scale"] *= logit_scale
        return BoundFlashInferVariant(self, tuple(packed[n] for n, _, _ in self.lowered().members), pointers)


class BoundFlashInferVariant:
    """A `FlashInferVariant` with the arguments of one call."""

    def __init__(self, variant: FlashInferVariant, values: tuple[Any, ...], arrays: list[View]) -> None:
        self.variant, self.lowered, self.use_softmax = variant, variant.lowered(), variant.use_softmax
        self._values, self._arrays = values, arrays  # the arrays stay alive until the launch

    def kernel_values(self) -> tuple[Any, ...]:
        """The fields of ``struct VariantUser`` in order."""
        return self._values

    def narrow(self) -> tuple[None, None]:
        """Nothing is known of the text's mask."""
        return None, None

    def params(self) -> dict[str, Any]:
        """Nothing: the reference does not run such variants."""
        return {}


def _pointer(label: str, name: str, ctype: str, value: Any, like: View, kept: list[View]) -> int:
    if value is None:
        if not name.startswith("maybe_"):
            raise ArgumentError(f"{label}: {name} ({ctype}*) is missing")
        return 0
    x = view(value, label, name)
    if x.dtype not in _ELEMENTS[ctype]:
        wanted = " or ".join(d.name for d in _ELEMENTS[ctype])
        raise DTypeError(f"{label}: {name} has dtype {x.dtype.name}, expected {wanted} ({ctype}*)")
    if not x.contiguous:
        raise LayoutError(f"{label}: {name} has strides {x.strides}, expected a contiguous array")
    check_device(label, like, **{name: x})
    kept.append(x)
    return x.ptr


@lru_cache(maxsize=256)
def _lower(variant: FlashInferVariant) -> FlashInferLowered:
    members = [(name, f"{ctype}*", "ptr") for name, ctype in variant.tensors]
    scalars = [(name, *_SCALARS[ctype]) for name, ctype in variant.scalars]
    members += sorted(scalars, key=lambda m: m[2] != "i64")  # 8-byte fields first: no padding
    stages = set()
    if re.search(r"\bREGISTER_LOGITS_MASK\b|\bLogitsMask\b", variant.text):
        stages.add("mask")
    if re.search(r"\b(REGISTER_OUTPUT_TRANSFORM|OutputTransform|REGISTER_M_D_UPDATE|update_m_d)\b", variant.text):
        stages.add("output")
    return FlashInferLowered(
        variant.name, (), (), frozenset(), variant.text, frozenset(stages), variant.use_softmax, None, variant.struct,
        tuple(members),
    )  # fmt: skip


def _customize(
    uri: str, dtypes: Sequence[Any], tensor_names: Sequence[str], tensor_dtypes: Sequence[str],
    scalar_names: Sequence[str], scalar_dtypes: Sequence[str], variant_name: str, variant_decl: str,
    backend: str = "fa2", pos_encoding_mode: int = 0, use_sliding_window: bool = False,
    use_logits_soft_cap: bool = False, use_fp16_qk_reduction: bool = False, fp8_enabled: bool = False,
) -> FlashInferVariant:  # fmt: skip
    """Check the arguments that FlashInfer's generators share.

    The window is a run-time option and the soft cap the text's own affair, so their switches change nothing here;
    products are summed in fp32.
    """
    op = f"gen_customize: variant {variant_name}"
    fa3 = _FA3.search(variant_decl)
    if backend == "fa3" or fa3 is not None:
        what = f"{fa3[0]} in its text" if fa3 else "backend='fa3'"
        raise UnsupportedError(
            f"{op}: {what} is the form of FlashInfer's fa3 kernels; pass the fa2 form, backend='fa2' (a constructor "
            "(params, batch_idx, smem_ptr), REGISTER_LOGITS_TRANSFORM, params.<name>): it runs on every architecture"
        )
    if backend not in ("auto", "fa2"):
        raise UnsupportedError(f"{op}: backend is {backend!r}, expected 'fa2'")
    if re.search(r"\b(REGISTER_)?(QUERY_TRANSFORM|KEY_TRANSFORM)\b|\bQueryTransform\b|\bKeyTransform\b", variant_decl):
        raise UnsupportedError(f"{op}: query and key transforms are not supported; scale in the logits transform")
    if getattr(pos_encoding_mode, "value", pos_encoding_mode) != PosEncodingMode.NONE or fp8_enabled:
        raise UnsupportedError(f"{op}: pos_encoding_mode and fp8_enabled are not supported with a variant")
    if len({to_dtype(d) for d in dtypes}) != 1:
        raise UnsupportedError(f"{op}: dtype_q, dtype_kv and dtype_o differ, expected one type")
    if not is_name(variant_name):
        raise ArgumentError(f"{op}: variant_name is not an identifier")
    for names, types, known in ((tensor_names, tensor_dtypes, _ELEMENTS), (scalar_names, scalar_dtypes, _SCALARS)):
        if len(names) != len(types):
            raise ArgumentError(f"{op}: {len(names)} names and {len(types)} types of additional arguments")
        for name, ctype in zip(names, types, strict=True):
            if not is_name(name) or ctype not in known:
                raise ArgumentError(f"{op}: {ctype} {name} is no argument; types are {', '.join(known)}")
    return FlashInferVariant(
        re.sub(r"\W", "_", uri), variant_name, variant_decl,
        tuple(zip(tensor_names, tensor_dtypes, strict=True)), tuple(zip(scalar_names, scalar_dtypes, strict=True)),
    )  # fmt: skip


def gen_customize_single_prefill_module(
    backend: str, uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int,
    additional_tensor_names: Sequence[str], additional_tensor_dtypes: Sequence[str],
    additional_scalar_names: Sequence[str], additional_scalar_dtypes: Sequence[str], variant_name: str,
    variant_decl: str, **options: Any,
) -> FlashInferVariant:  # fmt: skip
    """A variant for `single_prefill_with_kv_cache_with_jit_module`.

    Parameters
    ----------
    backend : "fa2" or "auto"
    uri : str
        Its name.
    dtype_q, dtype_kv, dtype_o : dtype
        One type. Types and head dims are those of the arrays given later; one module serves any.
    additional_tensor_names, additional_tensor_dtypes : names and C types
        Contiguous arrays that the text reads as ``params.<name>``; names that start with ``maybe_`` may be None.
    additional_scalar_names, additional_scalar_dtypes : names and C types
    variant_name, variant_decl : str
        The struct's name and declaration, FlashInfer's fa2 form.
    **options
        FlashInfer's remaining switches.

    Raises
    ------
    UnsupportedError
        The fa3 form, or a switch that no kernel honours.

    Source: flashinfer.jit.gen_customize_single_prefill_module.
    """
    return _customize(
        uri, (dtype_q, dtype_kv, dtype_o), additional_tensor_names, additional_tensor_dtypes, additional_scalar_names,
        additional_scalar_dtypes, variant_name, variant_decl, backend, **options,
    )  # fmt: skip


def gen_customize_batch_prefill_module(
    backend: str, uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, idtype: Any, head_dim_qk: int,
    head_dim_vo: int, *rest: Any, **options: Any,
) -> FlashInferVariant:  # fmt: skip
    """As `gen_customize_single_prefill_module`, with `idtype` (int32) behind `dtype_o`."""
    return gen_customize_single_prefill_module(
        backend, uri, dtype_q, dtype_kv, dtype_o, head_dim_qk, head_dim_vo, *rest, **options
    )


def gen_customize_single_decode_module(
    uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int, *rest: Any, **options: Any
) -> FlashInferVariant:
    """As `gen_customize_single_prefill_module`, without `backend`."""
    return gen_customize_single_prefill_module(
        "fa2", uri, dtype_q, dtype_kv, dtype_o, head_dim_qk, head_dim_vo, *rest, **options
    )


def gen_customize_batch_decode_module(
    uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, idtype: Any, head_dim_qk: int, head_dim_vo: int, *rest: Any,
    **options: Any,
) -> FlashInferVariant:  # fmt: skip
    """As `gen_customize_batch_prefill_module`, without `backend`."""
    return gen_customize_single_prefill_module(
        "fa2", uri, dtype_q, dtype_kv, dtype_o, head_dim_qk, head_dim_vo, *rest, **options
    )


def gen_batch_prefill_attention_sink_module(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int = 0, use_sliding_window: bool = False,
) -> FlashInferVariant:  # fmt: skip
    """The variant with attention sinks: one tensor ``sink``, float32 [num_qo_heads], and the scalar ``sm_scale``.

    The window is the plan's; `use_sliding_window` changes nothing here.

    Source: flashinfer.jit.attention.gen_batch_prefill_attention_sink_module.
    """
    text = attention_sink_decl["fa2" if backend == "auto" else backend]
    return gen_customize_batch_prefill_module(
        backend, "batch_prefill_attention_sink", dtype_q, dtype_kv, dtype_o, dtype_idx, head_dim_qk, head_dim_vo,
        ["sink"], ["float"], ["sm_scale"], ["double"], "AttentionSink", text, pos_encoding_mode=pos_encoding_mode,
        use_sliding_window=use_sliding_window,
    )  # fmt: skip


def single_prefill_with_kv_cache_with_jit_module(
    jit_module: Any, q: Any, k: Any, v: Any, *args: Any, kv_layout: str = "NHD", mask_mode: int = 0,
    window_left: int = -1, return_lse: bool = False,
) -> Any:  # fmt: skip
    """`single_prefill_with_kv_cache` with a variant from `gen_customize_single_prefill_module`.

    Parameters
    ----------
    jit_module : FlashInferVariant or AttentionVariant
    q, k, v : arrays
        See `fi_cupy.prefill.single_prefill_with_kv_cache`.
    *args
        The additional tensors, then the scalars.
    mask_mode : fi_cupy.utils.MaskMode or its number
        CAUSAL, or NON_CAUSAL and CUSTOM: the mask is the variant's own.

    Returns
    -------
    out, or (out, lse)

    Raises
    ------
    ArgumentError
        Another `mask_mode`.

    Source: flashinfer.prefill.single_prefill_with_kv_cache_with_jit_module.
    """
    from fi_cupy.prefill_single import single_prefill_with_kv_cache

    mode = getattr(mask_mode, "value", mask_mode)
    if mode not in (MaskMode.NON_CAUSAL, MaskMode.CAUSAL, MaskMode.CUSTOM):
        raise ArgumentError(
            f"single_prefill_with_kv_cache_with_jit_module: mask_mode is {mask_mode!r}, expected 0 (NON_CAUSAL), 1 "
            "(CAUSAL) or 2 (CUSTOM, the variant's own mask); BatchPrefillWithPagedKVCacheWrapper scores many items"
        )
    return single_prefill_with_kv_cache(
        q, k, v, causal=mode == MaskMode.CAUSAL, kv_layout=kv_layout, window_left=window_left,
        return_lse=return_lse, variant=jit_module, variant_args=(args, {}),
    )  # fmt: skip


def single_decode_with_kv_cache_with_jit_module(
    jit_module: Any, q: Any, k: Any, v: Any, *args: Any, kv_layout: str = "NHD", window_left: int = -1,
    return_lse: bool = False,
) -> Any:  # fmt: skip
    """`single_decode_with_kv_cache` with a variant; ``q [num_qo_heads, head_dim]``.

    `return_lse` is taken as FlashInfer takes it: the log-sum-exp is not returned.

    Source: flashinfer.decode.single_decode_with_kv_cache_with_jit_module.
    """
    del return_lse
    return single_prefill_with_kv_cache_with_jit_module(
        jit_module, q[None], k, v, *args, kv_layout=kv_layout, window_left=window_left
    )[0]


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances of variant kernels: traced score functions of two shapes, and FlashInfer's form."""
    from fi_cupy.device import DeviceInfo
    from fi_cupy.jit import ops
    from fi_cupy.prefill_kernel import Problem, geometry
    from fi_cupy.variants import define_variant

    h100 = DeviceInfo(90, "90a", 132, 227 << 10, 228 << 10, 50 << 20)
    bias = define_variant(
        name="canonical_bias",
        mask_mode="causal",
        score_fn=lambda score, ctx: score + ctx.bias[ctx.qo_head] * (ctx.kv_idx - ctx.qo_idx),
        tensors={"bias": "float32"},
    )
    cap = define_variant(
        name="canonical_cap",
        mask_mode="causal",
        score_fn=lambda score, ctx: ctx.cap * ops.tanh(score / ctx.cap),
        scalars=["cap"],
    )
    body = (
        "struct CanonicalScale : AttentionVariantBase {\n"
        "  static constexpr bool use_softmax = true;\n"
        "  uint32_t window_left, qo_len, kv_len;\n"
        "  float sm_scale_log2;\n"
        "  template <typename Params>\n"
        "  __device__ __host__ CanonicalScale(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {\n"
        "    qo_len = params.get_qo_len(batch_idx);\n"
        "    kv_len = params.get_kv_len(batch_idx);\n"
        "    window_left = kv_len;\n"
        "    sm_scale_log2 = params.sm_scale * math::log2e;\n"
        "  }\n"
        "  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {\n"
        "    return logits * 0.5f;\n"
        "  })\n"
        "};\n"
    )
    flashinfer = gen_customize_single_prefill_module(
        "fa2", "canonical_scale", bfloat16, bfloat16, bfloat16, 128, 128, [], [], ["sm_scale"], ["double"],
        "CanonicalScale", body,
    )  # fmt: skip
    problem = Problem(32, 8, 128, 128, bfloat16, False, False, False, False)
    return [geometry(problem._replace(variant=v.lowered()), 1024, h100).spec for v in (bias, cap, flashinfer)]
