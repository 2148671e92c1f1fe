"""The autotuner with a stand-in for the GPU's clock: what is measured, and what is chosen."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest
from tuning_clock import ROWS, Other, Runner, fresh_tuner, x

from fi_cupy import autotuner as at
from fi_cupy.errors import ArgumentError
from fi_cupy.tuning import choice


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    yield from fresh_tuner(monkeypatch, tmp_path)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2, 4, 5, 15, 16, 17, 100])
def test_buckets_against_a_scan(value):
    buckets = (2, 4, 16)
    below = max([b for b in buckets if b <= value], default=2)
    above = min([b for b in buckets if b >= value], default=16)
    assert at.round_to_nearest_bucket(value, buckets) == below
    assert at.round_to_nearest_bucket(value, buckets, round_map=True) == above
    assert at.make_bucket_mapper((16, 2, 4, 2))(value) == below
    assert at.make_bucket_mapper((16, 2, 4), True)(value) == above


def test_profiles_are_every_combination(tuner):
    config = at.TuningConfig(
        dynamic_tensor_specs=(
            at.DynamicTensorSpec((0, 1), (0, 0), lambda n: range(1, n + 1), lambda n: n),
            at.DynamicTensorSpec((0,), (1,), (8, 32), lambda n: n),
        ),
        constraint_specs=(at.ConstraintSpec(1, 1, lambda shapes: shapes[0][0] * shapes[0][1]),),
    )
    runner = Runner()
    with at.autotune():
        tuner.choose_one("op", [runner], config, [x(2), x(2), 5, None])
    expected = [((m, n), (m, m * n), (0,), (0,)) for m in (1, 2) for n in (8, 32)]
    assert runner.profiles == expected
    assert {shapes for _, shapes in tuner._timer.prepared} == {((m, n), (m, m * n), (), ()) for m, n in
                                                              [(1, 8), (1, 32), (2, 8), (2, 32)]}  # fmt: skip


def test_dims_name_their_range(tuner):
    seen = []

    class Looks(Runner):
        def get_valid_tactics(self, inputs, profile):
            seen.append(profile.shapes[0][0])
            return ()

    with at.autotune():
        tuner.choose_one("op", [Looks()], ROWS, [x(3)])
    assert seen == [at.DynamicDim(1, 1, 4), at.DynamicDim(4, 4, 16), at.DynamicDim(16, 16, float("inf"))]


def test_initializers_and_hook_make_the_inputs(tuner):
    spec = at.DynamicTensorSpec(
        (0,), (0,), (2,), lambda n: 2, (lambda shape, dtype, device: np.full(shape, 7, dtype),)
    )  # fmt: skip
    seen = []

    def hook(arrays):
        seen.append([a.copy() for a in arrays])
        return [arrays[0], np.ones((3, 3))]

    own = x(5)
    config = at.TuningConfig(dynamic_tensor_specs=(spec,), inputs_pre_hook=hook)
    with at.autotune():
        tuner.choose_one("op", [Runner(("own",))], config, [x(9), own])
    assert (seen[0][0] == np.full((2, 8), 7)).all()
    assert seen[0][0].dtype == np.float32
    assert seen[0][1].shape == own.shape
    assert tuner._timer.prepared == [("own", ((2, 8), (3, 3)))]


# --- choosing --------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_outside(tuner):
    runner = Runner()
    assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, -1)
    assert tuner._timer.sessions == 0
    assert tuner.stats.cache_misses == 1
    assert tuner.stats.cache_miss_config_collection == {"op": {((3, 8),)}}


def test_the_fastest_tactic_of_all_runners(tuner):
    a, b = Runner(), Other(("o1",))
    with at.autotune():
        assert tuner.is_tuning_mode
        assert tuner.choose_one("op", [a, b], ROWS, [x(3)], extra=1) == (b, "o1")
    assert not tuner.is_tuning_mode
    assert tuner.choose_one("op", [a, b], ROWS, [x(2)]) == (b, "o1")
    assert tuner.choose_one("op", [b, a], ROWS, [x(2)]) == (b, "o1")  # by name, not by position
    assert tuner.choose_one("op", [a], ROWS, [x(2)]) == (a, -1)  # the runner is not there
    assert tuner.choose_one("other", [a, b], ROWS, [x(2)]) == (a, -1)
    assert (a.prepared, b.prepared) == (3, 3)  # once a bucket
    assert tuner._timer.sessions == 3
    assert tuner.stats.tuned_op_successful_configs == {"op": 3}
    hit, runner_id, tactic, profile = tuner.search_cache("op", [a, b], ((3, 8),), ROWS)
    assert (hit, runner_id, tactic, profile.get_opt_shapes()) == (True, 1, "o1", ((4, 8),))
    with at.autotune():
        tuner.choose_one("op", [a, b], ROWS, [x(16)])
    assert tuner._timer.sessions == 3  # known


def test_a_choice_needs_a_margin(tuner):
    tuner._timer.us = {"own": 10.0, "fast": 9.95, "slow": 10.2}.__getitem__
    runner = Runner()
    with at.autotune():
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "own")
    tuner._timer.us = {"own": 10.0, "fast": 9.8, "slow": 10.2}.__getitem__
    tuner.clear_cache()
    with at.autotune():
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "fast")
        assert tuner.rank_tactics("op", [runner], ROWS, [x(3)], 2) == ["fast", "own"]
    (entry,) = {e for e in tuner.choices().values()}
    assert (entry.us, entry.fallback_us) == (9.8, 10.0)


def test_rank_without_measurement_is_the_runners_order(tuner):
    assert tuner.rank_tactics("op", [Runner()], ROWS, [x(3)], k=2) == ["own", "fast"]


def test_the_final_overrules_the_screening(tuner):
    """A disturbed first look must not decide between close tactics, nor bring back what was far off."""
    looks = iter([{"own": 10.0, "fast": 9.5, "slow": 30.0}, {"own": 9.0, "fast": 9.6, "slow": 1.0}])

    def timed(prepared, rounds):
        table = next(looks)
        return [[table[t]] * rounds for t in prepared]

    tuner._timer.time = timed
    runner = Runner()
    with at.autotune(tuning_buckets=[4]):
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "own")


def test_broken_tactics_are_left_out_and_counted(tuner):
    runner = Runner(broken=("fast",))
    with at.autotune(tuning_buckets=[4]):
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "own")
    assert tuner.stats.failed_profiling_count == {"op": {"Runner fast at ((4, 8),)"}}
    assert "1 tactics failed" in str(tuner.stats)
    tuner.reset_statistics()
    assert tuner.stats.failed_profiling_count == {}
    tuner.clear_cache()
    broken = Runner(broken=("own", "fast", "slow"))
    with at.autotune():
        assert tuner.choose_one("op", [broken], ROWS, [x(3)]) == (broken, -1)
    assert not tuner.choices()


def test_own_choice_broken_leaves_no_time_of_it(tuner):
    runner = Runner(broken=("own",))
    with at.autotune(tuning_buckets=[4]):
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "fast")
    (entry,) = tuner.choices().values()
    assert entry.fallback_us != entry.fallback_us


def test_extras_keep_choices_apart(tuner):
    class Typed(Runner):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def get_cache_key_extras(self, inputs):
            return (self.kind,)

    with at.autotune():
        tuner.choose_one("op", [Typed("a")], ROWS, [x(3)])
    assert tuner.search_cache("op", [Typed("a")], ((3, 8),), ROWS)[0]
    assert not tuner.search_cache("op", [Typed("b")], ((3, 8),), ROWS)[0]


def test_buckets_round_up_and_nesting(tuner):
    runner = Runner()
    with at.autotune(tuning_buckets=(300, 100), round_up=False):
        tuner.choose_one("op", [runner], ROWS, [x(3)])
        assert [s[0][0] for s in runner.profiles] == [100, 300]
        assert tuner.search_cache("op", [runner], ((299, 8),), ROWS)[3].get_opt_shapes() == ((100, 8),)
        with at.autotune(False, round_up=True):
            assert tuner.is_tuning_mode  # the outer context's
            assert tuner.search_cache("op", [runner], ((101, 8),), ROWS)[3].get_opt_shapes() == ((300, 8),)
        assert tuner.search_cache("op", [runner], ((101, 8),), ROWS)[3].get_opt_shapes() == ((100, 8),)
    assert not tuner.search_cache("op", [runner], ((100, 8),), ROWS)[0]  # the operator's own buckets have no 100


def test_skip_ops_add_up(tuner):
    runner = Runner()
    with at.autotune(skip_ops={"a"}), at.autotune(skip_ops=["b"]):
        assert tuner.choose_one("a", [runner], ROWS, [x(3)]) == (runner, -1)
        assert tuner.choose_one("b", [runner], ROWS, [x(3)]) == (runner, -1)
        assert tuner.choose_one("c", [runner], ROWS, [x(3)]) == (runner, "fast")


def test_contexts_belong_to_their_thread(tuner):
    seen = []
    with at.autotune():
        thread = threading.Thread(target=lambda: seen.append(tuner.is_tuning_mode))
        thread.start()
        thread.join()
    assert seen == [False]


def test_the_context_ends_with_an_exception(tuner):
    with contextlib.suppress(KeyError), at.autotune(skip_ops={"a"}):
        raise KeyError
    assert not tuner.is_tuning_mode
    assert not choice.current().skip_ops


@pytest.mark.parametrize("buckets", [(), (0,), (4, -1), (2.5,)])
def test_bad_buckets(tuner, buckets):
    with pytest.raises(ArgumentError, match="autotune: tuning_buckets"), at.autotune(tuning_buckets=buckets):
        pass


def test_bad_specs(tuner):
    with pytest.raises(ArgumentError, match="input_idx has 2 entries and dim_idx 1"):
        at.DynamicTensorSpec((0, 1), (0,), (1,), int)
    with pytest.raises(ArgumentError, match="tensor_initializers has 1 entries, expected 2"):
        at.DynamicTensorSpec((0, 1), (0, 0), (1,), int, (lambda *_: None,))
    with pytest.raises(ArgumentError, match="choose_one: runners"):
        tuner.choose_one("op", [], ROWS, [x(1)])
    with pytest.raises(ArgumentError, match="choose_one: runners"):
        tuner.choose_one("op", ["no runner"], ROWS, [x(1)])
    with pytest.raises(ArgumentError, match="buckets is empty"):
        at.make_bucket_mapper(())
