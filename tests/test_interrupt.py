"""What a signal asks for, and when it is heeded."""

import os
import signal

import pytest

import diffusion_grpo.interrupt as interrupt
from diffusion_grpo import cli
from diffusion_grpo.errors import Preempted
from diffusion_grpo.interrupt import StopNow, StopRequest


def test_a_signal_that_comes_while_processes_agree_is_heeded_the_next_time(monkeypatch):
    def exchange(said, what):
        if not said[0]:  # after this process has told the others that nobody asked it
            os.kill(os.getpid(), signal.SIGTERM)
        return [said, [False, False]]

    monkeypatch.setattr(interrupt, "exchange", exchange)
    with StopRequest() as stop:
        assert not stop.agreed()
        with pytest.raises(StopNow) as raised:
            stop.check()
    assert isinstance(raised.value.request.stopped("the command"), Preempted)


def test_what_one_process_is_asked_all_learn(monkeypatch):
    monkeypatch.setattr(interrupt, "exchange", lambda said, what: [said, [True, False]])
    with StopRequest() as stop:
        assert stop.agreed() and stop.requested and not stop.preempted


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def stopped(words):
        raise KeyboardInterrupt("stopped; go on with: diffusion-grpo train --resume runs/x")

    monkeypatch.setattr(cli, "_train", stopped)
    assert cli.main(["train"]) == 130
    assert "go on with: diffusion-grpo train --resume runs/x" in capsys.readouterr().err
