"""The data loader: batches in the main process, with an account of what was left out."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from avar_lightning.data.order import Progress, num_batches
from avar_lightning.data.reader import Delivery, ShardReader, Task

log = logging.getLogger(__name__)

PRODUCT = "batch_size × processes"
MIN_SEEN = 20  # a share of bad samples is judged as if at least this many had been seen


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the run accepts."""


@dataclass(frozen=True)
class Time:
    """What a trainer knows of its training.

    Attributes:
        batches: That were trained in this epoch.
        limit: After which it ends the epoch.
        recount: Tells it another number of batches that were trained in this epoch.
    """

    batches: int
    limit: float
    recount: Callable[[int], None] = lambda batches: None


class ShardLoader:
    """Iterate the batches of a :class:`ShardReader`, and keep account of what was left out.

    It is what Lightning takes for a data loader: it has a length where the shards' sizes are known, follows
    Lightning's epochs through ``batch_sampler.sampler.set_epoch``, and resumes in the middle of an epoch from its
    ``state_dict``.

    Args:
        reader: Where batches come from.
        clock: What the trainer knows of its training; without it, what was delivered counts as trained.
        num_workers: Processes that read; 0 reads in this one.
        max_bad_fraction: Most samples that may be bad, as a share of those read.
        pin_memory: Copy batches to page-locked memory.
        name: Of the data set, for messages.

    Attributes:
        counts: Samples ``seen`` so far by this rank, and of those ``bad`` and ``too_long``.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        clock: Callable[[], Time | None] | None = None,
        num_workers: int = 0,
        max_bad_fraction: float = 0.05,
        pin_memory: bool = False,
        name: str = "data",
    ) -> None:
        self.reader, self.max_bad_fraction, self.name = reader, max_bad_fraction, name
        self.counts = {"seen": 0, "bad": 0, "too_long": 0}
        self._said: set[str] = set()
        self._clock = clock or (lambda: None)
        self._plan = _Plan(reader)
        # Number in the epoch of the batches that were delivered last, and the progress after each.
        self._delivered: deque[tuple[int, Progress]] = deque([(0, Progress())], maxlen=4)
        # One of the two places where Lightning looks for `set_epoch`; a `sampler` would have to be a real one.
        self.batch_sampler = SimpleNamespace(sampler=self._plan)
        self._loader: DataLoader[Delivery] = DataLoader(
            reader,
            batch_size=None,
            sampler=self._plan,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._plan.set_epoch(epoch)

    def close(self) -> None:
        """Let the workers end."""
        # Collected in a cycle instead, torch would wait five seconds for each: their queues are closed before they are
        # told to end.
        self._loader._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """Position in the data after the batches that were trained, over all processes."""
        time = self._clock()
        number, progress = self._delivered[-1]
        if time is not None:
            # A batch may have been delivered ahead, or be in a step that is not over.
            trained = (each for each in reversed(self._delivered) if each[0] <= time.batches)
            number, progress = next(trained, self._delivered[0])
        if self._plan.is_last(progress) or (time is not None and number == time.batches >= time.limit):
            number, progress = 0, Progress(progress.epoch + 1)
        return {**asdict(progress), "batches": number, "order": self.reader.order_key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where ``state_dict`` was taken: the next iteration reads on, later ones follow from there.

        Batches may be larger or smaller now, and processes more or fewer: the position is one in samples, and the
        trainer, which counts batches, is told how many of today's size it stands for.

        Raises:
            ValueError: The state belongs to other data, or another order of it.
        """
        theirs, ours = dict(state.get("order") or {}), dict(self.reader.order_key)
        before, now = theirs.pop(PRODUCT, None), ours.pop(PRODUCT)
        if theirs != ours:
            changed = (
                f"{name} {theirs.get(name)!r}, now {ours[name]!r}" for name in ours if theirs.get(name) != ours[name]
            )
            raise ValueError(
                f"the checkpoint's position in the {self.name} data was taken with {'; '.join(changed)}: restore that, "
                "or start a new run from the exported weights (--model.init_args.vlm.pretrained) without --ckpt_path"
            )
        start = Progress(state["epoch"], state["position"], tuple(state["pending"]))
        number = state["batches"]
        if before not in (None, now):
            start, number = self._recounted(start, number)
            rank_zero_info(
                f"The {self.name} data go on with sample {start.position - len(start.pending)} of epoch {start.epoch}, "
                f"in batches of {now} over all processes, {before} before."
            )
        self._plan.go_on(start)
        self._restart(number, start)

    def _recounted(self, start: Progress, number: int) -> tuple[Progress, int]:
        """The same position, and the number of batches of today's size before it; of a finished epoch the next one."""
        time, reader = self._clock(), self.reader
        size, dealt = reader.batch_size * reader.world_size, start.position - len(start.pending)
        if reader.total is None:
            return start, dealt // size
        whole = num_batches(reader.total, size, drop_last=reader.drop_last)
        counted = whole - num_batches(reader.total - dealt, size, drop_last=reader.drop_last)
        over = time is not None and time.batches > 0 and number == 0  # Lightning is at the end, and we at a start
        if time is not None:
            limit = int(min(whole, time.limit))
            time.recount(limit if over else min(counted, limit))
            if not over and counted >= limit:
                return Progress(start.epoch + 1), 0
        return start, counted

    def __len__(self) -> int:
        if self.reader.num_batches is None:
            raise TypeError(f"the {self.name} shards are of unknown size: give a manifest.json with sample counts")
        return self.reader.num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number, time = self._delivered[-1][0] if self._plan.start is not None else 0, self._clock()
        if self._plan.start is None and time is not None and time.batches:
            raise ValueError(
                f"the checkpoint was saved after {time.batches} batches of an epoch, and the {self.name} data were not "
                "given their position: it is of other data, or configure_optimizers had them set up too early; resume "
                "from the end of an epoch, or start anew from the exported weights without --ckpt_path"
            )
        self._plan.begin()
        begun = progress = self._plan.begun
        self._restart(number, begun)
        for delivery in self._loader:
            progress = self._plan.ahead.popleft()
            self._account(delivery, final=self._plan.is_last(progress))
            if delivery.batch is not None:
                number += 1
                self._delivered.append((number, progress))
                yield delivery.batch
        self._account(Delivery(), final=True)
        if begun == Progress(begun.epoch) and number == 0:
            raise TooManyBadSamples(self._message("no sample can be used"))
        self._restart(0, Progress(progress.epoch + 1))

    def _restart(self, number: int, progress: Progress) -> None:
        self._delivered.clear()
        self._delivered.append((number, progress))

    def _account(self, delivery: Delivery, *, final: bool) -> None:
        """Count and report, and stop the run when too much is bad."""
        self.counts["seen"] += delivery.seen
        self.counts["bad"] += len(delivery.bad)
        self.counts["too_long"] += len(delivery.too_long)
        for message in delivery.bad:
            self._say_once(f"skipped a bad sample: {message}")
        if delivery.too_long:
            self._say_once(f"dropped a sample whole: {delivery.too_long[0]}; others like it are only counted", "long")
        if delivery.failure:
            raise TooManyBadSamples(self._message(delivery.failure))
        judged = self.counts["seen"] if final else max(self.counts["seen"], MIN_SEEN)
        if self.counts["bad"] > self.max_bad_fraction * judged:
            raise TooManyBadSamples(self._message(delivery.bad[-1] if delivery.bad else "see the log"))

    def _say_once(self, message: str, topic: str = "") -> None:
        if (topic or message) not in self._said:
            self._said.add(topic or message)
            log.warning("%s: %s", self.name, message)

    def _message(self, reason: str) -> str:
        return (
            f"{self.name}: of {self.counts['seen']} samples read {self.counts['bad']} are bad "
            f"(max_bad_fraction {self.max_bad_fraction}) and {self.counts['too_long']} over max_length; "
            f"last: {reason}; mend the shards or raise the limits"
        )


