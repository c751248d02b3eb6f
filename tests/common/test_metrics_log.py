"""What a progress bar shows and logs, on a clock of the test's own."""

import pytest

from saex_pipe.common import metrics_log
from saex_pipe.common.metrics_log import Progress


class Log:
    def __init__(self):
        self.events = []

    def event(self, **values):
        self.events.append(values)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics_log.time, "monotonic", lambda: now[0])
    return now


def test_share_of_the_time_that_was_spent_waiting(clock):
    log, shown = Log(), []
    bar = Progress("training", 1000, "rows", 0, log, lambda done, note: shown.append(note))
    clock[0] += 2.0
    bar.advance(100, waiting_seconds=0.5, loss=0.25)
    assert log.events[-1]["waiting_share"] == 0.25
    assert log.events[-1]["rows_per_second"] == 50.0
    assert shown == ["50 rows/s, 25% waiting for input loss=0.25"]
    clock[0] += 2.0
    bar.advance(100)
    assert log.events[-1]["waiting_share"] == 0.125
    assert shown[-1] == "50 rows/s, 12% waiting for input loss=0.25", "the last terms stay"


def test_short_work_has_a_curve_all_the_same(clock):
    log = Log()
    bar = Progress("training", 1000, "rows", 0, log, lambda done, note: None)
    for step in range(1000):
        bar.advance(1, **({"loss": 1.0} if step % 2 else {}))
    assert [event["rows"] for event in log.events[:3]] == [6, 12, 18], "one in 200, where there are terms"
    assert log.events[-1]["rows"] == 1000


def test_work_without_terms_is_logged_by_time_alone(clock):
    log = Log()
    bar = Progress("reading", 1000, "rows", 0, log, lambda done, note: None)
    for _ in range(999):
        bar.advance(1)
    assert log.events == []
    clock[0] += 1.5
    bar.advance(1)
    assert [event["rows"] for event in log.events] == [1000]
