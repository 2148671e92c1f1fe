"""Cubin packs: compiled kernels and tuned choices in one file, for a container image or another machine.

A pack is a zip of the kernel cache's entries, ``<arch>/<symbol>-<key>/{kernel.cu, kernel.cubin, kernel.json}``, the
file of tuned choices, and ``manifest.json`` with the sha256 of every member and the versions they were made by. Nothing
of a pack is put in place before all of it has been checked. Since a cubin's key covers its source, options and
compiler, a pack of other versions can do no harm: its kernels are not found, and compiled as if there were no pack.

There is no service to download from: a pack is made (``fi-cupy cache pack``, `fi_cupy.aot`) and carried.

Source: the names are flashinfer.artifacts'.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fi_cupy import __version__, autotuner
from fi_cupy.errors import PackError, UnsupportedError
from fi_cupy.jit import env
from fi_cupy.jit.build import cache, is_cached
from fi_cupy.jit.cache import SCHEMA, KernelCache, entry_members, read_entry, rename_into_place
from fi_cupy.profiles import default_archs, parse_archs, profile_targets
from fi_cupy.tuning import file as choices

FORMAT = "fi_cupy cubin pack"
PACK_SCHEMA = 1
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class ArtifactPath:
    """Where things lie inside a pack."""

    MANIFEST: str = "manifest.json"
    TUNED: str = f"{choices.FOLDER}/{choices.FILE}"

    @staticmethod
    def cubin(arch: str, symbol: str, key: str) -> str:
        """The folder of one kernel for one architecture."""
        return f"{arch}/{symbol}-{key[:16]}"


@dataclass(frozen=True)
class Manifest:
    """What a pack says of itself.

    Attributes
    ----------
    fi_cupy : str
        Version that wrote it.
    nvrtc : tuple of str
        Compilers that made its kernels.
    kernels : tuple of dict
        symbol, arch, key and nvrtc of each.
    sha256 : {member: hexadecimal digest}
    """

    fi_cupy: str
    nvrtc: tuple[str, ...]
    kernels: tuple[dict[str, str], ...]
    sha256: dict[str, str]

    @property
    def tuned(self) -> bool:
        """Whether the pack holds tuned choices."""
        return ArtifactPath.TUNED in self.sha256


class CheckSumHash:
    """The checksums of a pack, checked.

    Parameters
    ----------
    pack : path

    Attributes
    ----------
    map_checksums : {member: sha256}

    Raises
    ------
    PackError
        The pack is broken, or none of fi_cupy's.
    """

    def __init__(self, pack: str | os.PathLike[str]) -> None:
        self.map_checksums: dict[str, str] = dict(verify_pack(pack).sha256)


def pack(
    file: str | os.PathLike[str], archs: Iterable[str] | None = None, tuned: bool = True, root: Path | None = None
) -> Manifest:
    """Write the kernel cache's intact entries, and the tuned choices, into one file.

    Parameters
    ----------
    file : path
        Replaced when the new pack is whole.
    archs : iterable of str, optional
        Only these targets ("80", "90a"); by default all.
    tuned : bool
        Whether to put in the choices of `fi_cupy.autotuner.default_file`, where there are any.
    root : Path, optional
        The cache's folder; by default the environment's.

    Raises
    ------
    PackError
        The file cannot be written.
    """
    store = cache() if root is None else KernelCache(root)
    wanted = None if archs is None else set(archs)
    path = Path(file)
    kernels: list[dict[str, str]] = []
    sums: dict[str, str] = {}
    try:
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as raw, zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:

                def add(member: str, data: bytes) -> None:
                    archive.writestr(member, data)
                    sums[member] = hashlib.sha256(data).hexdigest()

                for folder, kernel in store.entries():
                    if kernel is None or (wanted is not None and kernel.meta.arch not in wanted):
                        continue
                    m = kernel.meta
                    place = ArtifactPath.cubin(m.arch, m.symbol, m.key)
                    for member in entry_members(m.arch):
                        add(f"{place}/{member}", (folder / member).read_bytes())
                    kernels.append({"symbol": m.symbol, "arch": m.arch, "key": m.key, "nvrtc": m.nvrtc})
                known = autotuner.default_file() if tuned else None
                if known is not None and known.exists():
                    choices.read(known)  # a broken file must not travel
                    add(ArtifactPath.TUNED, known.read_bytes())
                text = _manifest_text(kernels, sums).encode()
                archive.writestr(ArtifactPath.MANIFEST, text)
                archive.comment = _manifest_sum(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise PackError(f"cache pack: {path} cannot be written: {error}") from None
    return Manifest(__version__, _compilers(kernels), tuple(kernels), sums)


def _compilers(kernels: Iterable[dict[str, str]]) -> tuple[str, ...]:
    return tuple(sorted({k["nvrtc"] for k in kernels}))


def _manifest_text(kernels: list[dict[str, str]], sums: dict[str, str]) -> str:
    return json.dumps(
        {
            "format": FORMAT, "schema": PACK_SCHEMA, "cache_schema": SCHEMA, "fi_cupy": __version__,
            "nvrtc": _compilers(kernels), "kernels": kernels, "sha256": sums,
        },
        indent=1,
    )  # fmt: skip


def _manifest_sum(text: bytes) -> bytes:
    """What the zip's comment says: the manifest covers all members, and this the manifest."""
    return f"{FORMAT} sha256 {hashlib.sha256(text).hexdigest()}".encode()


