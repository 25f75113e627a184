"""Trainers of several libraries that take turns in one process, one step each, so that their times are paired."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
from transformers import TrainerCallback

PATIENCE = 300  # seconds


class Turns:
    """Lets several trainers in threads of their own make one step each in turn, and times the steps.

    Args:
        names: Of the trainers, in the order of their turns.
        clock: What tells seconds.
    """

    def __init__(self, names: list[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self.names, self.clock, self.now, self.condition = names, clock, 0, threading.Condition()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.notes: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        self.started = 0.0

    def wait(self, name: str) -> None:
        """Until it is one's turn."""
        with self.condition:
            if not self.condition.wait_for(lambda: self.names[self.now] == name, timeout=PATIENCE):
                raise TimeoutError(f"{name} waited {PATIENCE} s for its turn: another trainer has failed.")
            self.started = self.clock()

    def done(self, name: str, note: Callable[[], dict[str, float]]) -> None:
        """Keep the step's seconds, and what is noted of it, and let the next one step."""
        self.seconds[name].append(self.clock() - self.started)
        self.notes[name].append(note())
        with self.condition:
            self.now = (self.now + 1) % len(self.names)
            self.condition.notify_all()


class OurTurn(L.Callback):
    """Gives a Lightning trainer its turns.

    Args:
        turns: Shared by all.
        name: Of this one.
        note: What to note of a step.
    """

    def __init__(
        self, turns: Turns, name: str, note: Callable[[L.LightningModule], dict[str, float]] = lambda module: {}
    ) -> None:
        self.turns, self.name, self.note = turns, name, note

    def on_train_start(self, *_: Any) -> None:
        """Before the first step."""
        self.turns.wait(self.name)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        """Between two steps."""
        self.turns.done(self.name, partial(self.note, module))
        if trainer.global_step < trainer.max_steps:
            self.turns.wait(self.name)


class TheirTurn(TrainerCallback):
    """The same for transformers' Trainer.

    Args:
        turns: Shared by all.
        name: Of this one.
        note: What to note of a step.
    """

    def __init__(self, turns: Turns, name: str, note: Callable[[], dict[str, float]] = dict) -> None:
        self.turns, self.name, self.note = turns, name, note

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first step."""
        self.turns.wait(self.name)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Between two steps."""
        self.turns.done(self.name, self.note)
        if state.global_step < state.max_steps:
            self.turns.wait(self.name)


def take_turns(turns: Turns, work: dict[str, Callable[[], Any]]) -> None:
    """Call every trainer's work, each in a thread of its own, the last in this one."""
    *others, last = turns.names
    threads = [threading.Thread(target=work[name], daemon=True) for name in others]
    for thread in threads:
        thread.start()
    work[last]()
    for thread in threads:
        thread.join()
