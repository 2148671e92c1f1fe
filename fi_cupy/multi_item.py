"""Multi-item scoring: several items behind one shared prefix, each seeing the prefix and itself, as a custom mask."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_dtype
from fi_cupy.dtypes import INDEX_TYPES, DType, uint16, uint32
from fi_cupy.errors import ArgumentError, ShapeError
from fi_cupy.page_table import host_values
from fi_cupy.reference.masks import multi_item_mask

Ints = np.ndarray[Any, np.dtype[Any]]

#: Mask elements that are made at once; NumPy's temporaries take about 20 bytes each.
_BLOCK_ELEMENTS = 1 << 22


class MultiItem(NamedTuple):
    """Host values: prefix lengths int64 [batch], positions inside the items int64 [batch, token_pos_in_items_len]."""

    prefix_len: Ints
    positions: Ints

    def packed_mask(self, op: str, qo_len: Ints, kv_len: Ints) -> Ints:
        """The batch's masks in `packed_custom_mask`'s form: uint8, little-endian, each request from a byte on."""
        if len(self.prefix_len) != len(qo_len):
            raise ShapeError(
                f"{op}: prefix_len_ptr has {len(self.prefix_len)} entries, expected {len(qo_len)} = the batch size"
            )
        missing = kv_len - self.prefix_len > self.positions.shape[1]
        if missing.any():
            b = int(np.argmax(missing))
            raise ShapeError(
                f"{op}: token_pos_in_items_len is {self.positions.shape[1]}, expected at least "
                f"{kv_len[b] - self.prefix_len[b]} = kv_len - prefix_len of request {b}"
            )
        parts = [self._pack(b, int(m), int(n)) for b, (m, n) in enumerate(zip(qo_len, kv_len, strict=True))]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def _pack(self, b: int, qo_len: int, kv_len: int) -> Ints:
        rows = max(_BLOCK_ELEMENTS // max(kv_len, 1) // 8 * 8, 8)  # whole bytes in all blocks but the last
        packed = [np.zeros(0, np.uint8)]
        for start in range(0, qo_len, rows):
            stop = min(start + rows, qo_len)
            mask = np.zeros((stop - start, kv_len), bool)
            keys = kv_len - qo_len + stop  # causal: the block's last row sees no key behind these
            if keys > 0:
                mask[:, :keys] = multi_item_mask(stop - start, keys, int(self.prefix_len[b]), self.positions[b])
            packed.append(np.packbits(mask.reshape(-1), bitorder="little"))
        return np.concatenate(packed)


def read_multi_item(
    op: str, prefix_len_ptr: Any, token_pos_in_items_ptr: Any, token_pos_in_items_len: int, max_item_len_ptr: Any,
    custom_mask: Any, packed_custom_mask: Any,
) -> MultiItem | None:  # fmt: skip
    """The arguments of multi-item scoring on the host; None without `prefix_len_ptr`.

    Parameters
    ----------
    op : str
        Starts the messages.
    prefix_len_ptr : int or uint32 [batch]
        Tokens of each request's shared prefix.
    token_pos_in_items_ptr : int or uint16 [batch * token_pos_in_items_len]
        For the tokens behind the prefix: the position inside the item, 0 for a delimiter; padded.
    token_pos_in_items_len : int
        Entries a request.
    max_item_len_ptr : int or uint16 [batch], optional
        The longest item: a hint of FlashInfer's kernels, which must not be shorter than the positions say.
    custom_mask, packed_custom_mask
        Must be None with `prefix_len_ptr`.
    """
    if prefix_len_ptr is None:
        given = {"token_pos_in_items_ptr": token_pos_in_items_ptr, "max_item_len_ptr": max_item_len_ptr}
        for name, value in given.items():
            if value is not None:
                raise ArgumentError(f"{op}: {name} belongs to multi-item scoring, expected prefix_len_ptr as well")
        if token_pos_in_items_len:
            raise ArgumentError(f"{op}: token_pos_in_items_len is {token_pos_in_items_len} without prefix_len_ptr")
        return None
    if custom_mask is not None or packed_custom_mask is not None:
        raise ArgumentError(f"{op}: prefix_len_ptr makes a mask of its own, expected no custom_mask beside it")
    if token_pos_in_items_ptr is None or token_pos_in_items_len < 1:
        raise ArgumentError(f"{op}: multi-item scoring needs token_pos_in_items_ptr and token_pos_in_items_len")
    arrays = [_view(op, "prefix_len_ptr", prefix_len_ptr, uint32),
              _view(op, "token_pos_in_items_ptr", token_pos_in_items_ptr, uint16)]  # fmt: skip
    if max_item_len_ptr is not None:
        arrays.append(_view(op, "max_item_len_ptr", max_item_len_ptr, uint16))
    prefix, flat, *longest = (x.astype(np.int64).reshape(-1) for x in host_values(arrays))
    if flat.size != len(prefix) * token_pos_in_items_len:
        raise ShapeError(
            f"{op}: token_pos_in_items_ptr has {flat.size} entries, expected {len(prefix) * token_pos_in_items_len} "
            "= batch size * token_pos_in_items_len"
        )
    if (prefix < 0).any() or (flat < 0).any():
        raise ArgumentError(f"{op}: prefix_len_ptr and token_pos_in_items_ptr must not be negative")
    positions = flat.reshape(len(prefix), token_pos_in_items_len)
    for lens in longest:
        if len(lens) != len(prefix) or (lens < positions.max(axis=1)).any():
            raise ArgumentError(
                f"{op}: max_item_len_ptr is {lens.tolist()}, expected at least the largest position of each request"
            )
    return MultiItem(prefix, positions)


def _view(op: str, name: str, x: Any, unsigned: DType) -> View:
    v = view(np.asarray(x) if isinstance(x, (list, tuple)) else x, op, name)
    check_dtype(op, name, v, (*INDEX_TYPES, unsigned))
    return v
