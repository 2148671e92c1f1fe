"""Element types: one row a type, and the way from every framework's dtype object to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from fi_cupy.errors import DTypeError


@dataclass(frozen=True, eq=False)
class DType:
    """One element type.

    Attributes
    ----------
    name : str
        The name in every framework's vocabulary ("bfloat16").
    tag : str
        The short form used in kernel symbols ("bf16").
    cpp : str
        The CUDA C++ type.
    itemsize : int
        Bytes an element.
    np : numpy.dtype
        NumPy's dtype (from ml_dtypes for bf16 and fp8).
    min_arch : int
        The lowest compute capability (times ten) with native conversion; lower ones convert in software.
    """

    name: str
    tag: str
    cpp: str
    itemsize: int
    np: np.dtype[Any]
    min_arch: int = 75

    def __repr__(self) -> str:
        return f"fi_cupy.{self.name}"


float32 = DType("float32", "f32", "float", 4, np.dtype(np.float32))
float16 = DType("float16", "f16", "__half", 2, np.dtype(np.float16))
bfloat16 = DType("bfloat16", "bf16", "__nv_bfloat16", 2, np.dtype(ml_dtypes.bfloat16))
float8_e4m3fn = DType("float8_e4m3fn", "e4m3", "__nv_fp8_e4m3", 1, np.dtype(ml_dtypes.float8_e4m3fn), 89)
float8_e5m2 = DType("float8_e5m2", "e5m2", "__nv_fp8_e5m2", 1, np.dtype(ml_dtypes.float8_e5m2), 89)
float64 = DType("float64", "f64", "double", 8, np.dtype(np.float64))
int8 = DType("int8", "i8", "int8_t", 1, np.dtype(np.int8))
uint8 = DType("uint8", "u8", "uint8_t", 1, np.dtype(np.uint8))
bool_ = DType("bool", "b8", "bool", 1, np.dtype(np.bool_))
int16 = DType("int16", "i16", "int16_t", 2, np.dtype(np.int16))
uint16 = DType("uint16", "u16", "uint16_t", 2, np.dtype(np.uint16))
int32 = DType("int32", "i32", "int32_t", 4, np.dtype(np.int32))
uint32 = DType("uint32", "u32", "uint32_t", 4, np.dtype(np.uint32))
int64 = DType("int64", "i64", "int64_t", 8, np.dtype(np.int64))
uint64 = DType("uint64", "u64", "uint64_t", 8, np.dtype(np.uint64))

ALL: tuple[DType, ...] = (
    float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, float64,
    int8, uint8, bool_, int16, uint16, int32, uint32, int64, uint64,
)  # fmt: skip

HALF_TYPES: tuple[DType, ...] = (float16, bfloat16)
FLOAT_TYPES: tuple[DType, ...] = (float16, bfloat16, float32)
FP8_TYPES: tuple[DType, ...] = (float8_e4m3fn, float8_e5m2)
INDEX_TYPES: tuple[DType, ...] = (int32, int64)

#: Largest finite value of each fp8 type.
FP8_MAX = {float8_e4m3fn: 448.0, float8_e5m2: 57344.0}

_BY_NAME: dict[str, DType] = {d.name: d for d in ALL}
_BY_NAME.update(
    {
        "half": float16, "float": float32, "fp16": float16, "fp32": float32, "bf16": bfloat16, "f16": float16,
        "f32": float32, "float8_e4m3": float8_e4m3fn, "e4m3": float8_e4m3fn, "fp8_e4m3": float8_e4m3fn,
        "e5m2": float8_e5m2, "fp8_e5m2": float8_e5m2, "bool_": bool_, "int": int32, "long": int64,
    }
)  # fmt: skip
_KNOWN: dict[Any, DType] = {}


def dtype(obj: Any) -> DType:
    """Return the `DType` for a name, a NumPy, CuPy, JAX or torch dtype, or a DType itself.

    Raises
    ------
    DTypeError
        The type is none of the table's.
    """
    found = _KNOWN.get(obj) if obj.__hash__ else None
    return found if found is not None else _resolve(obj)


def _resolve(obj: Any) -> DType:
    if isinstance(obj, DType):
        return obj
    if isinstance(obj, str):
        found = _BY_NAME.get(obj.removeprefix("torch."))
    elif type(obj).__module__.split(".", 1)[0] == "torch":
        found = _BY_NAME.get(str(obj).removeprefix("torch."))
    else:
        try:
            found = _BY_NAME.get(np.dtype(obj).name)
        except TypeError:
            found = None
    if found is None:
        raise DTypeError(f"dtype: {obj!r} is unknown, expected one of {', '.join(d.name for d in ALL)}")
    if obj.__hash__:
        _KNOWN[obj] = found
    return found
