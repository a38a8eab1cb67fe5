"""The effect of each signal on work in steps, tested with real signals to this process."""

from __future__ import annotations

import os
import signal

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
