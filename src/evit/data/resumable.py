"""Loaders that go on in the middle of an epoch, and know how long they were waited for."""

import time
from collections.abc import Generator, Iterator
from typing import Any

import torch


def empty_batch(img_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process evaluates that has no image of its own: Lightning needs a batch of each."""
    images = torch.zeros(0, 3, img_size, img_size, dtype=torch.uint8, device=device)
    return images, torch.zeros(0, dtype=torch.int64, device=device)


class Resumable:
    """An iterable of batches whose position Lightning saves in checkpoints, and restores.

    position is the number of batches of this epoch that have been given out, waited the seconds
    that whoever asked for them has waited, since the loader was made.
    """

    position = 0
    waited = 0.0
    _start = 0

    def batches(self, start: int) -> Generator[Any]:
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
        return dict(position=self.position, length=len(self))  # type: ignore[arg-type]

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration, and no later one, at the batch after the last one seen."""
        length: int = len(self)  # type: ignore[arg-type]
        self._start = state["position"] % state["length"]
        if self._start and length != state["length"]:
            raise ValueError(
                f"the checkpoint is from within an epoch of {state['length']} batches for each "
                f"process, which has {length} now: go on with as many processes as before, or from "
                f"the end of an epoch (checkpoints/previous.ckpt may be one), or overwrite=true"
            )
