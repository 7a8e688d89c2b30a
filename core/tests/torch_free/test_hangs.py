"""What is a hang and what is not: limits of steps and starts, clocks that leave out stops, silence and its verdict."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from anychip.engine.heartbeat import StallClock
from anychip.engine_stats import EngineStats
from anychip.executor.progress import Progress
from anychip.launch.watchdog import Watchdog
from anychip.messages import Heartbeat
from anychip.step_messages import StepDecision

STATS = EngineStats(1, 0, 0, 1, 10, 1, 0, 0, 0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def decision(step_id: int, *num_tokens: int) -> StepDecision:
    rows = array("i", range(len(num_tokens)))
    return StepDecision(step_id, rows.tobytes(), array("i", num_tokens).tobytes(), [], b"", [], [], [])


def started(clock: Clock, **settings: float) -> Progress:
    progress = Progress(clock=clock, **settings)
    progress.started()
    return progress


def step(progress: Progress, clock: Clock, seconds: float, *num_tokens: int) -> None:
    progress.launching(decision(1, *num_tokens))
    clock.now += seconds
    progress.collected()


def test_the_first_step_of_a_size_may_take_longer_than_the_next():
    clock = Clock()
    progress = started(clock)
    progress.launching(decision(1, 1, 1, 1))
    first = progress.limit_s
    clock.now += 0.01
    progress.collected()
    progress.launching(decision(2, 1, 1, 1))
    assert first >= 120 and progress.limit_s == 30.0


@given(seconds=st.lists(st.floats(0.001, 100), min_size=1, max_size=30), tokens=st.integers(1, 5000))
def test_a_step_as_slow_as_any_before_of_its_size_is_no_hang(seconds, tokens):
    clock = Clock()
    progress = started(clock)
    for taken in seconds:
        step(progress, clock, taken, tokens)
        progress.launching(decision(2, tokens))
        assert progress.limit_s >= max(30.0, 5 * max(seconds[: seconds.index(taken) + 1]))
        progress.given_up()


@given(small=st.integers(1, 100), factor=st.integers(1, 100), taken=st.floats(0.001, 50))
def test_a_larger_step_that_takes_longer_in_proportion_is_no_hang(small, factor, taken):
    clock = Clock()
    progress = started(clock)
    step(progress, clock, taken, small)
    progress.launching(decision(2, small * factor))
    assert progress.limit_s >= 2 * taken * factor


def test_a_slow_step_is_forgotten_after_many_fast_ones():
    clock = Clock()
    progress = started(clock)
    step(progress, clock, 60.0, 8)
    for _ in range(1000):
        step(progress, clock, 0.01, 8)
    progress.launching(decision(2, 8))
    assert progress.limit_s == 30.0


def test_a_given_limit_holds_for_every_step_and_the_starts_own_before():
    clock = Clock()
    progress = Progress(start_timeout_s=90.0, step_timeout_s=4.0, clock=clock)
    assert progress.limit_s == 90.0
    progress.started()
    progress.launching(decision(1, 2000))
    assert progress.limit_s == 4.0


@given(st.lists(st.tuples(st.sampled_from(["launch", "give up", "collect"]), st.integers(1, 500)), max_size=60))
def test_steps_in_flight_are_counted_and_every_change_is_progress(events):
    clock = Clock()
    progress, in_flight = started(clock), 0
    for kind, tokens in events:
        before = progress.count
        if kind == "launch":
            progress.launching(decision(1, tokens))
            in_flight += 1
        elif in_flight:
            progress.given_up() if kind == "give up" else progress.collected()
            in_flight -= 1
        else:
            progress.turned()
        assert progress.count > before
        assert ("step" in progress.doing and "tokens" in progress.doing) == (in_flight > 0)


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.booleans()), max_size=50))
def test_a_stall_is_as_long_as_the_looks_that_found_nothing_new(looks):
    clock, count, expected = Clock(), 0, 0.0
    stalled = StallClock(longest_s=1.0, clock=clock)
    stalled.look(count)
    for seconds, grows in looks:
        clock.now += seconds
        count += grows
        expected = 0.0 if grows else expected + min(1.0, seconds)
        assert abs(stalled.look(count) - expected) < 1e-6


def watch(watchdog: Watchdog, clock: Clock, seconds: float, *beats: Heartbeat):
    """Looks every tenth of a second, with the beats in even distances; the first verdict."""
    looks = round(seconds * 10)
    for number in range(looks):
        clock.now += 0.1
        if beats and number % max(1, looks // len(beats)) == 0:
            watchdog.heard(beats[min(len(beats) - 1, number * len(beats) // looks)])
        if (found := watchdog.look()) is not None:
            return found
    return None


def test_a_long_step_that_is_told_of_is_no_hang():
    clock = Clock()
    watchdog = Watchdog(start_timeout_s=60, clock=clock)
    beats = [Heartbeat("step 3", busy_s=number / 2, limit_s=30.0, stats=STATS) for number in range(50)]
    assert watch(watchdog, clock, 25.0, *beats) is None


def test_a_step_beyond_its_limit_is_a_hang_with_numbers_and_remedy():
    clock = Clock()
    watchdog = Watchdog(start_timeout_s=60, clock=clock)
    beats = [Heartbeat("step 3 of 2 sequences", busy_s=number / 2, limit_s=30.0, stats=STATS) for number in range(80)]
    text = str(watch(watchdog, clock, 40.0, *beats))
    assert "no progress for 3" in text and "30 s may pass: step 3 of 2 sequences" in text
    assert "--step-timeout-s" in text and "sign of life" not in text


def test_a_process_that_falls_silent_hangs_when_its_step_is_beyond_its_limit():
    clock = Clock()
    watchdog = Watchdog(start_timeout_s=60, clock=clock)
    watchdog.heard(Heartbeat("step 3", busy_s=2.0, limit_s=10.0, worker_pids=(7, 8), stats=STATS))
    assert watch(watchdog, clock, 7.0) is None
    text = str(watch(watchdog, clock, 4.0))
    assert "without a sign of life" in text and watchdog.worker_pids == (7, 8)


def test_a_start_without_progress_hangs_and_one_with_progress_does_not():
    clock = Clock()
    watchdog = Watchdog(start_timeout_s=5, clock=clock)
    beats = [Heartbeat(f"{number} GB read", busy_s=0.3, limit_s=5.0) for number in range(100)]
    assert watch(watchdog, clock, 50.0, *beats) is None
    assert "--start-timeout-s" in str(watch(watchdog, clock, 10.0))


def test_a_beat_of_the_start_that_comes_late_gives_no_step_the_time_of_a_start():
    clock = Clock()
    watchdog = Watchdog(start_timeout_s=600, clock=clock)
    watchdog.heard(Heartbeat("the loop", busy_s=0.0, limit_s=4.0, stats=STATS))
    watchdog.heard(Heartbeat("warm-up", busy_s=0.0, limit_s=600.0))
    assert "--step-timeout-s" in str(watch(watchdog, clock, 7.0))


def test_time_in_which_the_api_process_itself_was_stopped_is_not_the_engines_silence():
    clock = Clock()
    watchdog = Watchdog(start_timeout_s=60, clock=clock)
    watchdog.heard(Heartbeat("step 3", busy_s=0.0, limit_s=10.0, stats=STATS))
    watchdog.look()
    for _ in range(8):
        clock.now += 1000.0
        assert watchdog.look() is None
