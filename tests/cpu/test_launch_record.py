"""The launch record that is filled in by hand, against the binding's own structs of cuda.h."""

from __future__ import annotations

import ctypes

import pytest

from fi_cupy.jit.driver import _LaunchRecord


def test_a_launch_record_is_a_launch_config_with_one_attribute():
    driver = pytest.importorskip("cuda.bindings.driver")
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = 1, 2, 3
    config.blockDimX, config.blockDimY, config.blockDimZ = 4, 1, 1
    config.sharedMemBytes, config.hStream = 5, driver.CUstream(0x123456789ABC)
    config.attrs, config.numAttrs = [attribute], 1
    want = ctypes.string_at(config.getPtr(), 56)

    record = _LaunchRecord()
    record.CONFIG.pack_into(record.config, 0, 1, 2, 3, 4, 1, 1, 5, 0x123456789ABC, record.attributes, 1)
    got = ctypes.string_at(record.address, 56)
    assert record.address % 8 == 0
    assert (got[:40], got[48:]) == (want[:40], want[48:])  # between them lie the addresses of the attributes
    address = int.from_bytes(want[40:48], "little")
    assert int.from_bytes(got[40:48], "little") == record.attributes
    assert ctypes.string_at(record.attributes, 72) == ctypes.string_at(address, 72)
