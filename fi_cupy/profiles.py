"""Named sets of kernels: what `warmup` compiles, `list` shows and `preload` loads."""

from __future__ import annotations

import fnmatch
import importlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from fi_cupy.device import DeviceInfo, default_target, device_info, num_devices
from fi_cupy.errors import ArgumentError
from fi_cupy.jit import env
from fi_cupy.jit.cache import CachedKernel
from fi_cupy.jit.spec import ARCHS, KernelSpec

#: The modules that hold kernels, each with ``kernel_specs()``.
MODULES: tuple[str, ...] = (
    "norm", "lookup", "activation", "rope", "page", "quantization", "cascade", "sampling", "topk", "decode",
    "prefill", "mla", "mixed", "customize", "gemm", "fused_moe",
)  # fmt: skip


def family_specs(module: str) -> list[KernelSpec]:
    """The canonical kernels of one op module, e.g. "norm"."""
    specs: list[KernelSpec] = importlib.import_module(f"fi_cupy.{module}").kernel_specs()
    return specs


def all_specs() -> list[KernelSpec]:
    """The canonical kernels of every op module, each once."""
    return list(dict.fromkeys(spec for module in MODULES for spec in family_specs(module)))


@dataclass(frozen=True)
class ModelShape:
    """What decides the kernels of a Llama-architecture model in bf16."""

    hidden: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    page_size: int = 16


#: The models whose kernels are profiles of their own.
MODELS: dict[str, ModelShape] = {
    "smollm2": ModelShape(576, 9, 3, 64, 1536, 49152),
    "llama3-8b": ModelShape(4096, 32, 8, 128, 14336, 128256),
}


@dataclass(frozen=True)
class LatentShape:
    """What decides the kernels of a DeepSeek-architecture model's attention in bf16, on 1, 2, 4 or 8 GPUs."""

    hidden: int
    num_heads: int
    q_rank: int
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    page_size: int = 64


#: Models with latent attention: profiles of their own, too.
LATENT_MODELS: dict[str, LatentShape] = {
    "deepseek-v2-lite": LatentShape(2048, 16, 0),
    "deepseek-v3": LatentShape(7168, 128, 1536),
}

#: A usual GPU of each architecture: choices that depend on the device are made for it when that device is not here.
TYPICAL: dict[str, DeviceInfo] = {
    "75": DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20, "T4"),
    "80": DeviceInfo(80, "80", 108, 163 << 10, 164 << 10, 40 << 20, "A100"),
    "86": DeviceInfo(86, "86", 84, 99 << 10, 100 << 10, 6 << 20, "A40"),
    "89": DeviceInfo(89, "89", 142, 99 << 10, 100 << 10, 96 << 20, "L40S"),
    "90a": DeviceInfo(90, "90a", 132, 227 << 10, 228 << 10, 50 << 20, "H100"),
    "100a": DeviceInfo(100, "100a", 148, 227 << 10, 228 << 10, 126 << 20, "B200"),
    "120a": DeviceInfo(120, "120a", 170, 99 << 10, 100 << 10, 96 << 20, "RTX 5090"),
}


def names() -> tuple[str, ...]:
    """Every profile's name."""
    return ("all", *MODELS, *LATENT_MODELS, *MODULES)


