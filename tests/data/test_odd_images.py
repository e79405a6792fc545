"""Folders as people have them: odd images are read as Pillow reads them, what is no image is named,
in both backends alike."""

import ctypes
import gc
import os
import shutil
import signal
import socket
import struct
import zlib
from contextlib import contextmanager
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms import v2 as T

from evit.commands.prepare import prepare
from evit.data.ffcv import BetonError, open_beton
from evit.data.folders import class_samples, cut_long, image_files, to_rgb
from evit.data.imagefolder import evaluation_transform
from tests.conftest import write_photos
from tests.data import build

SIZE = 28
OPTIONS = dict(img_size=SIZE, batch_size=4, crop_pct=1.0, num_workers=1)
BACKENDS = ["ffcv", "imagefolder"]


@pytest.fixture(autouse=True)
def nothing_hangs():
    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    gc.collect()  # loaders, and so their workers, that an error refers to


def gif(image, path):
    """Two pictures in a file, of which the first counts."""
    image.quantize(16).save(path, "GIF", save_all=True, append_images=[image.rotate(180)])


def wide(image, path):
    image.resize((20_000, 200), Image.Resampling.BICUBIC).save(path)


def rotated(image, path):
    exif = Image.Exif()
    exif[274] = 6  # Orientation: to be turned by 90 degrees
    image.save(path, exif=exif, quality=95)


def transparent(image, path):
    image.quantize(16).save(path, transparency=bytes(range(16)))


def deep(image, path):
    gray = np.asarray(image.convert("L")).astype(np.uint16)
    Image.fromarray(gray * 257).save(path)


def link(image, path):
    target = os.path.join(os.path.dirname(path), ".target")
    image.save(target, "PNG")
    os.symlink(target, path)


READABLE = {
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path, quality=95),
    "gray.jpg": lambda image, path: image.convert("L").save(path, quality=95),
    "progressive.JPEG": lambda image, path: image.save(path, progressive=True),
    "rotated.jpg": rotated,
    "palette.png": lambda image, path: image.quantize(16).save(path),
    "transparent palette.png": transparent,
    "rgba.png": lambda image, path: image.convert("RGBA").save(path),
    "gray and alpha.png": lambda image, path: image.convert("LA").save(path),
    "bits.png": lambda image, path: image.convert("1").save(path),
    "16 bits.png": deep,
    "animated.png": lambda image, path: image.save(
        path, save_all=True, append_images=[image.rotate(180)]
    ),
    "animated.webp": lambda image, path: image.save(
        path, save_all=True, append_images=[image.rotate(180)], lossless=True
    ),
    "pages.tiff": lambda image, path: image.save(
        path, save_all=True, append_images=[image.rotate(180)]
    ),
    "a gif.png": gif,
    "a jpeg.png": lambda image, path: image.save(path, "JPEG", quality=95),
    "a png.jpg": lambda image, path: image.save(path, "PNG"),
    "pixel.png": lambda image, path: image.resize((1, 1)).save(path),
    "wide.png": wide,
    "new\nline.png": lambda image, path: image.save(path),
    "'quotes\" & <b>.png": lambda image, path: image.save(path),
    b"not utf-8 \xff.png".decode(errors="surrogateescape"): lambda image, path: image.save(path),
    "folder.jpg/x.png": lambda image, path: image.save(path),
    "link.png": link,
}  # fmt: skip
LEFT_OUT = (".DS_Store", "._x.jpg", ".ipynb_checkpoints/x.jpg", "notes.txt", "film.gif", "x.jpg~")


@pytest.fixture(scope="module")
def odd(picture, tmp_path_factory):
    """A tree whose val/ has every readable kind, in turn in its two classes, and no image besides
    but what is to be left out."""
    root = write_photos(tmp_path_factory.mktemp("odd") / "odd")
    shutil.rmtree(root / "val")
    for k, (name, write) in enumerate(READABLE.items()):
        path = f"{root}/val/{['cat', 'dog'][k % 2]}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(picture(k, SIZE, SIZE), path)
    for name in LEFT_OUT:
        path = root / "val" / "cat" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    return root


