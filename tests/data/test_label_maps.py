"""Label maps: what is refused, and the targets beside an independent computation."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evit.data.batch import warp_of
from evit.data.label_maps import label_map_paths, read_label_map, token_targets

K = 7


def random_maps(batch=3, height=6, width=6, num_classes=K, seed=0):
    """Label maps (B, 2, 5, H, W): five different classes in each cell, highest logit first."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((batch, num_classes, height, width)), 1)[:, :5]
    logits = -np.sort(-rng.normal(0, 4, (batch, 5, height, width)), 1)
    return torch.tensor(np.stack([logits, ids], 1)).half()


def one_map(**options):
    return random_maps(1, **options)[0]


def changed(**places):
    found = one_map()
    for name, value in places.items():
        found[dict(logits=0, ids=1)[name], 0, 0, 0] = value
    return found


DAMAGES = {
    "text": (b"no map", "cannot be read"),
    "half": (None, "cannot be read"),
    "a dict": ({"map": one_map()}, "cannot be read"),
    "float32": (one_map().float(), "float32 .*, not float16"),
    "four classes": (one_map()[:, :4].clone(), r"\(2, 4, 6, 6\), not float16 \(2, 5, 6, 6\)"),
    "other size": (one_map(height=5), r"\(2, 5, 5, 6\), not float16 \(2, 5, 6, 6\)"),
    "nan": (changed(logits=float("nan")), "not finite"),
    "infinite": (changed(logits=float("inf")), "not finite"),
    "id too large": (changed(ids=K), "ids that are not classes, 0 to 6"),
    "id negative": (changed(ids=-1), "ids that are not classes"),
    "id between": (changed(ids=0.5), "ids that are not classes"),
    "id unknown": (changed(ids=float("nan")), "ids that are not classes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_map_is_named_with_the_reason_and_the_way_out(tmp_path, name):
    path = tmp_path / "x.pt"
    content, reason = DAMAGES[name]
    if content is None:
        torch.save(one_map(), path)
        path.write_bytes(path.read_bytes()[:600])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=reason) as refusal:
        read_label_map(path, K, (6, 6))
    assert str(path) in str(refusal.value) and "LABELS/CLASS/STEM.pt" in str(refusal.value)


def test_a_missing_map_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="x.pt cannot be read .*No such file.*LABELS/CLASS/STEM.pt"
    ):
        read_label_map(tmp_path / "x.pt", K)


def test_a_map_is_read_as_it_was_written(tmp_path):
    torch.save(one_map(), tmp_path / "x.pt")
    assert torch.equal(read_label_map(tmp_path / "x.pt", K), one_map())


def test_a_map_lies_at_its_image_s_place_and_loses_the_last_suffix_only(tmp_path):
    samples = [("/i/train/cat/a.b.jpg", 0), ("/i/train/dog/more/a.JPEG", 1)]
    expected = [tmp_path / "cat/a.b.pt", tmp_path / "dog/more/a.pt"]
    for path in expected:
        path.parent.mkdir(parents=True)
        path.touch()
    assert label_map_paths(samples, Path("/i/train"), tmp_path) == list(map(str, expected))


def test_two_images_that_would_share_a_map_are_refused():
    with pytest.raises(ValueError, match="a.jpg and /i/cat/a.png would share"):
        label_map_paths([("/i/cat/a.jpg", 0), ("/i/cat/a.png", 0)], Path("/i"), Path("/m"))


IDENTITY = np.eye(2, 3)


def expected_targets(one, crop, rows, columns, smoothing, warp=IDENTITY):
    """Targets of one image, cell by cell: the mean over a grid of points, bilinear in between."""
    logits, ids = one.float().numpy()
    _, H, W = logits.shape
    x0, y0, x1, y1, mirrored = crop.tolist()

    def at(y, x):
        """The K logits at a point, cells' centres lying at whole numbers."""
        y, x = min(max(y, 0.0), H - 1.0), min(max(x, 0.0), W - 1.0)
        mixed = np.zeros(K)
        for row in {math.floor(y), math.ceil(y)}:
            for column in {math.floor(x), math.ceil(x)}:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                for top in range(5):
                    mixed[int(ids[top, row, column])] += weight * logits[top, row, column]
        return mixed

    def cell(row, column, rows, columns):
        top, left = y0 * H - 0.5, x0 * W - 0.5
        height, width = y1 * H - 0.5 - top, x1 * W - 0.5 - left
        # How long the sides of what is shown are on the map, in cells.
        across, down = (np.hypot(width * warp[0, k], height * warp[1, k]) for k in range(2))
        points_y, points_x = math.ceil(down / rows), math.ceil(across / columns)
        total = np.zeros(K)
        for i in range(points_y):
            for j in range(points_x):
                place = (
                    (column + (j + 0.5) / points_x) / columns,
                    (row + (i + 0.5) / points_y) / rows,
                )
                x, y = warp[:, :2] @ place + warp[:, 2]
                if 0 <= x <= 1 and 0 <= y <= 1:
                    total += at(top + height * y, left + width * (1 - x if mirrored else x))
        scores = np.exp(total / (points_y * points_x))
        return scores / scores.sum() * (1 - smoothing) + smoothing / K

    grid = [[cell(r, c, rows, columns) for c in range(columns)] for r in range(rows)]
    return cell(0, 0, 1, 1), np.array(grid).reshape(rows * columns, K)