def model_specs(shape: ModelShape, device: DeviceInfo) -> list[KernelSpec]:
    """The kernels that serving a model takes on `device`: batches of 1 to 256 requests, prompts of any length."""
    from fi_cupy import (
        decode_kernel,
        lookup,
        norm,
        page,
        prefill_kernel,
        rope_kernel,
        rope_quantize_kernel,
        sampling_kernels,
    )  # fmt: skip
    from fi_cupy.dtypes import bfloat16, float32
    from fi_cupy.gemm.instances import with_residual
    from fi_cupy.gemm.select import gated_spec, select_mm_kernel, select_rms_kernel
    from fi_cupy.prefill_hopper import Load

    h, d, kv = shape.hidden, shape.head_dim, shape.num_kv_heads
    qo = shape.num_qo_heads
    specs: list[KernelSpec] = [
        norm.norm_spec(bfloat16, bfloat16, bfloat16, h, 8),
        norm.norm_spec(bfloat16, bfloat16, bfloat16, h, 8, residual=True),
        *lookup.kernel_specs(),
        *rope_kernel.model_specs(d, (qo + kv) * d // 16),
        *(page.append_spec(2 * d, 2 * d, 16, unroll) for unroll in (1, 4)),
        *rope_quantize_kernel.append_specs(bfloat16),  # both in one
        *sampling_kernels.kernel_specs()[:6],  # softmax and draws from float32 logits
    ]
    for rows in (1, 16, 64, 256):  # draws from float32 logits over a temperature
        for kind, launch in (("none", "draw"), ("top_p", "reject"), ("all", "select")):
            found = sampling_kernels.launch_shape(launch, rows, shape.vocab, device)
            room = sampling_kernels.room(shape.vocab)
            specs.append(sampling_kernels.sample_spec(float32, True, kind, room, found, scaled=True))
    products = [((qo + 2 * kv) * d, h), (h, qo * d), (h, shape.intermediate)]
    for m in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096):
        for pdl in (False, True):  # as the demo model launches where the device can, and as others may not
            made = [select_mm_kernel(m, n, k, device, pdl=pdl)[0] for n, k in products]
            specs += [*made, *(with_residual(spec) for spec in made[1:])]
            specs.append(select_mm_kernel(m, shape.vocab, h, device, out=float32, pdl=pdl)[0])
        specs.append(gated_spec(m, shape.intermediate, h, device))
        for n, gated in ((products[0][0], False), (shape.intermediate, True)):
            both = [select_rms_kernel(m, n, h, device, gated=gated, pdl=pdl) for pdl in (False, True)]
            specs += [chosen[0] for chosen in both if chosen is not None]
    for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        problem = decode_kernel.Problem(
            batch, qo, kv, d, bfloat16, bfloat16, bfloat16, shape.page_size % 16 == 0, False, False, False, False
        )
        specs.append(decode_kernel.geometry(problem, device).spec)
    prefill = prefill_kernel.Problem(qo, kv, d, d, bfloat16, True, False, False, False)
    for rows in (16, 32, 64, 128, 256, 1024):
        specs.append(prefill_kernel.geometry(prefill._replace(backend="fa2"), rows, device).spec)
    for load in (Load(1, 128 * qo // kv, 128, 128, True), Load(64, 4096 * qo // kv, 4096, 4096, True)):
        specs.append(prefill_kernel.geometry(prefill, load.rows, device, load).spec)
    return list(dict.fromkeys(specs))


def latent_specs(shape: LatentShape, device: DeviceInfo) -> list[KernelSpec]:
    """The kernels of latent attention and the layers beside it that serving a model takes on `device`."""
    from fi_cupy import lookup, mla_kernel, norm, page, prefill_kernel, rope_kernel
    from fi_cupy.dtypes import bfloat16
    from fi_cupy.gemm.select import select_mm_kernel
    from fi_cupy.prefill_hopper import Load

    h, latent = shape.hidden, shape.kv_rank + shape.rope
    specs: list[KernelSpec] = [
        *(norm.norm_spec(bfloat16, bfloat16, bfloat16, n, 8) for n in sorted({h, shape.q_rank or h, shape.kv_rank})),
        norm.norm_spec(bfloat16, bfloat16, bfloat16, h, 8, residual=True),
        *lookup.kernel_specs(),
        *(page.append_spec(2 * shape.kv_rank, 2 * shape.rope, 16, unroll) for unroll in (1, 4)),
    ]
    for heads in (shape.num_heads // ranks for ranks in (1, 2, 4, 8) if shape.num_heads % ranks == 0):
        specs += rope_kernel.model_specs(shape.rope, (heads + 1) * shape.rope // 16)
        qk = heads * (shape.nope + shape.rope)
        products = [(qk, shape.q_rank or h), (latent, h), (h, heads * shape.value)]
        products += [(shape.q_rank, h)] * (shape.q_rank > 0)
        for m in (1, 8, 64, 256, 4096):
            specs += [select_mm_kernel(m, n, k, device)[0] for n, k in products]
        decode = mla_kernel.Problem(heads, bfloat16, bfloat16, shape.page_size)
        for tokens in (1, 2, 64):  # decoding, speculating, chunks
            specs.append(mla_kernel.geometry(decode, tokens * heads, device).spec(mla_kernel.Call()))
        prefill = prefill_kernel.Problem(
            heads, heads, shape.nope + shape.rope, shape.value, bfloat16, False, False, False, False
        )
        specs.append(prefill_kernel.geometry(prefill, 1024, device, Load(1, 1024, 1024, 1024, True)).spec)
    return list(dict.fromkeys(specs))


def profile_specs(name: str, device: DeviceInfo | None = None) -> list[KernelSpec]:
    """The kernels of a profile: "all", a model, an op module's name, or several of them with commas between.

    Parameters
    ----------
    name : str
    device : DeviceInfo, optional
        Whose kernels a model takes; None means a usual GPU of each architecture.

    Raises
    ------
    ArgumentError
        There is no such profile.
    """
    specs: list[KernelSpec] = []
    for part in (p.strip() for p in name.split(",")):
        if part == "all":
            specs += all_specs()
        elif part in MODELS:
            for each in [device] if device else TYPICAL.values():
                specs += model_specs(MODELS[part], each)
        elif part in LATENT_MODELS:
            for each in [device] if device else TYPICAL.values():
                specs += latent_specs(LATENT_MODELS[part], each)
        elif part in MODULES:
            specs += family_specs(part)
        else:
            raise ArgumentError(f"profile: {part!r} is unknown, expected one of {', '.join(names())}")
    return list(dict.fromkeys(specs))


def profile_targets(name: str, archs: Iterable[str]) -> list[tuple[KernelSpec, str]]:
    """Every (kernel, architecture) of a profile, chosen for this machine's GPU where it is one of `archs`."""
    here = _current_device()
    targets = []
    for arch in archs:
        info = device_info(here) if here is not None else None
        if info is None or info.arch != arch:
            info = TYPICAL.get(arch)
        targets += [(spec, arch) for spec in profile_specs(name, info) if spec.supports(arch)]
    return targets


def find_specs(pattern: str) -> list[KernelSpec]:
    """The canonical kernels whose symbol is `pattern`, or matches it as a shell pattern, or begins with it."""
    specs = all_specs()
    for matches in (
        [s for s in specs if s.symbol == pattern],
        [s for s in specs if fnmatch.fnmatchcase(s.symbol, pattern)],
        [s for s in specs if s.symbol.startswith(pattern)],
    ):
        if matches:
            return matches
    return []


_ARCH = re.compile(r"(?:sm_)?(\d{1,2})\.?(\d)([af]?)")


def parse_archs(text: str) -> tuple[str, ...]:
    """Compile targets from text: ``"8.0 9.0a sm_120f compute_80"`` → ("80", "90a", "120a", "compute_80").

    From sm_90 on the target is the architecture-specific one whatever the suffix, since that is what a GPU of that
    compute capability loads. "all" stands for every architecture the tests compile for; separators are blanks,
    commas or semicolons.

    Raises
    ------
    ArgumentError
        A token is no architecture, or one below 7.5.
    """
    targets: list[str] = []
    for token in re.split(r"[\s,;]+", text.strip()):
        if token == "all":
            targets += ARCHS
            continue
        match = _ARCH.fullmatch(token)
        if token.startswith("compute_") and token[8:].isdigit() and int(token[8:]) >= 75:
            targets.append(token)
        elif match and int(match[1] + match[2]) >= 75:
            targets.append(default_target(int(match[1] + match[2])))
        else:
            raise ArgumentError(
                f"arch: {token!r} is no architecture from 7.5 on, expected for example 8.0, 9.0a, compute_80 or all"
            )
    return tuple(dict.fromkeys(targets))


def default_archs() -> tuple[str, ...]:
    """The targets meant when none is named: FI_CUPY_TARGET's, the environment's list, else those of the GPUs present.

    Raises
    ------
    ArgumentError
        The environment names none and there is no GPU.
    """
    listed = env.TARGET.get() or env.ARCH_LIST.get()
    if listed:
        return parse_archs(listed)
    found = tuple(dict.fromkeys(device_info(i).arch for i in range(num_devices())))
    if not found:
        raise ArgumentError(
            'arch: no GPU is present, so name the targets: --arch "8.0 9.0a" (or all), '
            f"or set {' / '.join(env.ARCH_LIST.names)}"
        )
    return found


def preload(profile: str | Iterable[KernelSpec] = "all", arch: str | None = None, processes: int | None = None) -> int:
    """Compile a profile in parallel, and load it on the current GPU where there is one that can run it.

    Parameters
    ----------
    profile : str or iterable of KernelSpec
        A name as in `fi_cupy.profiles.profile_specs`, or kernels.
    arch : str, optional
        Targets as for ``fi-cupy warmup --arch``; by default the current GPU's, else the
        environment's list.
    processes : int, optional
        Compiler processes; by default one a CPU, at most 16.

    Returns
    -------
    int
        How many kernels are ready.

    Raises
    ------
    ArgumentError
        Unknown profile or architecture, or no GPU and no `arch`.
    CompileError, MissingKernelError
        The first kernel that could not be had, after all others were tried.

    Examples
    --------
    >>> import fi_cupy
    >>> fi_cupy.preload("norm", arch="9.0a")  # doctest: +SKIP
    """
    from fi_cupy.jit.build import build_many

    device = _current_device()
    if arch is None and device is not None:
        targets: tuple[str, ...] = (device_info(device).arch,)
    else:
        targets = parse_archs(arch) if arch else default_archs()
    if isinstance(profile, str):
        jobs = profile_targets(profile, targets)
    else:
        jobs = [(spec, target) for spec in profile for target in targets if spec.supports(target)]
    ready = 0
    failure: BaseException | None = None
    for _, outcome in build_many(jobs, processes or default_processes()):
        if isinstance(outcome, CachedKernel):
            ready += 1
        else:
            failure = failure or outcome
    if failure is not None:
        raise failure
    if device is not None:
        from fi_cupy.jit.kernel import load_kernel

        for spec, target in jobs:
            if target == device_info(device).arch:
                load_kernel(spec, device)
    return ready


def _current_device() -> int | None:
    if num_devices() == 0:
        return None
    from cupy.cuda import runtime

    return int(runtime.getDevice())


def default_processes() -> int:
    """Compiler processes for bulk work: one a CPU that this process may use, at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


def preload_from_environment() -> None:
    """What importing fi_cupy does last: `preload` the profile that FI_CUPY_PRELOAD names."""
    name = env.PRELOAD.get()
    if name:
        preload(name)
