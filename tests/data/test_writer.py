import multiprocessing
import os
import time

import numpy as np
import pytest
from ffcv.reader import Reader
from PIL import Image

from evit.data import ffcv as beton
from evit.data.ffcv import open_beton
from evit.data.ffcv import write as write_module
from evit.data.ffcv.decode import decode_jpeg
from evit.data.ffcv.write import write_beton

CLASSES = ["a", "b", "c"]


def write(path, samples, **options):
    return write_beton(
        path, samples, **{"classes": CLASSES, "source": "test", "num_workers": 2, **options}
    )


def stored(path):
    """Per sample: its metadata and its bytes, as FFCV's own reader finds them."""
    reader, content = Reader(str(path)), path.read_bytes()
    return [
        (metadata, content[int(ptr) : int(ptr) + int(size)])
        for (metadata, _), (_, ptr, size) in zip(reader.metadata, reader.alloc_table, strict=True)
    ]


def pixels(path):
    """Per sample: its pixels, as FFCV decodes them."""
    decoded = []
    for metadata, data in stored(path):
        height, width = int(metadata["height"]), int(metadata["width"])
        if metadata["mode"] == beton.RAW:
            decoded.append(np.frombuffer(data, np.uint8).reshape(height, width, 3))
        else:
            decoded.append(decode_jpeg(data, height, width))
    return decoded


def difference(a, b):
    return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()


def test_the_bytes_of_a_small_jpeg_are_kept(samples, written):
    assert [data for _, data in stored(written)] == [path.read_bytes() for path, _ in samples]
    assert open_beton(written)[0]["kept_original"] == len(samples)


def test_a_large_image_shrinks_to_max_resolution_and_keeps_its_shape(picture, tmp_path):
    picture(0, 300, 150).save(tmp_path / "large.jpg")
    large = [(tmp_path / "large.jpg", 0), (picture(0, 1, 2000), 0)]
    sidecar = write(tmp_path / "x.beton", large, max_resolution=100)
    found, strip = pixels(tmp_path / "x.beton")
    assert found.shape == (50, 100, 3) and strip.shape == (100, 1, 3)
    assert difference(found, picture(0, 300, 150).resize((100, 50))) < 3
    assert sidecar["kept_original"] == 0


def test_every_mode_of_pillow_becomes_its_rgb_and_arrays_are_images_too(picture, tmp_path):
    shown, alpha = picture(1, 31, 17), picture(2, 31, 17).convert("L")
    gray = np.asarray(shown)[..., 0]
    flat = Image.fromarray(gray).convert("RGB")
    deep = gray * np.uint16(257), gray.astype(np.int32) * 257, np.float32(gray / 255)
    cases = {image.mode: (image, flat) for image in map(Image.fromarray, deep)}
    assert list(cases) == ["I;16", "I", "F"]
    for mode in "1 L LA P PA RGB RGBA RGBX RGBa CMYK YCbCr HSV LAB".split():
        image = (shown.convert("RGBA") if mode == "RGBa" else shown).convert(mode)
        if mode.endswith("A"):
            image.putalpha(alpha)
        cases[mode] = image, image.convert("RGB")
    cases |= dict(colours=(np.asarray(shown), shown), grays=(gray, flat))
    write(tmp_path / "x.beton", [(image, 0) for image, _ in cases.values()], mode="raw")
    for mode, found in zip(cases, pixels(tmp_path / "x.beton"), strict=True):
        assert np.array_equal(found, cases[mode][1]), mode


@pytest.mark.parametrize(
    ("mode", "options", "kept", "tolerance"),
    [
        ("RGB", {}, 1, 0),
        ("RGB", {"progressive": True}, 1, 0),
        ("RGB", {"subsampling": 0, "quality": 100}, 1, 0),
        ("L", {}, 1, 0),
        ("CMYK", {}, 0, 4),
    ],
)
def test_a_jpeg_reads_as_pillow_reads_it(picture, tmp_path, mode, options, kept, tolerance):
    source = tmp_path / "x.jpg"
    picture(3, 61, 47).convert(mode).save(source, **{"quality": 95, **options})
    assert write(tmp_path / "x.beton", [(source, 0)])["kept_original"] == kept
    with Image.open(source) as image:
        assert difference(pixels(tmp_path / "x.beton")[0], image.convert("RGB")) <= tolerance


def test_a_jpeg_that_ffcv_would_have_to_guess_is_encoded_anew(picture, tmp_path):
    source = tmp_path / "x.jpg"
    picture(4, 64, 64).save(source)
    data = source.read_bytes()
    source.write_bytes(data[:-100] + bytes(50) + data[-50:])
    assert decode_jpeg(source.read_bytes(), 64, 64) is None
    assert write(tmp_path / "x.beton", [(source, 0)])["kept_original"] == 0
    assert pixels(tmp_path / "x.beton")[0] is not None


