"""What every plan/run wrapper has: a workspace, fixed buffers in CUDA-graph mode, and FlashInfer's small methods."""

from __future__ import annotations

from typing import Any

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim
from fi_cupy.dtypes import DType
from fi_cupy.errors import ArgumentError, PlanError


class PlanRun:
    """Base of the wrappers that own a schedule.

    Attributes
    ----------
    device : int
        GPU index of the workspace, -1 for the CPU.
    """

    _op = ""  # starts every message
    _graph: bool  # CUDA-graph mode
    _graph_state: tuple[Any, ...] | None  # what the first plan of that mode fixed
    _planned: Any

    def _attach(self, workspace: Any) -> None:
        w = view(workspace, self._op, "float_workspace_buffer")
        if not w.contiguous:
            raise ArgumentError(
                f"{self._op}: float_workspace_buffer has strides {w.strides}, expected a contiguous array"
            )
        check_aligned(self._op, "float_workspace_buffer", w, 16)
        self._workspace = w.writable(self._op, "float_workspace_buffer")
        self._workspace_bytes = w.size * w.dtype.itemsize
        self.device = w.device

    def _graph_buffer(self, name: str, buffer: Any, dtype: DType) -> View:
        """An array of the caller's that CUDA-graph mode writes to, after checks."""
        if buffer is None:
            raise ArgumentError(
                f"{self._op}: {name} is missing, expected an {dtype.name} array with use_cuda_graph=True"
            )
        b = view(buffer, self._op, name).writable(self._op, name)
        check_ndim(self._op, name, b, 1)
        check_dtype(self._op, name, b, (dtype,))
        check_inner(self._op, name, b)
        check_device(self._op, self._workspace, **{name: b})
        return b

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper keeps addresses and grid fixed."""
        return self._graph

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another scratch buffer from the next `plan` on. The wrapper owns its integer buffer: pass None for it."""
        if int_workspace_buffer is not None:
            view(int_workspace_buffer, self._op, "int_workspace_buffer")  # FlashInfer's second buffer has no use here
        if self._graph_state is not None:
            raise PlanError(f"{self._op}: the workspace address is part of the captured graph; make another wrapper")
        self._attach(float_workspace_buffer)
        self._planned = None

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""
