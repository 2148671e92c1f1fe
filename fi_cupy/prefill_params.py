"""The mirror of struct PrefillParams (kernels/attention/prefill.cuh), with which every prefill kernel's begin."""

from __future__ import annotations

from fi_cupy.jit.params import ParamsStruct

_DIVISOR = ("divisor", "magic", "shift")
#: struct HeadScales of kernels/attention/head_scales.cuh.
SCALES = [
    *((f"scales.{name}", "ptr") for name in "qkv"),
    *((f"scales.{name}", "u32") for name in ("q_step", "k_step", "v_step", "unused")),
]
PARAMS = ParamsStruct(
    "PrefillParams",
    [
        *((name, "ptr") for name in ("q", "k", "v", "o", "lse", "items", "kv_indices", "mask", "sinks")),
        ("partial_o", "ptr"),
        ("partial_md", "ptr"),
        ("counters", "ptr"),
        *((f"{x}_stride_{d}", "i64") for x, ds in (("q", "nh"), ("k", ("page", "n", "h"))) for d in ds),
        *((f"{x}_stride_{d}", "i64") for x, ds in (("v", ("page", "n", "h")), ("o", "nh")) for d in ds),
        *((f"group.{field}", "u32") for field in _DIVISOR),
        *((f"page_size.{field}", "u32") for field in _DIVISOR),
        ("num_qo_heads", "u32"),
        ("causal", "i32"),
        ("window_left", "i32"),
        *((name, "f32") for name in ("sm_scale", "sm_scale_log2", "out_scale", "soft_cap", "soft_cap_rcp")),
        *SCALES,
    ],
)
#: The same, then 128 frequencies as opaque blocks of 16 (`decode_kernel.rope_turns`).
ROPE_PARAMS = ParamsStruct(
    "PrefillRopeParams", [*PARAMS.fields, *((f"turns[{i}]", "tensormap") for i in range(0, 128, 16))]
)
