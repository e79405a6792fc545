"""Real damage to whole .beton files: each is refused, or shows its images under their own labels.

Files are read in another process, as one that crashes or hangs is the worst that can be found.
"""

import os
import shutil
import signal
import threading
import zlib
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from evit.data import ffcv as beton
from evit.data.ffcv import BetonError, sidecar_path
from evit.data.ffcv.write import write_beton
from tests.conftest import FORKS
from tests.data.build import stream

CLASSES = ["a", "b", "c"]
COUNT = 24
TIMEOUT = 120  # seconds for one file, the first of which waits for the compiler


def labels_of(k):
    return k % len(CLASSES)


def flip(content, start, end, rng):
    """Change one to eight bytes from start to end."""
    for place in rng.integers(start, end, rng.integers(1, 9)):
        content[place] ^= rng.integers(1, 256)


class Parts:
    """Where the parts of a file lie."""

    def __init__(self, content):
        header = np.frombuffer(content, beton.HEADER, 1)[0]
        self.table = int(header["alloc_table_ptr"])
        self.allocations = np.frombuffer(content, beton.ALLOCATION, offset=self.table)
        self.metadata = beton.HEADER.itemsize + int(header["num_fields"]) * beton.FIELD.itemsize
        pieces = int(header["num_fields"]) - 1
        _, records = beton.layout((1, 1) if pieces == 2 else None)
        self.records = np.frombuffer(content, records, COUNT, self.metadata)
        self.images = self.allocations[::pieces]
        self.label_maps = self.allocations[1::2] if pieces == 2 else None
        self.data = int(self.allocations["ptr"].min())


def index(content, rng):
    """The header, the fields, the metadata or the allocation table."""
    parts = Parts(content)
    edges = 0, beton.HEADER.itemsize, parts.metadata, parts.metadata + parts.records.nbytes
    regions = [*zip(edges, edges[1:], strict=False), (parts.table, len(content))]
    flip(content, *regions[rng.integers(4)], rng)


def cut(content, rng):
    del content[rng.integers(1, len(content)) :]


def swap_labels(content, rng):
    """The labels of two samples of different classes change places."""
    labels, k = Parts(content).records["f1"], rng.integers(COUNT - 1)
    labels[[k, k + 1]] = labels[[k + 1, k]]


def blank(content, rng):
    """A block of the disk reads as zeros: of the index, as it is long enough to reach into it."""
    start = rng.integers(0, Parts(content).metadata)
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))


def images(content, rng):
    """Any bytes of one image."""
    ptr, size = Parts(content).images[["ptr", "size"]][rng.integers(COUNT)].tolist()
    flip(content, ptr, ptr + size, rng)


def image_tail(content, rng):
    """What a JPEG loses when the disk does: the end of its data."""
    ptr, size = Parts(content).images[["ptr", "size"]][rng.integers(COUNT)].tolist()
    lost = int(rng.integers(1, size))
    content[ptr + size - lost : ptr + size] = bytes(lost)


def image_size(content, rng):
    """A JPEG that says another size than the file's metadata."""
    ptr = int(Parts(content).images["ptr"][rng.integers(COUNT)])
    place = content.index(b"\xff\xc0", ptr) + 5
    content[place : place + 4] = rng.integers(1, 2**16, 2, np.uint16).byteswap().tobytes()


def label_maps(content, rng):
    """Class numbers that are none."""
    maps = Parts(content).label_maps
    if maps is not None:
        ptr, size = maps[["ptr", "size"]][rng.integers(COUNT)].tolist()
        place = ptr + size // 2 + 2 * int(rng.integers(size // 4))
        content[place : place + 2] = np.float16(rng.integers(3, 2000)).tobytes()


def sidecar(text, rng):
    flip(text, 0, len(text), rng)


def cut_sidecar(text, rng):
    del text[rng.integers(0, len(text)) :]


REFUSED = index, cut, swap_labels, blank, image_size, label_maps
OF_IMAGES = images, image_tail
OF_SIDECARS = sidecar, cut_sidecar
KINDS = REFUSED + OF_IMAGES + OF_SIDECARS


def read_all(connection: Connection) -> None:
    """Of each path that comes: a message, or the labels and pictures that are shown of each sample,
    in training and then in evaluation."""
    options = dict(img_size=16, batch_size=8, num_workers=2)
    while path := connection.recv():
        try:
            shown = []
            for train in True, False:
                one = stream(path, train, **options)
                batches = [batch[:2] for batch in one]
                pictures = [zlib.crc32(image.numpy().tobytes()) for x, _ in batches for image in x]
                labels = torch.cat([y for _, y in batches]).tolist()
                samples = one.samples().tolist()
                said = zip(labels, pictures, strict=True)
                shown.append(dict(zip(samples, said, strict=True)))
            connection.send(shown)
        except ValueError as error:
            connection.send(str(error))