def shown(data):
    """Images (N, H, W, 3) and labels (N,) of val/."""
    batches = list(data.val_dataloader())
    images = np.concatenate([images.permute(0, 2, 3, 1).numpy() for images, _ in batches])
    return images.astype(int), np.concatenate([labels.numpy() for _, labels in batches])


def ready(root, tmp_path, **options):
    return build.folder(root, tmp_path / "cache", **OPTIONS | options)


@pytest.mark.parametrize("way", ["imagefolder", "ffcv, raw", "ffcv, jpg", "prepared"])
def test_odd_images_look_as_pillow_reads_them_under_their_labels(odd, tmp_path, way):
    options = dict(backend=way[:4] if "ffcv" in way else "imagefolder", mode=way[-3:])
    root = odd
    if way == "prepared":
        options = dict(backend="ffcv")
        root = prepare(odd, tmp_path / "betons", mode="jpg", max_resolution=500, jpeg_quality=95)
    images, labels = shown(ready(root, tmp_path, **options))
    exact = way in ("imagefolder", "ffcv, raw")
    paths = [path for name in ("cat", "dog") for path in image_files(f"{odd}/val/{name}")[0]]
    assert len(paths) == len(images) == len(labels) == len(READABLE)
    for path, image, label in zip(paths, images, labels, strict=True):
        assert label == ("/dog/" in path), path
        with Image.open(path) as opened:
            right = to_rgb(opened)
        if "wide" in path:
            right = right.crop((9900, 0, 10100, 200))
        right = np.asarray(right.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).astype(int)
        difference = np.abs(image - right)
        if exact:
            assert "wide" in path or difference.max() == 0, path
        elif "wide" not in path:  # of which max_resolution leaves 6 rows
            assert difference.mean() < 16, path  # another picture differs by 60


def truncated(root, path):
    whole = (root / "train/cat/0.jpg").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def truncated_png(root, path):
    Image.open(root / "train/cat/0.jpg").save(path)
    path.write_bytes(path.read_bytes()[:2000])


def bomb(root, path):
    """A PNG that says it is of 60,000 x 60,000 pixels."""
    size = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + size + struct.pack(">I", zlib.crc32(size))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)


def listen(root, path):
    before = os.getcwd()
    os.chdir(path.parent)  # as the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path.name)
    os.chdir(before)


REFUSED = {
    "truncated.jpg": truncated,
    "truncated.png": truncated_png,
    "empty.jpg": lambda root, path: path.touch(),
    "text.jpg": lambda root, path: path.write_text("not an image\n" * 99),
    "bomb.png": bomb,
    "no width.ppm": lambda root, path: path.write_bytes(b"P6 0 5 255\n"),
    "dangling.jpg": lambda root, path: path.symlink_to("nowhere"),
    "pipe.jpg": lambda root, path: os.mkfifo(path),
    "socket.jpg": listen,
    "device.jpg": lambda root, path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "imagefolder") for name in REFUSED), ("truncated.jpg", "ffcv"), ("pipe.jpg", "ffcv")],
)
def test_what_is_no_image_is_named_with_the_way_out(name, backend, photos, tmp_path):
    path = photos / "train/dog" / name
    REFUSED[name](photos, path)
    before = active_children()
    with pytest.raises(ValueError) as refusal:
        list(ready(photos, tmp_path, backend=backend).train_dataloader())
    message = str(refusal.value)
    if backend == "ffcv":
        del (
            refusal
        )  # in a cycle with this frame, whose collection waits 5 s for the writer's workers
    assert set(active_children()) <= set(before)
    assert message.startswith(f"{path} "), message
    assert "remove" in message and "Traceback" not in message, message