def verify_pack(file: str | os.PathLike[str]) -> Manifest:
    """Check every byte of a pack against its manifest.

    Raises
    ------
    PackError
        It cannot be read, is none of fi_cupy's, of another schema, or does not hold together.
    """
    path = Path(file)
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _read_manifest(path, archive)
            for member, expected in manifest.sha256.items():
                if hashlib.sha256(archive.read(member)).hexdigest() != expected:
                    raise PackError(f"cache unpack: {path} is broken: {member} does not have its checksum")
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"cache unpack: {path} cannot be read: {error}") from None
    except Exception as error:  # zlib.error has no common base
        raise PackError(f"cache unpack: {path} is broken: {error}") from None
    return manifest


def _read_manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    names = archive.namelist()
    if ArtifactPath.MANIFEST not in names:
        raise PackError(f"cache unpack: {path} is no cubin pack of fi_cupy: it has no {ArtifactPath.MANIFEST}")
    try:
        text = archive.read(ArtifactPath.MANIFEST)
        given: dict[str, Any] = json.loads(text)
        found = (given["format"], given["schema"], given["cache_schema"])
        if found[0] != FORMAT:
            raise PackError(f"cache unpack: {path} is no cubin pack of fi_cupy: its format is {found[0]!r}")
        if found[1:] != (PACK_SCHEMA, SCHEMA):
            raise PackError(
                f"cache unpack: {path} was made by fi_cupy {given.get('fi_cupy')} with schemas {found[1:]}, "
                f"expected {(PACK_SCHEMA, SCHEMA)}: pack it anew with this version"
            )
        if archive.comment != _manifest_sum(text):
            raise PackError(f"cache unpack: {path} is broken: its manifest does not have its checksum")
        kernels = tuple({n: str(k[n]) for n in ("symbol", "arch", "key", "nvrtc")} for k in given["kernels"])
        manifest = Manifest(str(given["fi_cupy"]), tuple(given["nvrtc"]), kernels, dict(given["sha256"]))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"cache unpack: {path} has a broken manifest ({type(error).__name__}: {error})") from None
    expected = {ArtifactPath.MANIFEST, *([ArtifactPath.TUNED] if manifest.tuned else [])}
    for k in manifest.kernels:
        if not all(_SAFE.fullmatch(k[part]) for part in ("arch", "symbol", "key")):
            raise PackError(f"cache unpack: {path} names a kernel {k['symbol']!r} for {k['arch']!r}, which is no name")
        expected |= {f"{ArtifactPath.cubin(k['arch'], k['symbol'], k['key'])}/{m}" for m in entry_members(k["arch"])}
    if (
        set(names) != expected
        or len(names) != len(expected)
        or set(manifest.sha256) != expected - {ArtifactPath.MANIFEST}
    ):
        odd = sorted(set(names) ^ expected | set(manifest.sha256) ^ (expected - {ArtifactPath.MANIFEST}))
        raise PackError(f"cache unpack: {path} is broken: its manifest and members differ by {odd[:3] or 'duplicates'}")
    return manifest