@pytest.fixture(scope="module")
def read():
    """What read_all says of a path; an assertion where that process dies or hangs."""
    ours, theirs = FORKS.Pipe()
    child = FORKS.Process(target=read_all, args=(theirs,), daemon=True)
    child.start()
    theirs.close()

    def ask(path):
        ours.send(str(path))
        assert ours.poll(TIMEOUT), f"{path}: reading it hangs"
        try:
            return ours.recv()
        except EOFError:
            child.join()
            pytest.fail(f"{path}: reading it ended the process ({child.exitcode})")

    yield ask
    ours.send(None)
    child.join()


@pytest.fixture(scope="module", params=["images", "images and label maps"])
def whole(request, picture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    samples, maps = [], []
    for k in range(COUNT):
        rng = np.random.default_rng(k)
        picture(k, *rng.integers(20, 60, 2).tolist()).save(folder / f"{k}.jpg", quality=95)
        samples.append((folder / f"{k}.jpg", labels_of(k)))
        label_map = [rng.normal(0, 4, (5, 3, 4)), rng.integers(0, 3, (5, 3, 4))]
        torch.save(torch.tensor(np.stack(label_map)).half(), folder / f"{k}.pt")
        maps.append(folder / f"{k}.pt")
    options = dict(label_maps=maps) if "maps" in request.param else {}
    path = folder / "x.beton"
    write_beton(path, samples, classes=CLASSES, source="test", num_workers=1, **options)
    return path


@pytest.fixture(scope="module")
def truth(read, whole):
    found = read(whole)
    assert not isinstance(found, str), found
    train, val = found
    assert {k: label for k, (label, _) in val.items()} == {k: labels_of(k) for k in range(COUNT)}
    assert train.keys() == val.keys()
    return train, val


def damaged(whole, folder, kind, seed):
    """A copy of the file, and whether its bytes differ."""
    folder.mkdir()
    for path in whole, sidecar_path(whole):
        shutil.copy(path, folder)
    path = folder / whole.name
    target = sidecar_path(path) if kind in OF_SIDECARS else path
    content = bytearray(target.read_bytes())
    before = bytes(content)
    kind(content, np.random.default_rng((seed, KINDS.index(kind))))
    target.write_bytes(content)
    return path, content != before


def is_refused(path, read, truth, at_most):
    """Whether it is, once what is said, or shown, is right; `at_most` pictures may differ."""
    found = read(path)
    if isinstance(found, str):
        assert found.startswith(f"{path}: "), found
        assert found.endswith("; delete it and prepare the data again"), found
        return True
    for shown, right in zip(found, truth, strict=True):
        assert {k: s[0] for k, s in shown.items()} == {k: s[0] for k, s in right.items()}, path
        assert sum(shown[k] != right[k] for k in right) <= at_most, path
    return False


def try_kinds(kinds, seeds, whole, read, truth, folder):
    for kind in kinds:
        for seed in seeds:
            path, changed = damaged(whole, folder / f"{kind.__name__}-{seed}", kind, seed)
            refused = is_refused(path, read, truth, at_most=1 if kind in OF_IMAGES else 0)
            assert refused or not (changed and kind in REFUSED), path


def test_a_damaged_beton_is_refused_or_shows_its_images_with_their_labels(
    whole, read, truth, tmp_path
):
    try_kinds(KINDS, range(5), whole, read, truth, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_kind_of_damage_a_hundred_times(kind, whole, read, truth, tmp_path):
    try_kinds([kind], range(5, 105), whole, read, truth, tmp_path)


def test_a_file_that_is_written_anew_later_is_not_seen(copied, samples):
    one, other = stream(copied, False, img_size=16), stream(copied, False, img_size=16)
    before = [labels.tolist() for _, labels in one]
    write_beton(copied, samples[:40], classes=CLASSES, source="test", num_workers=1)
    for again in one, other:
        assert [labels.tolist() for _, labels in again] == before


@pytest.mark.parametrize("train", [True, False])
def test_a_damaged_image_ends_each_epoch_at_once_and_leaves_no_thread(whole, tmp_path, train):
    path, _ = damaged(whole, tmp_path / "x", image_size, 0)
    one = stream(path, train, img_size=16, batch_size=4, num_workers=2)
    k = np.random.default_rng((0, KINDS.index(image_size))).integers(COUNT)  # as it has drawn it
    threads = threading.active_count()
    for _ in range(3):
        with pytest.raises(BetonError, match=f"the JPEG of sample {k} is damaged"):
            list(one)
        assert threading.active_count() == threads


def cut_while_reading(path: str) -> None:
    for _ in stream(path, False, img_size=16, batch_size=4, num_workers=1):
        os.truncate(path, 4096)


def test_a_file_that_is_cut_while_it_is_read_ends_the_process(copied):
    child = FORKS.Process(target=cut_while_reading, args=(copied,))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == -signal.SIGBUS
