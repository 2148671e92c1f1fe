"""What fi_cupy finds on this machine, and for each problem its mend: the body of ``fi-cupy info``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import fi_cupy
from fi_cupy import autotuner
from fi_cupy.device import DeviceInfo, device_info, num_devices
from fi_cupy.errors import CacheError, CudaUnavailableError, GPUArchitectureError
from fi_cupy.jit import env
from fi_cupy.jit.cache import KernelCache
from fi_cupy.tuning import file

_PACKAGES = ("numpy", "ml_dtypes", "jinja2", "cuda-pathfinder", "cuda-bindings", "torch", "jax", "gguf", "tokenizers")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
#: Variables of the test suite, which are no settings of the library.
_TEST_VARIABLES = ("FI_CUPY_TEST_", "FI_CUPY_RECEIPT")


def collect() -> dict[str, Any]:
    """Everything ``fi-cupy info`` shows, as plain values.

    Returns
    -------
    dict
        Keys: fi_cupy, python, platform, packages, cupy, nvrtc, headers, driver, gpus, cache, tuned, environment, and
        problems, a list of {"problem": text, "mend": text}.
    """
    problems: list[dict[str, str]] = []

    def problem(text: str, mend: str) -> None:
        problems.append({"problem": text, "mend": mend})

    report: dict[str, Any] = {
        "fi_cupy": fi_cupy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name))},
    }
    report["cupy"] = _cupy(problem)
    report["nvrtc"], report["headers"] = _compiler(problem) if report["cupy"] else (None, None)
    report["driver"], report["gpus"] = _devices(problem, report["nvrtc"]) if report["cupy"] else (None, [])
    if report["gpus"] and "cuda-bindings" not in report["packages"]:
        problem(
            "cuda-bindings is not installed: no tensor maps, and so none of the Hopper kernels that need them",
            f"pip install cuda-bindings~={(report['nvrtc'] or '13.0').split('.')[0]}.0",
        )
    report["cache"] = _cache(problem)
    report["tuned"] = _tuned(problem, [device_info(gpu["index"]) for gpu in report["gpus"]])
    report["environment"] = _environment(problem)
    report["problems"] = problems
    return report


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cupy(problem: Any) -> str | None:
    installed = [name for name in _CUPY if _version(name)]
    if len(installed) > 1:
        problem(
            f"{' and '.join(installed)} are installed together and overwrite each other",
            f"pip uninstall {' '.join(installed)}, then install one of fi_cupy[cuda12] and fi_cupy[cuda13]",
        )
    if not installed:
        problem(
            "CuPy is not installed: CPU arrays work through the NumPy reference, nothing can be compiled",
            "pip install 'fi_cupy[cuda13]' (driver 580 or later) or 'fi_cupy[cuda12]'",
        )
        return None
    try:
        import cupy
    except Exception as error:  # a broken install raises whatever its loader does
        problem(f"CuPy cannot be imported: {error}", f"pip install --force-reinstall {installed[0]}")
        return None
    return f"{cupy.__version__} ({installed[0]})"


def _compiler(problem: Any) -> tuple[str | None, dict[str, str] | None]:
    """NVRTC's version, and where CUDA's headers are with their version."""
    from fi_cupy.jit.compiler import include_dir, nvrtc_version

    nvrtc: str | None = None
    try:
        nvrtc = ".".join(map(str, nvrtc_version()))
    except CudaUnavailableError as error:
        problem(str(error), "pip install 'fi_cupy[cuda13]' or 'fi_cupy[cuda12]', or install a CUDA toolkit")
    try:
        folder = include_dir()
    except CudaUnavailableError as error:
        problem(str(error), "pip install 'fi_cupy[cuda13]' or 'fi_cupy[cuda12]', or set CUDA_PATH to a toolkit")
        return nvrtc, None
    headers = {"path": folder, "version": _header_version(Path(folder))}
    if nvrtc and headers["version"].split(".")[0] != nvrtc.split(".")[0]:
        problem(
            f"CUDA's headers are version {headers['version']}, NVRTC is {nvrtc}",
            "install both from one release: pip install 'fi_cupy[cuda13]' or 'fi_cupy[cuda12]'",
        )
    return nvrtc, headers


def _header_version(folder: Path) -> str:
    try:
        match = re.search(r"#define\s+CUDART_VERSION\s+(\d+)", (folder / "cuda_runtime_api.h").read_text("latin-1"))
    except OSError:
        match = None
    return f"{int(match[1]) // 1000}.{int(match[1]) % 1000 // 10}" if match else "unknown"


def _devices(problem: Any, nvrtc: str | None) -> tuple[str | None, list[dict[str, Any]]]:
    """The newest CUDA version the driver takes, and the GPUs."""
    from cupy.cuda import runtime

    try:
        number = int(runtime.driverGetVersion())
    except Exception:  # CuPy's CUDARuntimeError: no driver library
        number = 0
    if number == 0:
        problem(
            "no NVIDIA driver is loaded: kernels can be compiled (fi-cupy warmup --arch ...), not run",
            "install the NVIDIA driver; in a container, start it with the GPUs (docker run --gpus all)",
        )
        return None, []
    driver = f"{number // 1000}.{number % 1000 // 10}"
    if nvrtc and int(nvrtc.split(".")[0]) > number // 1000:
        problem(
            f"NVRTC {nvrtc} makes code that this driver (CUDA {driver}) cannot load",
            f"pip install 'fi_cupy[cuda{number // 1000}]' in a fresh environment, or update the driver",
        )
    gpus: list[dict[str, Any]] = []
    for index in range(num_devices()):
        try:
            info = device_info(index)
        except GPUArchitectureError as error:
            problem(str(error), "hide it with CUDA_VISIBLE_DEVICES")
            continue
        gpus.append(
            {
                "index": index,
                "name": info.name,
                "compute_capability": f"{info.number // 10}.{info.number % 10}",
                "target": info.arch,
                "multiprocessors": info.num_sms,
                "shared_memory_per_block": info.smem_per_block,
                "l2_bytes": info.l2_bytes,
                "memory_bytes": int(runtime.getDeviceProperties(index)["totalGlobalMem"]),
            }
        )
    if not gpus:
        problem(
            "the driver shows no GPU that fi_cupy can use",
            "check nvidia-smi and CUDA_VISIBLE_DEVICES; a GPU of compute capability 7.5 or later is needed",
        )
    return driver, gpus


def _cache(problem: Any) -> dict[str, Any]:
    root = env.cache_dir()
    reason = unwritable(root)
    if reason:
        problem(
            f"the kernel cache {root} cannot be written ({reason}): kernels are compiled again in every process",
            "set FI_CUPY_CACHE_DIR to a writable folder",
        )
    entries = list(KernelCache(root).entries())
    broken = sum(kernel is None for _, kernel in entries)
    if broken:
        problem(
            f"the kernel cache holds {broken} broken entries; they count as misses",
            "fi-cupy cache prune removes them",
        )
    return {
        "path": str(root),
        "writable": reason is None,
        "kernels": len(entries) - broken,
        "broken": broken,
        "bytes": sum(kernel.meta.code_bytes for _, kernel in entries if kernel is not None),
    }


def _tuned(problem: Any, devices: list[DeviceInfo]) -> dict[str, Any]:
    """The file of tuned choices: how many it holds, and how many of them count here."""
    path = autotuner.default_file()
    found: dict[str, Any] = {"path": None if path is None else str(path), "choices": 0, "used": 0}
    if path is None or not path.exists():
        return found
    try:
        sections = file.read(path)
    except CacheError as error:
        problem(f"{error}; it is not used", f"remove it, or write it anew: fi-cupy tune --output {path}")
        return found
    found["choices"] = sum(map(len, sections.values()))
    found["used"] = sum(len(sections.get(environment, {})) for environment in {file.environment(d) for d in devices})
    if devices and found["choices"] and not found["used"]:
        here, there = file.environment(devices[0]), next(iter(sections))
        problem(
            f"the tuned choices in {path} are not used: they were measured with {file.differences(there, here)}",
            "measure anew: fi-cupy tune",
        )
    return found


def unwritable(folder: Path) -> str | None:
    """Why files cannot be made in `folder` (which may not exist yet); None if they can. Leaves nothing behind."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _environment(problem: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for variable in env.ALL:
        given = {name: os.environ[name] for name in variable.names if os.environ.get(name)}
        rows.append({"names": list(variable.names), "value": variable.get(), "help": variable.help})
        if len(set(given.values())) > 1 and variable is not env.CACHE_DIR:  # its second name is a base, not the folder
            first, *others = given
            problem(f"{' and '.join(given)} differ; {first} counts", f"unset {' '.join(others)}")
    known = {name for variable in env.ALL for name in variable.names}
    for name in sorted(os.environ):
        if name.startswith("FI_CUPY_") and name not in known and not name.startswith(_TEST_VARIABLES):
            problem(f"{name} is set, but fi_cupy reads no such variable", f"unset {name}, or see the names listed here")
    return rows