CROPS = torch.tensor(
    [[0, 0, 1, 1, 0], [0.2, 0.1, 0.9, 0.75, 0], [0.33, 0.5, 0.61, 0.97, 1]], dtype=torch.float32
)


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (14, 14), (2, 5)])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
def test_targets_are_those_of_a_slow_computation(grid, shape):
    maps = random_maps(3, *shape)
    rows, columns = grid
    whole, cells = token_targets(maps, CROPS, K, grid, label_smoothing=0.1)
    assert whole.shape == (3, K) and cells.shape == (3, rows * columns, K)
    for one, crop, found_whole, found_cells in zip(maps, CROPS, whole, cells, strict=True):
        expected_whole, expected_cells = expected_targets(one, crop, rows, columns, 0.1)
        np.testing.assert_allclose(found_whole, expected_whole, atol=2e-5)
        np.testing.assert_allclose(found_cells, expected_cells, atol=2e-5)


@pytest.mark.parametrize("steps", [[(3, 25.0)], [(11, 0.27), (3, -27.0)], [(13, 0.41), (12, 0.21)]])
def test_targets_follow_what_rand_augment_moved(steps):
    maps, warp = random_maps(3, 4, 9), warp_of(steps)
    warps = torch.from_numpy(warp).expand(3, 2, 3)
    whole, cells = token_targets(maps, CROPS, K, (5, 5), 0.1, warps)
    for one, crop, found_whole, found_cells in zip(maps, CROPS, whole, cells, strict=True):
        expected_whole, expected_cells = expected_targets(one, crop, 5, 5, 0.1, warp)
        np.testing.assert_allclose(found_whole, expected_whole, atol=2e-5)
        np.testing.assert_allclose(found_cells, expected_cells, atol=2e-5)


def test_where_nothing_is_shown_every_class_is_as_likely():
    warp = torch.from_numpy(warp_of([(13, 0.5)])).expand(3, 2, 3)  # moved by half, to the left
    _, cells = token_targets(random_maps(), CROPS, K, (4, 4), warps=warp)
    gone = torch.zeros(4, 4, dtype=torch.bool)
    gone[:, 2:] = True
    uniform = (cells - 1 / K).abs().amax(2) < 1e-6
    assert torch.equal(uniform, gone.flatten().expand(3, 16))


def test_the_whole_image_on_the_map_s_own_grid_gives_the_map():
    maps = random_maps(1, 4, 4)
    _, cells = token_targets(maps, torch.tensor([[0, 0, 1, 1, 0.0]]), K, (4, 4))
    dense = torch.zeros(1, K, 4, 4).scatter_(1, maps[:, 1].long(), maps[:, 0].float())
    torch.testing.assert_close(cells, dense.softmax(1).flatten(2).transpose(1, 2))


def test_a_mirrored_crop_has_the_mirrored_targets():
    maps = random_maps(1, 5, 8)
    crop = torch.tensor([[0.1, 0.2, 0.7, 0.95, 0]])
    whole, cells = token_targets(maps, crop, K, (4, 4))
    crop[:, 4] = 1
    mirrored_whole, mirrored = token_targets(maps, crop, K, (4, 4))
    torch.testing.assert_close(whole, mirrored_whole)
    torch.testing.assert_close(cells.view(4, 4, K).flip(1), mirrored.view(4, 4, K))


def test_x_runs_along_the_rows_of_the_map():
    """Class 1 left, class 2 right: a crop of the left half says 1."""
    maps = torch.zeros(1, 2, 5, 4, 8)
    maps[:, 1] = torch.tensor([1, 0, 3, 4, 5]).view(5, 1, 1)
    maps[:, 1, 0, :, 4:] = 2
    maps[:, 0, 0] = 20
    for crop, expected in ([0, 0, 0.45, 1, 0], 1), ([0.55, 0, 1, 1, 0], 2):
        whole, cells = token_targets(maps, torch.tensor([crop], dtype=torch.float32), K, (2, 2))
        assert whole.argmax() == expected and (cells.argmax(2) == expected).all()