class _Plan:
    """The batches to make, as the sampler of a `DataLoader`; without a reference to the loader, so that no cycle
    keeps its workers.

    Attributes:
        start: Where the next iteration goes on; from the beginning of its epoch when unset.
        begun: Where the current iteration began.
        ahead: Progress after each batch that was handed to a worker and is not delivered yet.
    """

    def __init__(self, reader: ShardReader) -> None:
        self.reader = reader
        self.start: Progress | None = None
        self.begun = Progress()
        self.ahead: deque[Progress] = deque()
        self._given: int | None = None  # Lightning's number of the epoch, once it was told since a position was loaded
        self._shift: int | None = 0  # from there to ours
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        if self._shift is None:
            self._shift = self._epoch - epoch
        self._given, self._epoch = epoch, epoch + self._shift

    def go_on(self, start: Progress) -> None:
        """Begin the next iteration there."""
        self.start, self._given = start, None

    def begin(self) -> None:
        """Settle where the next iteration begins."""
        if self.start is not None:
            # Lightning counts a stopped epoch as finished, or twice; the state knows which epoch comes next. Where a
            # batch is fetched ahead, it is asked for before its epoch is told.
            self._epoch = self.start.epoch
            self._shift = None if self._given is None else self._epoch - self._given
        self.begun, self.start = self.start or Progress(self._epoch), None

    def is_last(self, progress: Progress) -> bool:
        """Whether no batch of its epoch comes after it."""
        if self.reader.total is None:
            return False
        left = self.reader.total - progress.position + len(progress.pending)
        return left < (self.reader.batch_size * self.reader.world_size if self.reader.drop_last else 1)

    def __iter__(self) -> Iterator[Task]:
        self.ahead.clear()
        for task, progress in self.reader.tasks(self.begun):
            self.ahead.append(progress)
            yield task


def _as_it_is(delivery: Delivery) -> Delivery:
    return delivery
