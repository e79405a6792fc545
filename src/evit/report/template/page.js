"use strict";
const root = document.documentElement;
const charts = JSON.parse(document.getElementById("charts").textContent);
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

// Text that plotly takes neither for HTML nor for a formula.
function literal(text) {
  const special = { "&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;" };
  return text.replace(/[&<>$]/g, (c) => special[c]);
}

// The layout in the colours of the theme; on a narrow screen the legend goes below.
function layout(view, box) {
  const line = color("--line");
  const axis = { automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, showline: true, tickangle: 0 };
  const small = box.clientWidth < 700;
  const title = (text) => ({ text: literal(text), font: { size: small ? 11 : 13 } });
  const below = { orientation: "h", x: 0, y: -0.2, yanchor: "top", font: { size: 11 } };
  return {
    margin: { l: 10, r: 24, t: 10, b: 10 },
    hovermode: "closest",
    font: { family: "system-ui, sans-serif", size: 13, color: color("--text") },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    hoverlabel: { bgcolor: color("--card"), bordercolor: line, font: { color: color("--text") }, align: "left" },
    legend: small ? below : { font: { size: 12 } },
    xaxis: { ...axis, title: title(view.x) },
    yaxis: { ...axis, title: title(view.y) },
  };
}

function draw(chart) {
  const box = document.getElementById(chart.id);
  const view = chart.views[chart.view];
  const data = view.data.map((trace) =>
    ({ ...trace, name: literal(trace.name), hovertext: trace.hovertext.map(literal) }));
  Plotly.react(box, data, layout(view, box), { responsive: true, displayModeBar: false });
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
  switched(document.querySelectorAll(`[data-chart="${chart.id}"] .switch button`), (i) => {
    chart.view = i;
    draw(chart);
  });
}

const sheets = document.querySelectorAll("#papers .sheet");
const show = (i) => sheets.forEach((sheet, j) => { sheet.hidden = i !== j; });
switched(document.querySelectorAll("#papers .switch button"), show);
show(0);

const dialog = document.querySelector("dialog");
for (const button of document.querySelectorAll(".pictures button")) {
  button.onclick = () => {
    dialog.firstElementChild.src = button.firstElementChild.src;
    dialog.firstElementChild.alt = button.firstElementChild.alt;
    dialog.showModal();
  };
}
dialog.onclick = () => dialog.close();

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
