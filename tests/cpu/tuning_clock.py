"""A stand-in for the GPU's clock and a runner for it: what the tests of the autotuner share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fi_cupy import autotuner as at
from fi_cupy.device import DeviceInfo
from fi_cupy.jit import env
from fi_cupy.tuning import choice

GPU = DeviceInfo(90, "90a", 132, 227 << 10, 228 << 10, 50 << 20, "Test GPU")


class Clock:
    """Times tactics by a table instead of running them; a tactic that raises is one that cannot run."""

    def __init__(self, us) -> None:
        self.us = us if callable(us) else us.__getitem__
        self.prepared: list[tuple[object, tuple]] = []
        self.sessions = 0

    @contextlib.contextmanager
    def session(self):
        self.sessions += 1
        yield

    def make(self, spec):
        return np.zeros(spec.shape, spec.dtype.np)

    def rotate(self, inputs, cold):
        return [inputs]

    def prepare(self, call, sets, use_graph):
        tactic = call(sets[0])
        self.prepared.append((tactic, tuple(np.shape(x) for x in sets[0])))
        return tactic

    def time(self, prepared, rounds):
        return [[float(self.us(t))] * rounds for t in prepared]


class Runner(at.TunableRunner):
    def __init__(self, tactics=("own", "fast", "slow"), broken=()) -> None:
        self.tactics, self.broken = tactics, broken
        self.prepared = 0
        self.profiles: list[tuple] = []

    def get_valid_tactics(self, inputs, profile):
        self.profiles.append(profile.get_opt_shapes())
        return self.tactics

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        if do_preparation:
            assert tactic == -1
            self.prepared += 1
            return None
        if tactic in self.broken:
            raise RuntimeError(f"{tactic} is broken")
        return tactic


class Other(Runner):
    pass


US = {"own": 10.0, "fast": 6.0, "slow": 20.0, "o1": 5.0}
ROWS = at.TuningConfig(
    dynamic_tensor_specs=(at.DynamicTensorSpec((0,), (0,), (4, 1, 16, 4), at.make_bucket_mapper((1, 4, 16), True)),)
)


def x(rows: int, columns: int = 8) -> np.ndarray:
    return np.zeros((rows, columns), np.float32)


def fresh_tuner(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[at.AutoTuner]:
    """A tuner of a test's own, with the clock and with a cold cache in `folder`: the body of a fixture."""
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(folder / "cache"))
    for name in env.AUTOTUNE_DIR.names:
        monkeypatch.delenv(name, raising=False)
    made = at.AutoTuner(Clock(US), GPU)
    monkeypatch.setattr(at.AutoTuner, "_instance", made)
    choice.forget()
    yield made
    choice.forget()
