"""Layout of a workspace buffer: named regions at aligned offsets, and the error that names the size needed."""

from __future__ import annotations

from fi_cupy.errors import WorkspaceError

#: Every region starts on a multiple of this many bytes: a full DRAM burst, and enough for any vector access.
ALIGNMENT = 256


def align_up(nbytes: int, alignment: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `alignment`."""
    return -(-int(nbytes) // alignment) * alignment


class WorkspaceLayout:
    """Regions of one byte buffer, in the order they are added.

    Attributes
    ----------
    offsets : dict of str to int
        Byte offset of each region.
    size : int
        Bytes in use, a multiple of `ALIGNMENT`.

    Examples
    --------
    >>> layout = WorkspaceLayout()
    >>> layout.add("partial_out", 1000), layout.add("partial_lse", 8), layout.size
    (0, 1024, 1280)
    """

    __slots__ = ("offsets", "size")

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.size = 0

    def add(self, name: str, nbytes: int) -> int:
        """Append a region and return its byte offset."""
        offset = self.size
        self.offsets[name] = offset
        self.size = offset + align_up(nbytes)
        return offset

    def check(self, op: str, available: int, buffer: str = "float_workspace_buffer") -> None:
        """Raise `WorkspaceError` unless `available` bytes hold the layout; the message has the exact size."""
        if available < self.size:
            raise WorkspaceError(
                f"{op}: {buffer} has {available} bytes, expected at least {self.size} for this plan "
                f"({', '.join(self.offsets)}); workspace_size() gives the figure beforehand"
            )
