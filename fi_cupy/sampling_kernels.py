"""Kernel instances of the sampling family, and how a launch shares out its rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import DType, bfloat16, float16, float32
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, KernelSpec

#: The largest vocabulary of the GPU kernels: 512 segments of 1024 tokens (their sums lie in shared memory).
MAX_VOCAB = 1 << 19

_PARAMS = ParamsStruct(
    "SamplingParams",
    [
        ("input", "ptr"),
        ("output", "ptr"),
        ("valid", "ptr"),
        ("nan", "ptr"),
        ("indices", "ptr"),
        ("top_k", "ptr"),
        ("p", "ptr"),
        ("seed", "ptr"),
        ("offset", "ptr"),
        ("seed_value", "u64"),
        ("offset_value", "u64"),
        ("stride", "i64"),
        ("rows", "u32"),
        ("vocab", "u32"),
        ("top_k_value", "i32"),
        ("p_value", "f32"),
        ("flags", "u32"),
        ("min_p_value", "f32"),
        ("min_p", "ptr"),
        ("temperature", "ptr"),
        ("inverse_value", "f32"),
    ],
)
_SOFTMAX_PARAMS = ParamsStruct(
    "SoftmaxParams",
    [
        ("input", "ptr"),
        ("output", "ptr"),
        ("temperature", "ptr"),
        ("stride", "i64"),
        ("vocab", "u32"),
        ("inverse_value", "f32"),
        ("temperature64", "u32"),
        ("aligned", "u32"),
    ],
)
_SPECULATIVE_PARAMS = ParamsStruct(
    "SpeculativeParams",
    [
        ("draft_probs", "ptr"),
        ("draft_token_ids", "ptr"),
        ("target_probs", "ptr"),
        ("output", "ptr"),
        ("accepted", "ptr"),
        ("emitted", "ptr"),
        ("seed", "ptr"),
        ("offset", "ptr"),
        ("seed_value", "u64"),
        ("offset_value", "u64"),
        ("num_draft", "u32"),
        ("vocab", "u32"),
        ("flags", "u32"),
    ],
)


#: Shared memory for the segments that a CTA holds, bytes at most.
MOST_HELD = 192 * 1024


class LaunchShape(NamedTuple):
    """How the CTAs of a launch share out the rows.

    Attributes
    ----------
    threads : int
        A CTA.
    cluster : int
        CTAs a row.
    min_blocks : int
        CTAs that one multiprocessor should hold; 0 leaves the registers to the compiler.
    hold : bool
        Softmax: rows stay on chip between reading and writing.
    """

    threads: int = 512
    cluster: int = 1
    min_blocks: int = 2
    hold: bool = False

    @property
    def tag(self) -> str:
        return f"t{self.threads}c{self.cluster}" + ("h" if self.hold else "") + f"m{self.min_blocks}"

    @property
    def min_arch(self) -> int:
        return 75 if self.cluster == 1 and not self.hold and self.threads < 1024 else 90

    @property
    def max_arch(self) -> int:
        """Rows are held where a CTA may have 227 KB of shared memory; for sm_120 code takes more registers."""
        return 110 if self.hold or self.min_blocks > 1 or (self.threads > 256 and self.cluster > 1) else 0


PORTABLE = LaunchShape(min_blocks=1)
#: Where 512 threads would have too few registers.
NARROW = LaunchShape(256, 1, 1)
_WIDE_PAIR = LaunchShape(512, 2, 1)


def _shared_bytes(segments: int, tops: bool, listed: int) -> int:
    """sizeof(fi::sampling::RowShared<segments, tops, listed>)."""
    size = 8 * segments + 8 * 32 + (8 * 16 if listed else 8) + 48
    size = -(-size // 16) * 16 + 4 * (4096 if listed else 4)
    size += 4 * segments + 4 * (8 * segments if tops else 4) + 8 * max(listed, 4) + 24
    return -(-size // 16) * 16


def _segments(vocab: int) -> int:
    return -(-vocab // 1024)


def room(vocab: int) -> int:
    """Segments that the kernel for this vocabulary has room for."""
    return 256 if vocab <= 1 << 18 else 512


def row_shared(room: int, kind: str, shape: LaunchShape) -> tuple[int, int]:
    """(kList, bytes) by filter: four CTAs of 256 threads share a multiprocessor of sm_90, and the portable kernels have
    the 64 KB of sm_75. "sorted", of top-k, lists more, since what it returns is sorted there.
    """
    listed = 0 if kind in ("none", "top_p", "min_p") else 2816 if room == 256 else 2048
    if kind == "sorted" and (room == 256 or shape.cluster > 1):
        listed = 4096 if shape.cluster > 1 else 3072
    return listed, _shared_bytes(room, kind != "none", listed)


@lru_cache(maxsize=256)
def launch_shape(kind: str, rows: int, vocab: int, device: DeviceInfo) -> LaunchShape:
    """The shape of a launch, by its kind: "draw" (nothing is filtered), "reject" (top-p alone), "min_p" (alone),
    "select" (a token of what other filters keep), "top_k", "fill" (rows of which few
    elements are kept), "keep" (rows of which many are), "renorm" (after top-p alone), "softmax" or "speculative".
    bench/tune_sampling.py times them all.
    """
    segments, arch = _segments(vocab), device.code_number
    if arch < 90:
        if kind in ("draw", "reject", "min_p"):
            return LaunchShape(min_blocks=2)
        return NARROW if kind in ("fill", "keep", "renorm", "top_k", "speculative") and segments <= 256 else PORTABLE
    largest = 16 if arch < 110 else 8

    def clusters(limit: int, own: int) -> int:
        """CTAs a row: as long as all fit on the GPU at once, and each has `own` segments at least."""
        cluster = 1
        while cluster < min(limit, largest) and rows * cluster * 2 <= device.num_sms and cluster * own < segments:
            cluster *= 2
        return cluster

    def shared(own: int) -> int:
        """CTAs a row that is read twice, four of them on a multiprocessor: the rows in flight fit the L2."""
        cluster = 1
        while cluster < 8 and cluster * own < segments:
            cluster *= 2
        return max(cluster, clusters(16, own))

    if arch > 110:  # more registers for the same code
        return LaunchShape(256, clusters(8, 8), 1) if room(vocab) == 256 else PORTABLE
    few = rows * 2 <= device.num_sms
    if kind == "renorm" and room(vocab) > 256:  # 24 segments of a CTA in shared memory
        return LaunchShape(256, largest, 1, True) if largest == 16 else LaunchShape(512, largest, 1)
    if room(vocab) > 256:
        return LaunchShape(512, shared(16) if kind in ("reject", "keep", "softmax") else clusters(8, 16), 1)
    if kind == "softmax":
        return LaunchShape(256, max(shared(16), clusters(16, 8)), 4, True)
    if kind == "renorm" and few and clusters(16, 8) == 2 and 64 < segments <= 160:  # all rows at once
        return LaunchShape(1024, 2, 1, True)
    if kind == "renorm":  # 80 registers a thread: the search between reading and writing takes them
        cluster = max(shared(16), clusters(16, 8))
        return LaunchShape(256, cluster, 2 if cluster == 16 else 3, True)
    if kind == "keep":  # clusters of 8 would leave some of few rows to a second wave
        return LaunchShape(512, clusters(8, 16), 2) if few else LaunchShape(256, shared(16), 4)
    if kind == "reject" and not few:
        return LaunchShape(256, shared(16), 4)
    if kind == "speculative":  # two rows are read at once: 128 registers a thread
        cluster = clusters(8, 8)
        return _WIDE_PAIR if cluster == 2 and segments > 16 else LaunchShape(256, cluster, 2)
    if kind == "min_p" and not few:
        return LaunchShape(512, 2 if segments > 64 else 1, 2)
    if kind == "reject" and clusters(16, 8) == 2 and segments > 64:  # a round's pass over the row, by twice the warps
        return LaunchShape(512, 4, 2)
    if kind in ("draw", "reject", "min_p"):  # little to do behind the pass over the row
        cluster = clusters(16, 8)
        return LaunchShape(512, 2, 2) if cluster == 2 and segments > 16 else LaunchShape(256, cluster, 4)
    # One CTA decides; with many rows, others read meanwhile.
    if rows * 16 * 2 <= device.num_sms and segments > 64:
        return LaunchShape(256, 16, 2)
    if few:  # of an H100's multiprocessors, clusters of eight reach 120, and those of four 124
        cluster = clusters(8 if rows * 8 * 11 <= device.num_sms * 10 else 4, 8)
        narrow = cluster == 4 and rows * 4 * 11 > device.num_sms * 10
        return LaunchShape(256, 4, 2) if narrow else LaunchShape(512, cluster, 1)
    if rows <= device.num_sms:
        return LaunchShape(512, 1, 1)
    return LaunchShape(512, 1, 2) if kind == "top_k" else LaunchShape(256, 1, 2)


def launched_bytes(spec: KernelSpec, vocab: int, dtype: DType, shape: LaunchShape) -> int:
    """Dynamic shared memory of a launch of softmax; one held segment of each warp is in its registers."""
    if not shape.hold:
        return spec.smem_bytes
    own = max(-(-_segments(vocab) // shape.cluster) - shape.threads // 32, 0)
    return spec.smem_bytes - MOST_HELD + own * 1024 * dtype.itemsize


def spills(kind: str, shape: LaunchShape) -> str:
    """Why an instance may spill: what does, does so outside the loop over the row."""
    if kind == "all":
        return "all filters' parameters live across the loop over the row: some wait in local memory"
    if kind == "renorm" and shape.min_blocks > 2:
        return "the segment in registers leaves little room: what the next round needs waits in memory"
    if kind != "none" and shape.threads * shape.min_blocks >= 1024:
        return (
            "64 registers a thread, for full multiprocessors: what the decision and the last pass need waits in memory"
        )
    if kind == "top_k_top_p":
        return "on sm_120 two values wait in memory from before the loop over the row until after it"
    return ""


#: Filters of the kernels, by name.
_FILTERS = {
    "none": "NoFilter",
    "top_p": "TopP",
    "min_p": "MinP",
    "top_k": "TopK",
    "top_k_top_p": "TopKTopP",
    "all": "AllFilters",
}


def row_spec(
    symbol: str,
    header: str,
    function: str,
    params: ParamsStruct,
    *leading: tuple[str, DType | CppType | bool],
    shape: LaunchShape,
    room: int,
    listed: int | None,
    shared: int,
    spills: str = "",
) -> KernelSpec:
    """The instance of a kernel over rows of `room` segments: its configuration is `leading`, then the shape's."""
    return KernelSpec(
        symbol=symbol,
        header=header,
        function=function,
        params=params,
        config=(
            *leading,
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            *(() if listed is None else (("kList", listed),)),
            ("kSharedBytes", shared),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=shared,
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
        spills=spills,
    )


@lru_cache(maxsize=256)
def sample_spec(
    dtype: DType, logits: bool, kind: str, room: int = 256, shape: LaunchShape = PORTABLE, scaled: bool = False
) -> KernelSpec:
    """One token a row; `kind` is the filter: "none", "top_p" (alone), "min_p", "top_k", "top_k_top_p" or "all";
    `scaled`: by a temperature.
    """
    domain = "Logits" if logits else "Probs"
    listed, size = row_shared(room, kind, shape)
    return row_spec(
        f"sample_{'scaled_' if scaled else ''}{domain.lower()}_{kind}_{dtype.tag}_s{room}_{shape.tag}",
        "sampling.cuh",
        "sample",
        _PARAMS,
        ("T", dtype),
        ("Domain", CppType(f"fi::sampling::{domain}")),
        ("Filter", CppType(f"fi::sampling::{_FILTERS[kind]}")),
        ("kScaled", scaled),
        shape=shape,
        room=room,
        listed=listed,
        shared=size,
        spills=spills(kind, shape),
    )


@lru_cache(maxsize=256)
def filter_spec(
    dtype: DType, logits: bool, room: int = 256, shape: LaunchShape = PORTABLE, kind: str = "top_k_top_p"
) -> KernelSpec:
    """Rows after the filter `kind`: probabilities renormalised, or logits masked."""
    listed, size = row_shared(room, kind, shape)
    return row_spec(
        f"{'mask_logits' if logits else 'renorm_probs'}_{kind}_{dtype.tag}_s{room}_{shape.tag}",
        "sampling.cuh",
        "filter_rows",
        _PARAMS,
        ("T", dtype),
        ("Domain", CppType(f"fi::sampling::{'Logits' if logits else 'Probs'}")),
        ("Filter", CppType(f"fi::sampling::{_FILTERS[kind]}")),
        shape=shape,
        room=room,
        listed=listed,
        shared=size,
        spills=spills(kind, shape),
    )


@lru_cache(maxsize=64)
def renorm_spec(dtype: DType, room: int = 256, shape: LaunchShape = NARROW) -> KernelSpec:
    """Probabilities after top-p alone, renormalised."""
    steps = shape.cluster * shape.threads // 32
    size = 32 * steps + 16 * shape.cluster + 296  # sizeof(RenormShared)
    size = -(-size // 16) * 16 + 8 * 2048 // shape.cluster + 4 * 4096 + 8 * steps + 4
    size = -(-size // 16) * 16
    return KernelSpec(
        symbol=f"renorm_top_p_{dtype.tag}_s{room}_{shape.tag}",
        header="sampling/renorm.cuh",
        function="renorm_top_p",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            ("kHold", shape.hold),
            ("kSharedBytes", size),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=size + (MOST_HELD if shape.hold else 0),
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
        spills=spills("renorm", shape),
    )


@lru_cache(maxsize=64)
def softmax_spec(dtype: DType, room: int = 256, shape: LaunchShape = PORTABLE) -> KernelSpec:
    """Softmax with temperature, to float32."""
    return KernelSpec(
        symbol=f"softmax_{dtype.tag}_s{room}_{shape.tag}",
        header="sampling/softmax.cuh",
        function="softmax",
        params=_SOFTMAX_PARAMS,
        config=(
            ("T", dtype),
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            ("kHold", shape.hold),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=8 * room + 16 + (MOST_HELD if shape.hold else 0),
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
    )


@lru_cache(maxsize=16)
def speculative_spec(dtype: DType, room: int = 256, shape: LaunchShape = NARROW) -> KernelSpec:
    """Chain speculative sampling."""
    return row_spec(
        f"chain_speculative_{dtype.tag}_s{room}_{shape.tag}",
        "sampling/speculative.cuh",
        "chain_speculative",
        _SPECULATIVE_PARAMS,
        ("T", dtype),
        shape=shape,
        room=room,
        listed=None,
        shared=_shared_bytes(room, False, 0),
    )


#: The canonical instances: what is first run, by the kind of launch. The first ones also for 16-bit logits.
_FIRST: tuple[tuple[str, Callable[[DType, LaunchShape], KernelSpec]], ...] = (
    ("softmax", lambda dtype, shape: softmax_spec(dtype, 256, shape)),
    ("draw", lambda dtype, shape: sample_spec(dtype, True, "none", 256, shape)),
    ("select", lambda dtype, shape: sample_spec(dtype, True, "top_k_top_p", 256, shape)),
    ("fill", lambda dtype, shape: filter_spec(dtype, True, 256, shape, "top_k")),

    ("draw", lambda dtype, shape: sample_spec(dtype, False, "none", 256, shape)),
    ("reject", lambda dtype, shape: sample_spec(dtype, False, "top_p", 256, shape)),
    ("min_p", lambda dtype, shape: sample_spec(dtype, False, "min_p", 256, shape)),
    ("select", lambda dtype, shape: sample_spec(dtype, False, "top_k", 256, shape)),
    ("fill", lambda dtype, shape: filter_spec(dtype, False, 256, shape, "top_k")),
    ("renorm", lambda dtype, shape: renorm_spec(dtype, 256, shape)),
    ("speculative", lambda dtype, shape: speculative_spec(dtype, 256, shape)),
    ("select", lambda dtype, shape: sample_spec(dtype, True, "all", 256, shape, True)),
)  # fmt: skip


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: a CTA a row for every architecture, and what 64 rows of 128,256 tokens take on sm_90
    (of bfloat16, without the longest to compile).
    """
    alone = DeviceInfo(80, "80", 108, 163 << 10, 164 << 10, 40 << 20, "sm_80")
    hopper = DeviceInfo(90, "90a", 132, 227 << 10, 228 << 10, 50 << 20, "sm_90")
    return [
        make(dtype, launch_shape(kind, 64, 128256, device))
        for dtype, count in ((float32, len(_FIRST)), (bfloat16, 3), (float16, 2))
        for kind, make in _FIRST[:count]
        for device in ((alone, hopper) if dtype is float32 or (dtype is bfloat16 and kind != "select") else (alone,))
    ]
