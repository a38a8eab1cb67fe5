"""The effect of each signal on work in steps, tested with real signals to this process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

import pytest

from cskd_pipeline.runtime.signals import (
    REQUEUE,
    STOPPING,
    Requeue,
    requeue_requests,
    stop_requests,
)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def stopped_by(*numbers: int) -> None:
    with stop_requests():
        send(*numbers)
        raise KeyboardInterrupt


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_requests_a_stop_and_work_continues_until_it_stops(number: signal.Signals) -> None:
    with stop_requests() as stop:
        assert not stop.requested
        send(number)
        assert stop.requested
        assert stop.requeue == (number in REQUEUE)


@pytest.mark.parametrize("number", REQUEUE)
def test_a_schedulers_signal_is_distinguished_from_ctrl_c(number: signal.Signals) -> None:
    with pytest.raises(Requeue, match=number.name):
        stopped_by(number)
    with pytest.raises(KeyboardInterrupt):
        stopped_by(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        stopped_by(number, signal.SIGINT)


@pytest.mark.parametrize("number", REQUEUE)
def test_a_repeated_schedulers_signal_leaves_time_to_save(
    number: signal.Signals,
) -> None:
    with stop_requests() as stop:
        send(number, number)
        assert stop.requested
    with requeue_requests():
        with pytest.raises(Requeue):
            send(number)
        send(*REQUEUE)  # does not interrupt the end of the command


def test_a_second_ctrl_c_stops_at_once() -> None:
    with stop_requests():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


class Finalized:
    """Receives a signal where Python ignores exceptions."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        send(self.number)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_whose_exception_python_ignores_is_not_lost(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with requeue_requests():
        Finalized(number)
        with pytest.raises(Requeue if number in REQUEUE else KeyboardInterrupt):
            time.sleep(60)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", REQUEUE)
def test_work_that_ends_before_a_lost_signal_is_repeated_ends_well(number: signal.Signals) -> None:
    with requeue_requests():
        Finalized(number)
    time.sleep(0.3)  # without handlers, the signal would end this process


def test_another_ignored_exception_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: reported.append(lost.exc_value))
    with requeue_requests():
        Finalized(-1)
    assert isinstance(reported[0], OSError)
    assert len(reported) == 1


@pytest.mark.parametrize("number", REQUEUE)
def test_a_signal_whose_exception_a_library_swallows_stops_the_next_work(
    number: signal.Signals,
) -> None:
    with requeue_requests():
        with contextlib.suppress(BaseException):
            send(number)
        with pytest.raises(Requeue, match=number.name), stop_requests() as stop:
            stop.check()


@pytest.mark.parametrize("number", REQUEUE)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with requeue_requests(), stop_requests() as stop:
            send(number)
            assert not stop.requested
    finally:
        signal.signal(number, before)


def test_another_processs_signals_count_as_own() -> None:
    with stop_requests() as stop:
        stop.add([signal.SIGUSR1])
        assert stop.requested
        assert stop.requeue
