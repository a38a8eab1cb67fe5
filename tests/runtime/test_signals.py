"""The effect of each signal on work in steps, tested with real signals to this process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cskd_pipeline.runtime import signals
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
        signal.raise_signal(self.number)


class Unblocked:
    """Receives all blocked signals at once where Python ignores exceptions."""

    def __del__(self) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUEUE)


def in_a_command(receive: Callable[[], object]) -> None:
    with requeue_requests():
        receive()
        time.sleep(60)


@pytest.fixture
def _ctrl_c_raises() -> Iterator[None]:
    """Also if the tests run in the background, where shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_raises")
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_whose_exception_python_ignores_is_not_lost(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    error = Requeue if number in REQUEUE else KeyboardInterrupt
    with pytest.raises(error):
        in_a_command(lambda: Finalized(number))
    assert capsys.readouterr().err == ""


def test_no_signal_is_lost_with_another(capsys: pytest.CaptureFixture[str]) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUEUE)
    signal.raise_signal(signal.SIGHUP)  # to this thread, which blocks it
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Requeue, match="SIGHUP, SIGTERM"):
        in_a_command(Unblocked)
    assert capsys.readouterr().err == ""


def test_a_signal_is_not_sent_again_after_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without handlers, it would end the process."""
    monkeypatch.setattr(signals, "_SEND_AGAIN", 60)
    with requeue_requests():
        Finalized(signal.SIGTERM)
        assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


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
