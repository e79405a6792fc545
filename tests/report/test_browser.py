"""The page in Chromium: it asks for nothing, complains of nothing, and its switches switch."""

import json

import pytest

from evit.report import page
from evit.report.collect import read
from tests.report import browser, fake

pytestmark = pytest.mark.skipif(
    not browser.CHROMIUM, reason="needs Chromium: apt-get install chromium"
)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("browser")
    content = read(fake.write_all(root / "outputs"))
    (root / "index.html").write_text(page.html(content))
    return (root / "index.html").as_uri()


@pytest.fixture(scope="module")
def opened(address, tmp_path_factory):
    shown = browser.Page(address, tmp_path_factory.mktemp("chromium"))
    yield shown
    shown.close()


def button(place: str, text: str) -> str:
    """JavaScript for the button with a text."""
    buttons = f"[...document.querySelectorAll({json.dumps(place + ' button')})]"
    return f"{buttons}.find((button) => button.textContent === {json.dumps(text)})"


def color(of: str, name: str = "color") -> str:
    return f"getComputedStyle(document.querySelector({json.dumps(of)})).{name}"


def test_it_asks_for_nothing_and_complains_of_nothing(opened, address):
    assert [url for url in opened.requests if not url.startswith(("data:", "blob:"))] == [address]
    assert opened.errors == []
    drawn = opened.run("document.querySelectorAll('.plot .main-svg .scatterlayer .trace').length")
    assert drawn > 20


def test_the_axes_switch(opened):
    title = "document.querySelector('#imagenet .xtitle').textContent"
    assert opened.run(title) == "GMACs (per image)"
    for name, axis in (("speed-up", "times the dense model"), ("images/s", "inference")):
        opened.run(button('[data-chart="imagenet"] .switch', name) + ".click()")
        opened.wait_for(f"{title}.includes({json.dumps(axis)})")
        pressed = opened.run(
            "document.querySelector('[data-chart=\"imagenet\"] [aria-pressed=true]').textContent"
        )
        assert pressed == name


def test_the_legend_has_every_line_once(opened):
    shown, wanted = opened.run("""[
        [...document.querySelectorAll('#imagenet .legendtext')].map((text) => text.textContent),
        document.getElementById('imagenet').data.map((trace) => trace.name)]""")
    assert shown == wanted and len(set(shown)) == len(shown) > 4


def test_a_picture_is_enlarged_by_a_click_and_closed_by_another(opened):
    size = "document.querySelector('dialog img').getBoundingClientRect().width"
    assert opened.run(size) == 0
    opened.run("document.querySelector('.pictures button').click()")
    small = "document.querySelector('.pictures img')"
    assert opened.run(f"document.querySelector('dialog img').src === {small}.src")
    assert opened.run(size) >= 1200
    opened.run("document.querySelector('dialog').click()")
    assert opened.run(size) == 0


def test_a_tab_shows_its_table_alone(opened):
    shown = (
        "[...document.querySelectorAll('#papers .sheet')].filter((s) => s.offsetHeight)"
        ".map((s) => s.querySelector('h3').textContent)"
    )
    assert opened.run(shown) == ["Off the shelf: a trained DeiT-S, reorganized without training"]
    opened.run(button("#papers .switch", "DeiT-S") + ".click()")
    assert opened.run(shown) == ["DeiT-S, 300 epochs, 224 px"]
    cells = opened.run(
        "[...document.querySelectorAll('#papers .sheet:not([hidden]) tbody tr')]"
        ".map((row) => row.innerText.split('\\t').map((cell) => cell.trim()))"
    )
    assert ["0.7", "fused", "79.5", "79.43", "-0.07"] in [row[:5] for row in cells]


def test_dark_and_light(opened):
    back, text = color("body", "backgroundColor"), color("#imagenet .xtitle", "fill")
    light = opened.run(f"[{back}, {text}]")
    opened.run("document.getElementById('theme').click()")
    opened.wait_for(f"{text} !== {json.dumps(light[1])}")
    dark = opened.run(f"[{back}, {text}]")
    assert luminance(dark[0]) < 50 < 200 < luminance(light[0])
    assert luminance(light[1]) < 50 < 200 < luminance(dark[1])
    opened.run("document.getElementById('theme').click()")
    opened.wait_for(f"{text} === {json.dumps(light[1])}")


def luminance(rgb: str) -> float:
    return sum(map(float, rgb.removeprefix("rgb(").removesuffix(")").split(","))) / 3


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_lies_over_the_edge_or_over_something_else(opened, width):
    opened.resize(width)
    opened.wait_for("""[...document.querySelectorAll('.plot')].every(
        (p) => p.querySelector('.main-svg').getAttribute('width') == p.clientWidth)""")
    assert opened.run("document.documentElement.scrollWidth <= innerWidth")
    overlapping = opened.run("""[...document.querySelectorAll('.plot')].flatMap((plot) => {
        const visible = (node) => node.textContent && node.style.visibility !== "hidden";
        const nodes = ".textpoint text, .xtitle, .ytitle, .xtick text, .ytick text";
        const texts = [...plot.querySelectorAll(nodes)].filter(visible);
        const boxes = texts.map((node) => node.getBoundingClientRect());
        const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
        const edge = plot.getBoundingClientRect();
        const outside = (a) => a.left < edge.left - 1 || a.right > edge.right + 1
            || a.top < edge.top - 1 || a.bottom > edge.bottom + 1;
        return texts.filter((_, i) => outside(boxes[i])
            || boxes.some((box, j) => j !== i && over(box, boxes[i])))
            .map((node) => plot.id + ": " + node.textContent);
    })""")
    assert overlapping == []


def test_it_follows_the_theme_of_the_system(address, tmp_path):
    dark = browser.Page(address, tmp_path, dark=True, width=400)
    try:
        assert luminance(dark.run(color("body", "backgroundColor"))) < 50
        assert dark.run("document.getElementById('theme').textContent") == "Light"
        assert dark.errors == []
    finally:
        dark.close()
