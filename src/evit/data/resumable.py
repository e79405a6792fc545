"""Loaders that go on in the middle of an epoch, and know how long they were waited for."""

import time
from collections.abc import Generator, Iterator
from typing import Any


class Resumable:
    """An iterable of batches whose position Lightning saves in checkpoints, and restores.

    position is the number of batches of this epoch that have been given out, waited the seconds
    that whoever asked for them has waited, since the loader was made.
    """

    position = 0
    waited = 0.0
    _start = 0

    def batches(self, start: int) -> Generator[Any]:
        """The batches of an epoch from number `start` on."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        # As this is a generator, nothing is read before the first batch is asked for: Lightning
        # also asks for iterators that it does not use, and for others before it sets the epoch.
        self.position, self._start = self._start, 0
        batches = self.batches(self.position)
        try:
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                self.waited += time.perf_counter() - asked
                if batch is None:
                    return
                self.position += 1
                yield batch
        finally:
            batches.close()

    def state_dict(self) -> dict[str, int]:
        return dict(position=self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration, and no later one, at the batch after the last one seen."""
        self._start = state["position"] % len(self)  # type: ignore[arg-type]
