"""The timer of --save_every_minutes; signals and lost ranks are tested with whole runs."""

from util.train import interrupts
from util.train.interrupts import Interrupts


def test_the_timer_asks_for_a_save_once_a_period(monkeypatch):
    """Every 2 minutes, counted from the save before, late as it may be."""
    now = [1000.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    timer, saved = Interrupts(save_every_minutes=2.0), []
    try:
        for second in range(0, 500, 10):
            now[0] = 1000.0 + second
            stop, save = (False, False) if 120 <= second < 150 else timer.poll()  # a step that takes half a minute
            assert not stop
            saved += [second] * save
    finally:
        timer.close()
    assert saved == [150, 270, 390]


def test_without_the_flag_the_timer_never_asks(monkeypatch):
    timer = Interrupts()
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: 1e12)
    try:
        assert timer.poll() == (False, False)
    finally:
        timer.close()