@pytest.fixture
def bad_images(samples, tmp_path):
    paths = [tmp_path / name for name in ("truncated.jpg", "text.jpg", "empty.png", "missing.jpg")]
    whole = samples[0][0].read_bytes()
    paths[0].write_bytes(whole[: len(whole) // 2])
    paths[1].write_text("not an image")
    paths[2].write_bytes(b"")
    return paths


@pytest.mark.parametrize("which", range(4))
def test_a_bad_image_is_named_and_nothing_is_left_behind(samples, bad_images, tmp_path, which):
    bad = bad_images[which]
    folder = tmp_path / "new"
    with pytest.raises(ValueError, match=f"{bad} is not a readable image .*skip_bad=true"):
        write(folder / "x.beton", [*samples, (bad, 0)])
    assert list(folder.iterdir()) == []


def test_bad_images_can_be_skipped_and_are_listed(samples, bad_images, tmp_path):
    mixed = [samples[0], *((path, 0) for path in bad_images), samples[1]]
    sidecar = write(tmp_path / "x.beton", mixed, skip_bad=True)
    assert [skipped["name"] for skipped in sidecar["skipped"]] == [str(path) for path in bad_images]
    assert open_beton(tmp_path / "x.beton")[0]["num_samples"] == 2
    assert stored(tmp_path / "x.beton")[1][1] == samples[1][0].read_bytes()


class Deadly(list):
    def __getitem__(self, index):
        return os._exit(1) if index == 50 else super().__getitem__(index)


def test_a_worker_that_dies_is_an_error_and_nothing_is_left_behind(samples, tmp_path):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker .* exited unexpectedly"):
        write(tmp_path / "x.beton", Deadly(samples))
    assert time.monotonic() - start < 5
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_the_old_file_and_no_process(copied, samples, monkeypatch):
    def interrupt(file, *_):
        file.write(b"half")
        raise KeyboardInterrupt

    before = {path: path.read_bytes() for path in copied.parent.iterdir()}
    monkeypatch.setattr(write_module, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(copied, samples[:5])
    assert {path: path.read_bytes() for path in copied.parent.iterdir()} == before
    assert multiprocessing.active_children() == []


def killed_writer(path, samples):
    write(path, Slow(samples), num_workers=1)


class Slow(list):
    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)


def test_a_killed_writer_leaves_no_process_and_is_begun_anew(samples, tmp_path):
    path = tmp_path / "x.beton"
    child = multiprocessing.get_context("fork").Process(target=killed_writer, args=(path, samples))
    child.start()
    while not (tmp_path / "x.beton.tmp").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    child.kill()
    child.join()
    assert not path.exists()
    write(path, samples)
    assert open_beton(path)[0]["num_samples"] == 71
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.beton", "x.beton.json"]


@pytest.mark.parametrize("small_disk", ["32k", "64k"], indirect=True)
def test_a_full_disk_is_told_with_the_way_out(samples, small_disk):
    with pytest.raises(OSError, match="No space left on device"):
        write(small_disk / "x.beton", samples)
    assert list(small_disk.iterdir()) == []


def test_a_file_of_the_same_identity_and_settings_is_left_as_it_is(samples, tmp_path, capsys):
    path = tmp_path / "x.beton"
    first = write(path, samples, identity="one")
    assert write(path, samples, identity="one") == first
    assert "is there already" in capsys.readouterr().out
    for options in dict(identity="two"), dict(identity="two", jpeg_quality=50), dict():
        before = path.stat().st_mtime_ns
        write(path, samples, **options)
        assert path.stat().st_mtime_ns > before


def test_two_writers_of_one_file_take_turns(samples, tmp_path):
    path, context = tmp_path / "x.beton", multiprocessing.get_context("fork")
    options = dict(num_workers=1, identity="one")
    twins = [
        context.Process(target=write, args=(path, Slow(samples[:8])), kwargs=options)
        for _ in range(2)
    ]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()
    assert [twin.exitcode for twin in twins] == [0, 0]
    assert open_beton(path)[0]["num_samples"] == 8


@pytest.mark.parametrize("quality", [95, 100])
def test_what_is_encoded_anew_keeps_its_colours(tmp_path, quality):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255, 0, 0
    stripes[:, 1::2] = 0, 0, 255
    write(tmp_path / "x.beton", [(stripes, 0)], jpeg_quality=quality)
    assert difference(pixels(tmp_path / "x.beton")[0], stripes) < 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"samples": []}, "nothing to write, .* has no readable images"),
        (
            {"samples": [("none.jpg", 0)], "skip_bad": True},
            "nothing to write, .* has no readable images",
        ),
        ({"mode": "png"}, "'mode': 'png', .* mode is jpg or raw"),
        ({"max_resolution": 0}, "'max_resolution': 0, .* pixels or null"),
        ({"jpeg_quality": 101}, "'jpeg_quality': 101.* jpeg_quality 1 to 100"),
        ({"classes": ["a", "b"]}, "02.jpg: label 2 is outside 0 to 1"),
    ],
)
def test_a_wrong_argument_is_named(samples, tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        write(tmp_path / "x.beton", **{"samples": samples, **options})


def test_no_piece_crosses_a_page(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(write_module, "PAGE", 2**15)
    write(tmp_path / "x.beton", samples)
    table = Reader(str(tmp_path / "x.beton")).alloc_table
    first, last = table["ptr"], table["ptr"] + table["size"] - np.uint64(1)
    assert (first // 2**15 == last // 2**15).all() and len(set(first // 2**15)) > 2
    assert [data for _, data in stored(tmp_path / "x.beton")] == [
        p.read_bytes() for p, _ in samples
    ]
    assert open_beton(tmp_path / "x.beton")
    with pytest.raises(ValueError, match="takes 270000 bytes, too many: set max_resolution"):
        write(tmp_path / "x.beton", [(np.zeros((300, 300, 3), np.uint8), 0)], mode="raw")