def unpack(file: str | os.PathLike[str], root: Path | None = None) -> Manifest:
    """Check a pack, then take its kernels into the cache and merge its tuned choices into the default file.

    Parameters
    ----------
    file : path
    root : Path, optional
        The cache's folder; by default the environment's.

    Raises
    ------
    PackError
        The pack is broken or none of fi_cupy's (then nothing has been taken), or the cache cannot be written.
    """
    path = Path(file)
    store = cache() if root is None else KernelCache(root)
    manifest = verify_pack(path)
    try:
        store.root.mkdir(parents=True, exist_ok=True)
        with (
            zipfile.ZipFile(path) as archive,
            tempfile.TemporaryDirectory(prefix=".tmp-", dir=store.root) as scratch,
        ):
            ready: list[tuple[Path, Path]] = []
            for i, k in enumerate(manifest.kernels):
                place = ArtifactPath.cubin(k["arch"], k["symbol"], k["key"])
                folder = Path(scratch) / str(i)
                folder.mkdir(mode=0o755)
                for member in entry_members(k["arch"]):
                    (folder / member).write_bytes(archive.read(f"{place}/{member}"))
                entry = read_entry(folder, k["key"])
                if entry is None or (entry.meta.arch, entry.meta.symbol) != (k["arch"], k["symbol"]):
                    raise PackError(f"cache unpack: {path} is broken: {place} is not the kernel that its manifest says")
                ready.append((folder, store.root / place))
            if manifest.tuned:
                tuned_file = Path(scratch) / choices.FILE
                tuned_file.write_bytes(archive.read(ArtifactPath.TUNED))
                sections = choices.read(tuned_file)
                target = autotuner.default_file()
                if target is not None:
                    choices.merge_into(target, sections)
            for folder, final in ready:
                final.parent.mkdir(parents=True, exist_ok=True)
                rename_into_place(folder, final)
    except (OSError, zipfile.BadZipFile) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"cache unpack: {path} cannot be read or stored: {error}") from None
    return manifest


def download_artifacts(source: str | os.PathLike[str] | None = None) -> int:
    """Take in cubin packs, each checked first. There is no service: they come from files.

    Parameters
    ----------
    source : path, optional
        A pack; by default those that FI_CUPY_CUBIN_PACK names (separated as in PATH).

    Returns
    -------
    int
        Kernels taken in.

    Raises
    ------
    UnsupportedError
        No pack is named, or a URL; the message says what works.
    PackError
        A pack is broken, none of fi_cupy's, or cannot be stored.
    """
    named = [source] if source is not None else [p for p in (env.CUBIN_PACK.get() or "").split(os.pathsep) if p]
    if not named:
        raise UnsupportedError(
            "download_artifacts: fi_cupy has no server of cubins. Pass a pack (made by `fi-cupy cache pack FILE` on a "
            "machine that has warmed its cache), set FI_CUPY_CUBIN_PACK to one, or compile: `fi-cupy warmup`"
        )
    for given in named:
        if "://" in os.fspath(given):
            raise UnsupportedError(
                f"download_artifacts: {given!r} is a URL, expected a file: fetch the pack yourself, then pass its path"
            )
    return sum(len(unpack(given).kernels) for given in named)


def get_artifacts_status(profile: str = "all", archs: str | None = None) -> tuple[tuple[str, bool], ...]:
    """Which kernels of a profile the cache holds, ready to run without compiling.

    Parameters
    ----------
    profile : str
        As in `fi_cupy.profiles.profile_specs`.
    archs : str, optional
        Targets as text ("8.0 9.0a", "all"); by default the environment's or this machine's.

    Returns
    -------
    tuple of (name, bool)
        The name is ``<arch>/<symbol>``.

    Raises
    ------
    ArgumentError
        Unknown profile or architecture; or no GPU and none named.
    """
    targets = profile_targets(profile, parse_archs(archs) if archs else default_archs())
    return tuple((f"{arch}/{spec.symbol}", is_cached(spec, arch)) for spec, arch in targets)


def clear_cubin() -> int:
    """Remove every kernel from the cache (tuned choices stay); return how many there were."""
    return cache().clear()


__all__ = [
    "ArtifactPath",
    "CheckSumHash",
    "Manifest",
    "clear_cubin",
    "download_artifacts",
    "get_artifacts_status",
    "pack",
    "unpack",
    "verify_pack",
]
