"""The data loader: batches in the main process, with an account of what was left out."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from avar_lightning.data.reader import Delivery, ShardReader

log = logging.getLogger(__name__)

MIN_SEEN = 20  # a share of bad samples is judged as if at least this many had been seen


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the run accepts."""


class ShardLoader:
    """Iterate the batches of a :class:`ShardReader`, and keep account of what was left out.

    It is what Lightning takes for a data loader: it has a length where the shards' sizes are known, follows
    Lightning's epochs through ``batch_sampler.sampler.set_epoch``, and resumes in the middle of an epoch from its
    ``state_dict``.

    Args:
        reader: Where batches come from.
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
        num_workers: int = 0,
        max_bad_fraction: float = 0.05,
        pin_memory: bool = False,
        name: str = "data",
    ) -> None:
        self.reader, self.max_bad_fraction, self.name = reader, max_bad_fraction, name
        self.counts = {"seen": 0, "bad": 0, "too_long": 0}
        self._said: set[str] = set()
        self._delivered, self._complete = 0, False  # of the current iteration
        self._resume: dict[str, int] = {}
        self._epochs = _Epochs(reader.epoch)
        # One of the two places where Lightning looks for `set_epoch`; a `sampler` would have to be a real one.
        self.batch_sampler = SimpleNamespace(sampler=self._epochs)
        self._loader: DataLoader[Delivery] = DataLoader(
            reader,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            collate_fn=_as_it_is,  # type: ignore[arg-type]
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self._epochs.set_epoch(epoch)

    def close(self) -> None:
        """Let the workers end."""
        # Collected in a cycle instead, torch would wait five seconds for each: their queues are closed before they are
        # told to end.
        self._loader._iterator = None

    def state_dict(self) -> dict[str, int]:
        """Position in the data: the epoch, and the batches delivered in it."""
        complete = self._complete or self._delivered == self.reader.num_batches
        epoch = int(self.reader.epoch)
        return {"epoch": epoch + 1, "batches": 0} if complete else {"epoch": epoch, "batches": self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where ``state_dict`` was taken: the next iteration reads on, later ones follow from there."""
        self._resume = dict(state)

    def __len__(self) -> int:
        if self.reader.num_batches is None:
            raise TypeError(f"the {self.name} shards are of unknown size: give a manifest.json with sample counts")
        return self.reader.num_batches

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skip = 0
        if self._resume:
            # Lightning counts a stopped epoch as finished, or twice; the state knows which epoch comes next.
            self._epochs.shift += self._resume["epoch"] - int(self.reader.epoch)
            self.reader.epoch.fill_(self._resume["epoch"])
            skip = self._resume["batches"]
            self._resume = {}
        self._delivered, self._complete = 0, False
        for delivery in self._loader:
            self._delivered += delivery.batch is not None
            last = delivery.batch is not None and self._delivered == self.reader.num_batches
            self._account(delivery, final=last)
            if delivery.batch is not None and self._delivered > skip:
                yield delivery.batch
        self._account(Delivery(), final=True)
        self._complete = True
        if self._delivered == 0:
            raise TooManyBadSamples(self._message("no sample can be used"))

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


class _Epochs:
    """Sets the reader's epoch; without a reference to the loader, so that no cycle keeps its workers."""

    def __init__(self, epoch: Tensor) -> None:
        self.epoch = epoch
        self.shift = 0  # from Lightning's count of epochs to ours

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch + self.shift)


def _as_it_is(delivery: Delivery) -> Delivery:
    return delivery
