"use strict";
const root = document.documentElement;
const charts = JSON.parse(document.getElementById("charts").textContent);
const MARKS = {
  circle: "●", square: "■", "triangle-up": "▲", diamond: "◆",
  "circle-open": "○", "square-open": "□", "triangle-up-open": "△", "diamond-open": "◇",
};
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

// Labels that would lie on one another, on a point or over the edge are left out: hovering shows them.
function declutter(box) {
  const edge = box.querySelector(".nsewdrag").getBoundingClientRect();
  const points = [...box.querySelectorAll(".points path")].map((point) => point.getBoundingClientRect());
  const kept = points.map((p) => ({ left: p.left + 3, right: p.right - 3, top: p.top + 3, bottom: p.bottom - 3 }));
  for (const label of [...box.querySelectorAll(".textpoint text")].reverse()) {
    const a = label.getBoundingClientRect();
    const apart = (b) => a.right < b.left || b.right < a.left || a.bottom < b.top || b.bottom < a.top;
    const free = a.left >= edge.left && a.right <= edge.right && kept.every(apart);
    if (free) kept.push(a);
    label.style.visibility = free ? "" : "hidden";
  }
}

function drawLegend(chart, view) {
  const box = document.querySelector(`[data-chart="${chart.id}"] .legend`);
  const first = new Map(view.data.map((trace) => [trace.name, trace]).reverse());
  box.replaceChildren(...[...first.values()].reverse().map((trace) => {
    const key = document.createElement("button");
    const mark = key.appendChild(document.createElement("i"));
    mark.textContent = MARKS[trace.marker.symbol];
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
