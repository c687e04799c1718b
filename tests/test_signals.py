"""When a signal ends a run."""

from __future__ import annotations

import signal

import pytest

from rlhf_cli.errors import Stopped
from rlhf_cli.signals import StopSignals
from tests.tiny import own_signals


def test_a_deferred_signal_is_obeyed_at_the_next_pause_of_a_rank_that_is_alone() -> None:
    signals = StopSignals()
    with own_signals():
        signals.install()
        signals.defer(alone=True)
        signals.pause()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as stopped:
            signals.pause()
    assert (stopped.value.number, stopped.value.exit_code) == (signal.SIGTERM, 143)


def test_one_of_several_ranks_never_stops_at_a_pause() -> None:
    """The others would wait for it in their next collective; the loop asks all of them between two updates."""
    signals = StopSignals()
    with own_signals():
        signals.install()
        signals.defer(alone=False)
        signal.raise_signal(signal.SIGTERM)
        signals.pause()
    assert signals.received == signal.SIGTERM


@pytest.mark.parametrize("outlives", [False, True])
def test_a_closed_terminal_stops_a_run_unless_it_is_to_outlive_it(outlives: bool) -> None:
    """As SIGTERM does; what nohup began goes on."""
    with own_signals():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if outlives else signal.SIG_DFL)
        signals = StopSignals()
        signals.install()
        if outlives:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received is None
        else:
            with pytest.raises(Stopped, match=r"^stopped by SIGTERM ") as stopped:
                signal.raise_signal(signal.SIGHUP)
            assert stopped.value.exit_code == 143
