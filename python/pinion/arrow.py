"""A leased slot as Arrow arrays.

On the host values, views, offsets and heaps are the slot's own bytes; validity and bools are packed into bits,
which is the only copy. From a GPU everything is copied, used bytes only. Strings come as `string_view`,
lists as `large_list_view`, which is how they lie there; `restore` makes the declared types of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from pinion.errors import ProtocolError

Read = Callable[[int, int], pa.Buffer]
"""Bytes of the slot: offset, length."""

# What one buffer of a view covers of the heap.
HEAP_BITS = 30

_VIEW = np.dtype([("size", "<i4"), ("prefix", "<i4"), ("index", "<i4"), ("offset", "<i4")])
_INLINE_BYTES = 12


def to_arrow(node: dict[str, Any], type: pa.DataType, rows: int, read: Read) -> pa.Array:
    """The first `rows` rows of a node whose stored type is `type`."""
    validity, nulls = _validity(node, rows, read)
    kind = node["kind"]
    if kind == "fixed":
        if type.bit_width != 8 * node["width"]:
            raise ProtocolError(f"values of {node['width']} bytes for {type}")
        return pa.Array.from_buffers(type, rows, [validity, read(node["values"], rows * node["width"])], nulls)
    if kind == "bool":
        return pa.Array.from_buffers(type, rows, [validity, _packed(read(node["values"], rows))], nulls)
    if kind == "view":
        views = read(node["views"], 16 * rows)
        return pa.Array.from_buffers(layout_type(type), rows, [validity, views, *_heap(node, views, read)], nulls)
    if kind == "list":
        offsets, sizes = read(node["offsets"], 8 * rows), read(node["sizes"], 8 * rows)
        child = to_arrow(node["child"], item_type(type), _child_rows(node, offsets, sizes), read)
        list_type = pa.large_list_view(item_field(type).with_type(child.type))
        return pa.Array.from_buffers(list_type, rows, [validity, offsets, sizes], nulls, children=[child])
    if kind == "fixed_size_list":
        child = to_arrow(node["child"], type.value_type, rows * type.list_size, read)
        list_type = pa.list_(type.value_field.with_type(child.type), type.list_size)
        return pa.Array.from_buffers(list_type, rows, [validity], nulls, children=[child])
    if kind == "struct":
        children = [to_arrow(part["node"], type.field(i).type, rows, read) for i, part in enumerate(node["children"])]
        fields = [type.field(i).with_type(child.type) for i, child in enumerate(children)]
        return pa.Array.from_buffers(pa.struct(fields), rows, [validity], nulls, children=children)
    raise ProtocolError(f"a node of kind {kind!r}")


def layout_type(type: pa.DataType) -> pa.DataType:
    """The type in which strings and binary lie in a slot."""
    is_text = pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
    return pa.string_view() if is_text else pa.binary_view()


def item_field(type: pa.DataType) -> pa.Field:
    """The field of a list's items; a map's are its entries."""
    if pa.types.is_map(type):
        return pa.field("entries", pa.struct([type.key_field, type.item_field]), nullable=False)
    return type.value_field


def item_type(type: pa.DataType) -> pa.DataType:
    return item_field(type).type


def _validity(node: dict[str, Any], rows: int, read: Read) -> tuple[pa.Buffer | None, int]:
    """A node's validity as bits, and how many rows are null."""
    if node["validity"] is None:
        return None, 0
    marks = read(node["validity"], rows)
    nulls = rows - int(np.count_nonzero(np.frombuffer(marks, np.uint8)))
    return (_packed(marks), nulls) if nulls else (None, 0)


def _packed(marks: pa.Buffer) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.frombuffer(marks, np.uint8), bitorder="little"))


def _heap(node: dict[str, Any], views: pa.Buffer, read: Read) -> list[pa.Buffer]:
    """The heap in the buffers that views count, as far as it is used."""
    slots = np.frombuffer(views, _VIEW)
    long = slots[slots["size"] > _INLINE_BYTES]
    if not long.size:
        return []
    if min(long["index"].min(), long["offset"].min(), slots["size"].min()) < 0:
        raise ProtocolError("views with negative places")
    starts = (long["index"].astype(np.int64) << HEAP_BITS) + long["offset"]
    end = int((starts + long["size"]).max())
    if end > node["heap_bytes"] or int((long["offset"].astype(np.int64) + long["size"]).max()) > 1 << HEAP_BITS:
        raise ProtocolError(f"views to byte {end} of a heap of {node['heap_bytes']}")
    return [
        read(node["heap"] + start, min(1 << HEAP_BITS, end - start)) for start in range(0, end, 1 << HEAP_BITS)
    ]


def _child_rows(node: dict[str, Any], offsets: pa.Buffer, sizes: pa.Buffer) -> int:
    """How many rows of a list's child are used."""
    starts, counts = np.frombuffer(offsets, np.int64), np.frombuffer(sizes, np.int64)
    if not starts.size:
        return 0
    rows = int((starts + counts).max())
    if min(starts.min(), counts.min()) < 0 or rows > node["child_capacity"]:
        raise ProtocolError(f"lists to row {rows} of a child of {node['child_capacity']}")
    return rows


def restore(array: pa.Array, type: pa.DataType) -> pa.Array:
    """An array of a slot in its stored type: a copy where the two differ."""
    if array.type == type:
        return array
    if pa.types.is_struct(type):
        children = [restore(array.field(i), type.field(i).type) for i in range(type.num_fields)]
        return pa.StructArray.from_arrays(children, fields=list(type), mask=_nulls(array))
    if pa.types.is_fixed_size_list(type):
        size = type.list_size
        # `values` are all that were there before a slice was cut, here by `flatten` below.
        items = restore(array.values.slice(array.offset * size, len(array) * size), type.value_type)
        return pa.FixedSizeListArray.from_arrays(items, type=type, mask=_nulls(array))
    if pa.types.is_map(type) or pa.types.is_list(type) or pa.types.is_large_list(type):
        return _restore_list(array, type)
    return array.cast(type)


def _restore_list(array: pa.Array, type: pa.DataType) -> pa.Array:
    sizes = np.frombuffer(array.buffers()[2], np.int64)[array.offset : array.offset + len(array)]
    if array.null_count:
        sizes = np.where(array.is_valid().to_numpy(zero_copy_only=False), sizes, 0)
    ends = np.concatenate(([0], np.cumsum(sizes)))
    items = restore(array.flatten(), item_type(type))
    if pa.types.is_large_list(type):
        return pa.LargeListArray.from_arrays(pa.array(ends), items, type=type, mask=_nulls(array))
    offsets = pa.array(ends, pa.int32())
    if pa.types.is_map(type):
        keys, values = items.flatten()
        return pa.MapArray.from_arrays(_with_nulls(offsets, array), keys, values, type=type)
    return pa.ListArray.from_arrays(offsets, items, type=type, mask=_nulls(array))


def _nulls(array: pa.Array) -> pa.Array | None:
    return array.is_null() if array.null_count else None


def _with_nulls(offsets: pa.Array, array: pa.Array) -> pa.Array:
    """Offsets that say themselves which rows are null: maps take no mask in older releases."""
    if not array.null_count:
        return offsets
    mask = np.concatenate((array.is_null().to_numpy(zero_copy_only=False), [False]))
    return pa.array(offsets.to_numpy(), pa.int32(), mask=mask)
