"""Names that come with data or runs are letters, wherever they are shown."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from evit.commands import ended_in_a_line, use
from evit.data import Folder
from evit.report import page, results, tables
from evit.report.collect import read
from tests.conftest import write_photos
from tests.data.build import module
from tests.report import browser, fake

SCRIPT = "</script><img src=x onerror=\"owned=1\"><script>owned=1</script>' onload='owned=1"
CONTROL = "\x1b]0;owned\x07\x1b[2J\r\n| a | b |\n\u202e\x9b31m\ud800"
ODD = f"[red]{SCRIPT}{CONTROL}[link=file:///x]=1+1[/red]$x_1$"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """What is read of runs whose model, data, device and version have odd names."""
    root = tmp_path_factory.mktemp("names")
    more = dict(data=ODD, device=ODD, commit=ODD, packages=fake.PACKAGES | dict(torch=ODD))
    for rate, top1 in ((1.0, 84.0), (0.7, 83.0)):
        run = fake.fashion(rate, top1, **more)
        run["choices"]["model"] = f"={ODD}{rate}"
        run["config"]["model"]["model_name"] = ODD
        fake.write(root / f"{rate}", run)
    evaluated = fake.evaluation(data=ODD)
    evaluated["model"]["name"] = ODD
    measured = fake.benchmark(dict(images_per_s=1.0, ratio=1.0, model=ODD)) | dict(device=ODD)
    for name, found in (("evaluation", evaluated), ("benchmark", measured)):
        (root / f"{name}.json").write_text(json.dumps(found))
    folder = root / "\x1b[2J\n<script>owned=1"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(dict(a=ODD)))
    found = read(root)
    assert (len(found.runs), len(found.problems)) == (2, 1)
    return found


def is_plain(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_in_tables_they_stay_in_their_cells(content):
    points = tables.ours(content)
    papers = tables.of_paper(content, points)
    text = tables.report(content, tables.of_settings(points), papers)
    assert is_plain(text) and "<script" not in text and "<img" not in text
    assert "owned" in text
    for table in text.split("\n\n"):
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


@pytest.mark.skipif(not browser.CHROMIUM, reason="needs Chromium: apt-get install chromium")
def test_on_the_page_no_script_of_theirs_runs(content, tmp_path):
    (tmp_path / "index.html").write_text(page.html(content))
    opened = browser.Page((tmp_path / "index.html").as_uri(), tmp_path / "chromium")
    try:
        assert opened.run("typeof owned") == "undefined"
        assert opened.run("[...document.images].filter((i) => !i.src.startsWith('data:'))") == []
        assert opened.run("document.querySelectorAll('script').length") == 4
        assert "onerror" in opened.run("document.body.innerText")
        for hovered in ("text", "hovertext"):  # plotly has HTML of its own
            assert opened.run(f"""[...document.querySelectorAll('.plot')].every((p) =>
                p.data.every((t) => !/<(?!br>)/.test([].concat(t.{hovered} ?? []).join())))""")
        assert opened.errors == []
    finally:
        opened.close()


def test_on_a_terminal_they_are_text(content, tmp_path, capsys):
    run = fake.fashion(0.7, 83.0, data="photos [red]of[/red] [v2]")
    results.show(run, fake.write(tmp_path / "[bold]run", run))
    shown = capsys.readouterr().out
    assert "photos [red]of[/red] [v2]" in shown and "[bold]run" in shown
    with pytest.raises(SystemExit), ended_in_a_line():
        raise ValueError(f"no class {ODD}")
    shown = capsys.readouterr().err
    assert is_plain(shown) and "[red]" in shown


def test_the_name_of_a_data_set_is_printable(tmp_path):
    root = write_photos(tmp_path / "photos\x1b[2J\n", train=1, val=1)
    data = module(Folder, root, backend="imagefolder")
    assert data.name == "photos?[2J?"


def test_the_name_of_a_model_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = dict(model="../../../owned", keep_rate=[0.7], fusion=True, img_size=32)
    about |= dict(mean=[], std=[], num_classes=2, reducer=None)
    monkeypatch.setattr(use.checkpoint, "opened", lambda cfg: (logits, about, cfg, None))

    def logits(images):
        return torch.zeros(len(images), 2)

    def write(model, about, path):
        path.write_text("it")
        return lambda images: logits(images).numpy()

    monkeypatch.setitem(use.FORMATS, "torch_export", (".pt2", write))
    knobs = dict(format="torch_export", random=True, pretrained=False, checkpoint=None, seed=0)
    path = use.export(OmegaConf.create(knobs | dict(model={"_target_": "x"}, target=None)))
    assert (tmp_path / path).parent == tmp_path / "outputs/export" and path.is_file()
