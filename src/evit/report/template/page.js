"use strict";
const root = document.documentElement;
const charts = JSON.parse(document.getElementById("charts").textContent);
const MARKS = {
  circle: "●", square: "■", diamond: "◆", star: "★",
  "triangle-up": "▲", "triangle-down": "▼", "triangle-left": "◀", "triangle-right": "▶",
  "circle-open": "○", "square-open": "□", "diamond-open": "◇", "star-open": "☆",
  "triangle-up-open": "△", "triangle-down-open": "▽", "triangle-left-open": "◁", "triangle-right-open": "▷",
};
// Of a label: how far to the right of its point and below it.
const PLACES = [[0, -1], [0, 1], [1, 0], [-1, 0], [1, -1], [-1, -1], [1, 1], [-1, 1]];
const isDark = () =>
  (root.style.colorScheme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

// The value of a colour of page.css in the theme that is on.
function color(name) {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`;
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function themed(layout) {
  const line = color("--line");
  const axis = {
    automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, showline: true, ticks: "outside", tickcolor: line,
    tickangle: 0,
  };
  return {
    ...layout,
    font: { family: "system-ui, sans-serif", size: 13, color: color("--text") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: color("--card"), bordercolor: line, font: { color: color("--text") }, align: "left" },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}

// An axis title in lines of about so many pixels.
function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && 7 * (lines.at(-1).length + word.length) > width) lines.push("");
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return { text: lines.join("<br>"), font: { size: 13 } };
}

function draw(chart) {
  const box = document.getElementById(chart.id);
  const view = chart.views[chart.view];
  const data = view.data.map((trace) => ({
    ...trace,
    visible: !chart.hidden.has(trace.name),
  }));
  const layout = themed(view.layout);
  layout.xaxis.title = wrapped(layout.xaxis.title.text, box.clientWidth - 90);
  layout.yaxis.title = wrapped(layout.yaxis.title.text, box.clientHeight - 110);
  Plotly.react(box, data, layout, { responsive: true, displayModeBar: false });
  box.removeAllListeners("plotly_afterplot");
  box.on("plotly_afterplot", () => declutter(box));
  declutter(box);
  drawLegend(chart, view);
}

// Each label goes where it lies on no other, on no point and over no edge, with least of lines and bars behind it.
// Those that find no place are left out: hovering shows them.
function declutter(box) {
  const labels = [...box.querySelectorAll(".textpoint text")].reverse();
  if (!labels.length) return;
  const edge = box.querySelector(".nsewdrag").getBoundingClientRect();
  const points = [...box.querySelectorAll(".points path")].map((point) => point.getBoundingClientRect());
  const kept = points.map((p) => ({ left: p.left + 3, right: p.right - 3, top: p.top + 3, bottom: p.bottom - 3 }));
  const behind = [...box.querySelectorAll("path.js-line, .errorbar path")].flatMap(along);
  const written = [];
  for (const label of labels) {
    label.style.translate = "";
    const a = label.getBoundingClientRect();
    const texts = [...label.closest(".trace").querySelectorAll(".textpoint text")];
    const point = label.closest(".trace").querySelectorAll(".points path")[texts.indexOf(label)].getBoundingClientRect();
    const [x, y] = [(point.left + point.right) / 2, (point.top + point.bottom) / 2];
    const places = PLACES.map(([right, down]) => {
      const left = x - a.width / 2 + right * (a.width / 2 + (down ? 3 : 7));
      const top = y - a.height / 2 + down * (a.height / 2 + 6);
      return { left, top, right: left + a.width, bottom: top + a.height };
    });
    const free = places.filter((p) => p.left >= edge.left && p.right <= edge.right && p.bottom <= edge.bottom && kept.every(
      (k) => p.right < k.left || k.right < p.left || p.bottom < k.top || k.bottom < p.top));
    const hits = (p) => behind.filter(([u, v]) => u > p.left && u < p.right && v > p.top && v < p.bottom).length;
    const best = free.map((p) => [hits(p), p]).sort((p, q) => p[0] - q[0])[0]?.[1];
    const twice = written.some(([text, u, v]) => text === label.textContent && Math.hypot(u - x, v - y) < 6);
    label.style.visibility = best && !twice ? "" : "hidden";
    if (!best || twice) continue;
    label.style.translate = `${best.left - a.left}px ${best.top - a.top}px`;
    kept.push(best);
    written.push([label.textContent, x, y]);
  }
}

// Points of the screen along a line.
function along(path) {
  const matrix = path.getScreenCTM();
  const count = Math.ceil(path.getTotalLength() / 5);
  return Array.from({ length: count }, (_, i) => {
    const point = path.getPointAtLength(5 * i).matrixTransform(matrix);
    return [point.x, point.y];
  });
}

function drawLegend(chart, view) {
  const box = document.querySelector(`[data-chart="${chart.id}"] .legend`);
  const first = new Map(view.data.map((trace) => [trace.name, trace]).reverse());
  box.replaceChildren(...[...first.values()].reverse().map((trace) => {
    const key = document.createElement("button");
    const mark = key.appendChild(document.createElement("i"));
    mark.dataset.mark = MARKS[trace.marker.symbol];
    mark.style.color = trace.line.color;
    key.append(trace.name);
    key.setAttribute("aria-pressed", !chart.hidden.has(trace.name));
    key.onclick = () => {
      chart.hidden.delete(trace.name) || chart.hidden.add(trace.name);
      draw(chart);
    };
    return key;
  }));
}

// Of the buttons of a switch one is pressed.
function switched(buttons, choose) {
  buttons.forEach((button, i) => {
    button.onclick = () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", other === button));
      choose(i);
    };
  });
}

for (const chart of charts) {
  chart.view = 0;
  chart.hidden = new Set();
  switched(document.querySelectorAll(`[data-chart="${chart.id}"] .switch button`), (i) => {
    chart.view = i;
    draw(chart);
  });
}

const sheets = document.querySelectorAll("#papers .sheet");
const show = (i) => sheets.forEach((sheet, j) => { sheet.hidden = i !== j; });
switched(document.querySelectorAll("#papers .switch button"), show);
show(0);

const theme = document.getElementById("theme");
function drawAll() {
  theme.textContent = isDark() ? "Light" : "Dark";
  charts.forEach(draw);
}
theme.onclick = () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  drawAll();
};
matchMedia("(prefers-color-scheme: dark)").onchange = drawAll;
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) drawAll();
  width = innerWidth;
});
drawAll();