def test_all_of_it_can_be_left_out_and_the_rest_keeps_its_labels(photos, tmp_path):
    for name, make in REFUSED.items():
        make(photos, photos / "val/cat" / name)
    options = dict(mode="raw", max_resolution=None, jpeg_quality=95, skip_bad=True)
    folder = prepare(photos, tmp_path / "betons", **options)
    skipped = open_beton(folder / "val.beton")[0]["skipped"]
    assert [os.path.basename(entry["name"]) for entry in skipped] == sorted(REFUSED)
    images, labels = shown(ready(folder, tmp_path))
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for image, label in zip(images, labels, strict=True):
        assert abs(image.mean() - [60, 190][label]) < 20  # as write_photos draws them


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_link_to_a_folder_around_it_is_named(backend, photos, tmp_path):
    (photos / "val/cat/inner").mkdir()
    (photos / "val/cat/inner/loop").symlink_to("..")
    (photos / "val/cat/inner/again").symlink_to("..")  # two make 2^40 paths
    with pytest.raises(ValueError, match="val/cat/inner/.*is a link to a folder that it is in"):
        ready(photos, tmp_path, backend=backend)


@contextmanager
def unprivileged():
    """Without root's right to read everything, so that a file's mode counts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    after = (ctypes.c_uint32 * 6)(*before)
    after[0] = after[3] = 0  # what is effective; what is permitted stays
    assert libc.capset(header, after) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["", "train", "train/dog", "train/dog/3.jpg"])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_what_may_not_be_read_is_named(part, mode, backend, photos, tmp_path):
    if mode and part.endswith(".jpg"):
        return
    (photos / part).chmod(mode)
    try:
        with unprivileged(), pytest.raises((ValueError, PermissionError)) as refusal:
            list(ready(photos, tmp_path, backend=backend).train_dataloader())
    finally:
        (photos / part).chmod(0o755)
    message = str(refusal.value)
    del refusal  # see above
    assert str(photos / part) in message and "Permission denied" in message


@pytest.mark.parametrize("name", ["copy.beton", "copy.beton.json"])
def test_a_beton_that_may_not_be_read_is_named(name, copied):
    copied.with_name(name).chmod(0)
    with unprivileged(), pytest.raises(BetonError, match=f"cannot be used .*Permission.*/{name}'"):
        open_beton(copied)


def test_linked_folders_are_read_and_files_come_in_torchvision_s_order(photos, tmp_path):
    (photos / "val/cat").rename(tmp_path / "elsewhere")
    (photos / "val/cat").symlink_to(tmp_path / "elsewhere")
    for inner in "a", "a-b", "a/c", "B":
        shutil.copytree(photos / "val/dog", photos / "val/cat" / inner)
    (photos / "val/cat/b").symlink_to(photos / "val/dog")
    theirs = ImageFolder(photos / "val").samples
    assert class_samples(photos / "val", ["cat", "dog"]) == theirs and len(theirs) == 21


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["hidden", "no image", "none"])
def test_a_class_without_images_is_named(backend, kind, photos, tmp_path):
    for path in (photos / "train/cat").iterdir():
        path.unlink()
    if kind != "none":
        name = ".x.jpg" if kind == "hidden" else "film.mp4"
        (photos / "train/cat" / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="class folder .*train/cat holds no images: add some"):
        ready(photos, tmp_path, backend=backend)


ENDINGS = {"x.jfif": "JPEG", "x.gif": "GIF", "x.avif": "AVIF", "x.jp2": "JPEG2000", "x": "PNG"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_opens_as_an_image_is_one_whatever_its_ending(
    backend, photos, picture, tmp_path, capfd
):
    for name, kind in ENDINGS.items():
        picture(1, 40, 40).save(photos / "val/cat" / name, kind)
    (photos / "val/cat/notes").write_text("no image")
    images, labels = shown(ready(photos, tmp_path, backend=backend, mode="raw", splits=["val"]))
    assert labels.tolist() == [0] * (3 + len(ENDINGS)) + [1] * 3
    right = np.asarray(picture(1, 40, 40).resize((SIZE, SIZE), Image.Resampling.BOX)).astype(int)
    for image in images[3:-3]:
        assert np.abs(image - right).mean() < 12
    assert "No images, left out: 1 files" in capfd.readouterr().out


RAMP = np.linspace(8000, 60000, 40 * 40).reshape(40, 40)
DEEP = {
    "16 bits.png": RAMP.astype(np.uint16),
    "16 bits.tif": RAMP.astype(np.uint16),
    "big endian.tif": RAMP.astype(">u2"),
    "32 bits.tif": RAMP.astype(np.int32),
    "floats.tif": (RAMP / 65535).astype(np.float32),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_deep_images_keep_their_shades(backend, photos, tmp_path):
    for name, pixels in DEEP.items():
        Image.fromarray(pixels).save(photos / "val/cat" / name)
    options = dict(backend=backend, mode="raw", splits=["val"], img_size=40)
    images, _ = shown(ready(photos, tmp_path, **options))
    right = np.rint(RAMP / 257)[..., None]
    places = [n for n, path in enumerate(image_files(f"{photos}/val/cat")[0]) if path[-1] in "gf"]
    deep = [n for n in places if os.path.basename(image_files(f"{photos}/val/cat")[0][n]) in DEEP]
    assert len(deep) == len(DEEP)
    for n in deep:
        assert np.abs(images[n] - right).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_classes_that_differ_above_255_differ(backend, tmp_path):
    for split in "train", "val":
        for name, level in ("cat", 300), ("dog", 40_000):
            folder = tmp_path / "tree" / split / name
            folder.mkdir(parents=True)
            for k in range(4):
                Image.fromarray(np.full((40, 40), level + k, np.uint16)).save(folder / f"{k}.png")
    images, labels = shown(ready(tmp_path / "tree", tmp_path, backend=backend))
    means = [images[labels == label].mean() for label in (0, 1)]
    assert means[0] == pytest.approx(300 / 257, abs=1) and means[1] == pytest.approx(155.6, abs=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pixels", [RAMP.astype(np.float32), -RAMP.astype(np.int32), RAMP * np.nan])
def test_deep_images_of_unknown_range_are_refused(backend, pixels, photos, tmp_path):
    kind = np.int32 if pixels.dtype == np.int32 else np.float32
    Image.fromarray(pixels.astype(kind)).save(photos / "train/cat/deep.tif")
    with pytest.raises(ValueError, match="deep.tif is not a readable image .*expected 0 to"):
        list(ready(photos, tmp_path, backend=backend).train_dataloader())


def test_a_changed_image_of_the_same_size_is_seen(photos, tmp_path):
    def files():
        return ready(photos, tmp_path).beton_dir

    path, first = photos / "val/cat/0.jpg", files()
    assert files() == first
    path.write_bytes(bytes(reversed(path.read_bytes())))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    path.write_bytes((photos / "val/dog/0.jpg").read_bytes())
    assert files() != first


@pytest.mark.parametrize("size", [(1, 12_000), (12_000, 1), (3, 60_000)])
def test_the_longest_images_are_cut_before_they_are_enlarged(size):
    transform, image = evaluation_transform(224, 0.875), Image.new("RGB", size, (9, 80, 200))
    pixels = transform(image)
    small = cut_long(image)
    assert pixels.shape == (3, 224, 224) and (pixels.flatten(1).T == pixels[:, 0, 0]).all()
    assert max(small.size) <= 17 * min(size)


def test_images_of_usual_shape_are_evaluated_as_published(picture):
    published = T.Compose(
        [T.Resize(64, InterpolationMode.BICUBIC), T.CenterCrop(56), T.PILToTensor()]
    )
    for size in (40, 50), (300, 31), (20, 320), (100, 100):
        image = picture(3, *size)
        assert torch.equal(evaluation_transform(56, 0.875)(image), published(image))
