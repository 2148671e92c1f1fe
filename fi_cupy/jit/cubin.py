"""What a cubin says of its kernels' resources, for code that came without ptxas' report (from NVRTC's own cache)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

#: Attributes of the section .nv.info, each with a symbol's number and a value.
_FRAME_SIZE, _REGISTERS = 0x11, 0x2F
#: Formats of attributes: nothing follows, one byte, two bytes, or a size and as many bytes.
_NONE, _BYTE, _HALF, _SIZED = 1, 2, 3, 4


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack frame) of the kernel that has most of each; zeros where the cubin does not say."""
    registers = frame = 0
    for info in _sections(cubin, b".nv.info"):
        for attribute, value in _attributes(info):
            if len(value) == 8:
                (number,) = struct.unpack("<I", value[4:])
                if attribute == _REGISTERS:
                    registers = max(registers, number)
                elif attribute == _FRAME_SIZE:
                    frame = max(frame, number)
    return registers, frame


def _sections(elf: bytes, wanted: bytes) -> Iterator[bytes]:
    """The contents of the sections of a name in a 64-bit ELF file."""
    if elf[:5] != b"\x7fELF\x02" or len(elf) < 64:
        return
    table = struct.unpack_from("<Q", elf, 40)[0]
    size, count, names = struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
    texts = headers[names][4]
    for name, _, _, _, offset, length in headers:
        end = elf.index(b"\0", texts + name)
        if elf[texts + name : end] == wanted:
            yield elf[offset : offset + length]


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<2BH", info, at)
        at += 4
        if form == _SIZED:
            yield attribute, info[at : at + size]
            at += size
        elif form not in (_NONE, _BYTE, _HALF):
            return
