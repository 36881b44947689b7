"""Time cut into parts, on the host's clock and on a device's."""

import random

import pytest
import torch

from trainwright.profiling import breakdown
from trainwright.profiling.breakdown import DeviceTimeline, HostTimeline, TimeBreakdown, timeline_for
from trainwright.profiling.phases import PHASES, Profilers


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


class Device:
    """A queue of events with the times at which the device passes them; `done_until` is how far it has come."""

    def __init__(self, clock):
        self.clock, self.done_until, self.num_made = clock, float("inf"), 0

    def new_event(self):
        self.num_made += 1
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.passed_at = self.device.clock.now

    def query(self):
        return self.passed_at <= self.device.done_until

    def elapsed_time(self, later):
        assert later.query(), "reading an event that the device has not passed would wait for it"
        return 1000 * (later.passed_at - self.passed_at)


def expected(**seconds):
    return {part: seconds.get(part, 0.0) for part in PHASES}


@pytest.fixture(params=["host", "device"])
def timed(request):
    """(clock, timeline) of either kind, with a device that has always done all its work."""
    clock = Clock()
    return clock, HostTimeline(clock) if request.param == "host" else DeviceTimeline(Device(clock).new_event)


def test_a_part_inside_another_interrupts_it(timed):
    clock, timeline = timed
    parts = TimeBreakdown(timeline, in_log_lines=True)
    inner = parts.span("backward", lambda: clock.passes(4))

    def outer(answer):
        clock.passes(1)
        inner()
        clock.passes(2)
        return answer

    assert parts.span("forward", outer)("result") == "result"
    clock.passes(8)
    timeline.flush()
    assert timeline.seconds == expected(forward=3, backward=4, other=8)


def test_a_part_that_raises_ends_all_the_same(timed):
    clock, timeline = timed

    def fail():
        clock.passes(1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        TimeBreakdown(timeline, in_log_lines=True).span("data", fail)()
    clock.passes(2)
    timeline.flush()
    assert timeline.seconds == expected(data=1, other=2)


def test_lines_hold_what_came_since_the_last_and_the_total_holds_all(timed):
    clock, timeline = timed
    parts = TimeBreakdown(timeline, in_log_lines=True)
    work = parts.span("optimizer", clock.passes)
    work(1)
    assert parts.line() == {f"time_{part}_s": value for part, value in expected(optimizer=1).items()}
    work(2)
    clock.passes(4)
    assert parts.line() == {f"time_{part}_s": value for part, value in expected(optimizer=2, other=4).items()}
    assert parts.total() == {f"train_time_{part}_s": value for part, value in expected(optimizer=3, other=4).items()}


def test_the_parts_add_up_to_the_time_that_passed(timed):
    clock, timeline = timed
    parts, generator = TimeBreakdown(timeline, in_log_lines=False), random.Random(0)

    def nested(depth):
        clock.passes(generator.random())
        if depth:
            parts.span(generator.choice(PHASES), nested)(depth - 1)
        clock.passes(generator.random())

    for _ in range(200):
        nested(generator.randrange(4))
    assert sum(parts.total().values()) == pytest.approx(clock.now, abs=1e-5)


def test_what_the_device_has_not_done_yet_comes_with_a_later_line_and_nothing_waits():
    clock = Clock()
    device = Device(clock)
    parts = TimeBreakdown(DeviceTimeline(device.new_event), in_log_lines=True)
    work = parts.span("forward", clock.passes)
    work(1)
    device.done_until = clock.now
    work(2)
    assert parts.line()["time_forward_s"] == 1
    device.done_until = float("inf")
    assert parts.line()["time_forward_s"] == 2


def test_events_are_used_again_and_their_number_is_bounded_without_log_lines(monkeypatch):
    monkeypatch.setattr(breakdown, "MOST_PENDING", 16)
    clock = Clock()
    device = Device(clock)
    timeline = DeviceTimeline(device.new_event)
    work = TimeBreakdown(timeline, in_log_lines=False).span("forward", clock.passes)
    for _ in range(1000):
        work(1)
    timeline.flush()
    assert timeline.seconds == expected(forward=1000)
    assert device.num_made <= 16 + 1


def test_a_cpu_has_the_clock_of_the_host_and_a_gpu_events_of_its_own(monkeypatch):
    made = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: made.append(enable_timing) or Event(Device(Clock())))
    assert isinstance(timeline_for(torch.device("cpu")), HostTimeline) and not made
    assert isinstance(timeline_for(torch.device("cuda")), DeviceTimeline) and made == [True]


def test_without_watchers_a_function_stays_itself():
    def function():
        """Nothing."""

    assert Profilers().span("data", function) is function
    assert Profilers(None).span("data", function) is function
    assert TimeBreakdown.for_run(False, torch.device("cpu")) is None
