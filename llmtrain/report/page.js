"use strict";
// Draws the charts of the page from its data, and sorts its table. plotly.js is in the page.
const charts = JSON.parse(document.getElementById("charts").textContent);
const find = (id) => document.getElementById(id);
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;
const OPTIONS = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };
const FEW = 8; // runs that get a colour each
const HUES = [
  ["#1f6f8b", "#c05621", "#4a7c3a", "#8b4a8b", "#a67c00", "#4b5fa8", "#a83c52", "#56707f"],
  ["#6cc0da", "#eb9662", "#92c983", "#cf98cf", "#d9b65a", "#99a9ea", "#ea8a9c", "#a3bac6"],
];

function axis(title, more) {
  return {
    title: { text: title, font: { color: ink("quiet"), size: 13 }, standoff: 10 },
    gridcolor: ink("grid"), linecolor: ink("line"), zeroline: false, automargin: true,
    tickfont: { color: ink("quiet"), size: 12 }, ...more,
  };
}

function layout(x, y, more) {
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: ink("ink"), size: 13 },
    margin: { l: 8, r: 12, t: 12, b: 8 }, showlegend: false, hovermode: "closest", dragmode: "zoom",
    hoverlabel: { bgcolor: ink("surface"), bordercolor: ink("line"), font: { color: ink("ink"), size: 13 }, align: "left" },
    ...(x ? { xaxis: x, yaxis: y } : {}), ...more,
  };
}

// --- loss -------------------------------------------------------------------------------------

const AXES = {
  steps: { title: "steps", of: (run, curve) => curve.steps },
  tokens: { title: "tokens", of: (run, curve) => curve.steps.map((step) => step * run.tokensPerStep), needs: (run) => run.tokensPerStep },
  FLOPs: {
    title: "training FLOPs", of: (run, curve) => curve.steps.map((step) => step * run.tokensPerStep * run.flopsPerToken),
    needs: (run) => run.tokensPerStep && run.flopsPerToken,
  },
  time: { title: "", of: (run, curve) => curve.seconds.map((x) => (x === null ? null : x / timeUnit()[1])), needs: (run) => [...run.train.seconds, ...run.heldOut.seconds].some((x) => x !== null) },
};
const state = { axis: "steps", logX: false, logY: false, train: true, lit: null };

function timeUnit() {
  const most = Math.max(...charts.loss.runs.flatMap((run) => run.train.seconds.slice(-1)), 0);
  return [["days", 86400], ["hours", 3600], ["minutes", 60], ["seconds", 1]].find(([, size]) => most >= 2 * size) || ["seconds", 1];
}

function mixed(part) { // between the colours of the best run and of the worst
  const read = (name) => ink(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  const [low, high] = [read("scale-low"), read("scale-high")];
  return "rgb(" + low.map((value, i) => Math.round(value + (high[i] - value) * part)).join(",") + ")";
}

function colourOf(run) {
  const runs = charts.loss.runs;
  if (runs.length === 1) return ink("accent");
  if (runs.length <= FEW) return HUES[+isDark()][runs.indexOf(run)];
  if (!run.isDone) return ink("faded");
  const done = runs.filter((other) => other.isDone);
  const part = done.indexOf(run) / Math.max(1, done.length - 1);
  return mixed(Math.round(part * 8) / 8); // few colours: runs of one colour are drawn as one line
}

// Runs that look the same become one line with gaps: 300 runs are drawn as a dozen.
function lines(kind, width, opacity) {
  const groups = new Map();
  for (const run of charts.loss.runs.slice().reverse()) {
    const curve = run[kind];
    const colour = colourOf(run);
    const isFaded = charts.loss.runs.length > FEW && !run.isDone;
    if (!curve.losses.length) continue;
    if (!groups.has(colour)) groups.set(colour, { x: [], y: [], text: [], customdata: [], colour, isFaded });
    const group = groups.get(colour);
    append(group, run, kind);
  }
  const order = [...groups.values()].sort((a, b) => b.isFaded - a.isFaded);
  return order.map((group) => trace(group, kind, width, group.isFaded ? Math.min(opacity, 0.55) : opacity));
}

function append(group, run, kind) {
  const curve = run[kind];
  const xs = AXES[state.axis].of(run, curve);
  const text = escaped(run.label) + (run.state === "done" ? "" : ", " + escaped(run.state)) + (run.outcome ? "<br>" + escaped(run.outcome) : "");
  xs.forEach((x, i) => { group.x.push(x); group.y.push(curve.losses[i]); group.text.push(text); group.customdata.push(run.row); });
  group.x.push(null); group.y.push(null); group.text.push(""); group.customdata.push(null);
}

function trace(group, kind, width, opacity) {
  const what = kind === "train" ? "training" : "held-out";
  const isShort = group.y.length <= 240 && kind === "heldOut";
  return {
    type: "scatter", mode: isShort ? "lines+markers" : "lines", x: group.x, y: group.y, text: group.text, customdata: group.customdata,
    line: { color: group.colour, width }, marker: { size: 4.5, color: group.colour }, opacity, connectgaps: false,
    hovertemplate: "<b>%{y:.4f}</b> " + what + " at %{x:" + (state.axis === "FLOPs" ? ".3~e" : ".4~s") + "}" + (state.axis === "time" ? " " + timeUnit()[0] : "") + "<br>%{text}<extra></extra>",
  };
}

function emphasised() { // the best runs and the one that is pointed at, over all others
  const runs = charts.loss.runs;
  const chosen = runs.length > FEW ? runs.filter((run) => run.isBest || run.row === state.lit) : runs.filter((run) => run.row === state.lit);
  return chosen.map((run) => {
    const group = { x: [], y: [], text: [], customdata: [], colour: run.row === state.lit ? ink("bad") : ink("accent") };
    if (runs.length <= FEW) group.colour = colourOf(run);
    const kind = run.heldOut.losses.length ? "heldOut" : "train";
    append(group, run, kind);
    return trace(group, kind, 3.2, 1);
  });
}

function lossRange() { // without the heights of a run that diverged: a double click shows them
  const shown = charts.loss.runs.flatMap((run) => [...run.heldOut.losses, ...(state.train ? run.train.losses : [])]);
  const sorted = shown.filter((x) => x !== null && (!state.logY || x > 0)).sort((a, b) => a - b);
  if (sorted.length < 4) return undefined;
  const [low, high] = [sorted[0], sorted[sorted.length - 1]];
  const firsts = charts.loss.runs.map((run) => run.train.losses[0] ?? run.heldOut.losses[0]).filter((x) => x > 0).sort((a, b) => a - b);
  const usual = firsts.length ? firsts[Math.floor(firsts.length / 2)] : high; // where most began
  const top = high > 1.6 * usual ? 1.15 * usual : high;
  const margin = 0.04 * (top - low);
  return state.logY ? [Math.log10(low) - 0.02, Math.log10(top) + 0.02] : [low - margin, top + margin];
}

function drawLoss() {
  const runs = charts.loss.runs;
  const many = runs.length > FEW;
  const hasHeldOut = runs.some((run) => run.heldOut.losses.length);
  const title = state.axis === "time" ? timeUnit()[0] + " of training" : AXES[state.axis].title;
  const traces = [
    ...(state.train || !hasHeldOut ? lines("train", hasHeldOut ? 1 : 1.6, hasHeldOut ? 0.55 : 0.9) : []),
    ...lines("heldOut", many ? (runs.length > 60 ? 0.9 : 1.4) : 2.4, many ? 0.8 : 1), ...emphasised(),
  ];
  const x = axis(title, { type: state.logX ? "log" : "linear", rangemode: state.logX ? "normal" : "tozero", ...(state.logX ? { dtick: "D2" } : {}), exponentformat: state.axis === "FLOPs" ? "power" : "SI" });
  const y = axis("loss", { type: state.logY ? "log" : "linear", range: lossRange() });
  return Plotly.react("loss-chart", traces, layout(x, y), OPTIONS);
}

function legend() {
  const runs = charts.loss.runs;
  const box = find("loss-legend");
  box.replaceChildren();
  const item = (colour, text, row) => {
    const entry = document.createElement(row === undefined ? "span" : "button");
    const mark = document.createElement("i");
    mark.style.background = colour;
    entry.append(mark, text);
    if (row !== undefined) { entry.onmouseenter = () => light(row); entry.onmouseleave = () => light(null); }
    box.append(entry);
  };
  if (runs.length > 1 && runs.length <= FEW) runs.forEach((run) => item(colourOf(run), run.label, run.row));
  if (runs.length > FEW) {
    const ramp = document.createElement("span");
    const mark = document.createElement("i");
    mark.className = "ramp";
    ramp.append("best ", mark, "worst");
    box.append(ramp);
    if (runs.some((run) => !run.isDone)) item(ink("faded"), [...new Set(runs.filter((run) => !run.isDone).map((run) => run.state))].join(", "));
  }
  const hasBoth = state.train && runs.some((run) => run.heldOut.losses.length) && runs.some((run) => run.train.losses.length);
  if (hasBoth) box.append(Object.assign(document.createElement("span"), { textContent: "strong: held-out, light: training" }));
}

function light(row) {
  if (row === state.lit) return;
  state.lit = row;
  document.querySelectorAll("#runs tbody tr").forEach((line) => line.classList.toggle("lit", row !== null && +line.dataset.row === row));
  if (charts.loss.runs) drawLoss();
}

function axisSwitch() {
  const possible = Object.keys(AXES).filter((name) => !AXES[name].needs || charts.loss.runs.some(AXES[name].needs));
  for (const name of possible) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.setAttribute("aria-pressed", name === state.axis);
    button.onclick = () => {
      state.axis = name;
      find("loss-axis").querySelectorAll("button").forEach((other) => other.setAttribute("aria-pressed", other === button));
      drawLoss();
    };
    find("loss-axis").append(button);
  }
}

function startLoss() {
  const runs = charts.loss.runs;
  const hasHeldOut = runs.some((run) => run.heldOut.losses.length);
  const hasTrain = runs.some((run) => run.train.losses.length);
  state.train = runs.length <= 24;
  find("loss-train").checked = state.train;
  find("loss-train-label").hidden = !(hasHeldOut && hasTrain);
  axisSwitch();
  const bind = (id, name) => { find(id).onchange = (event) => { state[name] = event.target.checked; legend(); drawLoss(); }; };
  bind("loss-log-x", "logX");
  bind("loss-log-y", "logY");
  bind("loss-train", "train");
  drawLoss();
  find("loss-chart").on("plotly_click", (event) => light(event.points[0].customdata));
}

// --- the other charts ---------------------------------------------------------------------------

function dimension(part) {
  if (part.names) {
    const ticks = part.names.map((_, i) => i);
    return { label: part.title, values: part.values, tickvals: ticks, ticktext: part.names.map(escaped), range: [-0.3, part.names.length - 0.7] };
  }
  if (!part.isLogarithmic) return { label: part.title, values: part.values, ...(part.ticks.length ? { tickvals: part.ticks.map(([x]) => x), ticktext: part.ticks.map(([, text]) => text) } : {}) };
  const values = part.values.map(Math.log10);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const steps = part.ticks.length ? part.ticks : decades(low, high);
  return { label: part.title + " (log)", values, range: [low, high], tickvals: steps.map(([x]) => Math.log10(x)), ticktext: steps.map(([, text]) => text) };
}

function decades(low, high) { // 1, 2 and 5 of each power of ten that the axis covers
  const found = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power++)
    for (const digit of high - low > 2.5 ? [1] : [1, 2, 5]) {
      const value = digit * 10 ** power;
      if (Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9) found.push([value, value >= 1e-3 && value < 1e4 ? String(+value.toPrecision(1)) : value.toExponential(0)]);
    }
  return found;
}

function drawParallel() {
  const data = charts.parallel;
  const lines = { color: data.ranks, colorscale: [[0, ink("scale-low")], [1, ink("scale-high")]], cmin: 0, cmax: 1 };
  const plain = { color: ink("ink"), size: 12 };
  find("parallel-chart").style.minWidth = 125 * data.axes.length + "px";
  const axes = data.axes.map(dimension).map((part) => ({ ...part, label: escaped(part.label) }));
  const longest = Math.max(...(axes[0].ticktext || []).map((text) => text.length), 0); // stands left of the first axis
  Plotly.react("parallel-chart", [{
    type: "parcoords", dimensions: axes, line: lines,
    labelfont: { color: ink("ink"), size: 13 }, tickfont: plain, rangefont: { color: "rgba(0,0,0,0)", size: 1 },
    unselected: { line: { color: ink("faded"), opacity: 0.15 } },
  }], layout(null, null, { margin: { l: Math.max(70, 16 + 8 * longest), r: 60, t: 44, b: 20 } }), OPTIONS);
}

function drawImportance() {
  const { names, shares } = charts.importance;
  find("importance-chart").style.height = 64 + 30 * names.length + "px";
  const bars = {
    type: "bar", orientation: "h", y: names.map(escaped).reverse(), x: shares.slice().reverse(), marker: { color: ink("accent") }, width: 0.55,
    text: shares.map((share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + " %").reverse(), textposition: "outside", cliponaxis: false,
    textfont: { color: ink("ink") }, hoverinfo: "skip",
  };
  const x = axis("", { visible: false, range: [0, 1.12 * Math.max(...shares)], fixedrange: true });
  const y = axis("", { type: "category", showgrid: false, fixedrange: true, tickfont: { color: ink("ink"), size: 13 }, ticks: "", ticklabelstandoff: 8 });
  Plotly.react("importance-chart", [bars], layout(x, y), OPTIONS);
}

function drawProgress() {
  const data = charts.progress;
  const trials = {
    type: "scatter", mode: "markers", x: data.numbers, y: data.values, text: data.labels.map(escaped), cliponaxis: false,
    marker: { color: ink("accent"), size: 7, opacity: data.values.length > 60 ? 0.45 : 0.75, line: { width: 0 } },
    hovertemplate: "<b>%{y:.5~g}</b><br>%{text}<extra></extra>",
  };
  const best = { type: "scatter", mode: "lines", x: data.numbers, y: data.best, line: { color: ink("warn"), width: 2, shape: "hv" }, hoverinfo: "skip" };
  const y = axis(data.title, { type: data.isLogarithmic ? "log" : "linear" });
  Plotly.react("progress-chart", [best, trials], layout(axis("trial", { rangemode: "tozero" }), y), OPTIONS);
}

function drawReality() {
  const measures = charts.reality.measures;
  const ratios = measures.flatMap((measure) => measure.ratios);
  const traces = measures.map((measure, place) => ({
    type: "scatter", mode: "markers", x: measure.ratios, y: measure.ratios.map((_, i) => measures.length - 1 - place + 0.36 * (((i * 0.618034) % 1) - 0.5)),
    text: measure.labels.map(escaped), marker: { color: ink("accent"), size: 7, opacity: measure.ratios.length > 40 ? 0.35 : 0.7, line: { width: 0 } },
    hovertemplate: "<b>%{x:.2f}</b> of the plan<br>%{text}<extra></extra>",
  }));
  const [low, high] = [Math.min(0.5, ...ratios) / 1.1, Math.max(2, ...ratios) * 1.1];
  const steps = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000].filter((x) => x >= low && x <= high);
  const x = axis("measured ÷ planned", { type: "log", range: [Math.log10(low), Math.log10(high)], tickvals: steps, ticktext: steps.map(String), fixedrange: true });
  const y = axis("", { tickvals: measures.map((_, i) => measures.length - 1 - i), ticktext: measures.map((measure) => measure.title), range: [-0.5, measures.length - 0.5], showgrid: false, fixedrange: true, tickfont: { color: ink("ink"), size: 13 }, ticklabelstandoff: 8 });
  const one = { type: "line", x0: 1, x1: 1, yref: "paper", y0: 0, y1: 1, line: { color: ink("quiet"), width: 1, dash: "dot" } };
  find("reality-chart").style.height = 76 + 46 * measures.length + "px";
  Plotly.react("reality-chart", traces, layout(x, y, { shapes: [one] }), OPTIONS);
}

function drawScaling() {
  const { runs, law } = charts.scaling;
  const points = (isBest) => {
    const chosen = runs.filter((run) => run.isBest === isBest);
    const colour = isBest ? ink("accent") : ink("faded");
    return {
      type: "scatter", mode: isBest ? "markers+text" : "markers", x: chosen.map((run) => run.flops), y: chosen.map((run) => run.loss),
      text: chosen.map((run) => run.size), textposition: "bottom center", textfont: { color: ink("quiet"), size: 12 }, cliponaxis: false,
      customdata: chosen.map((run) => escaped(run.label) + "<br>" + run.size + " parameters"), marker: { size: isBest ? 9 : 6, color: colour, symbol: isBest ? "circle" : "circle-open" },
      hovertemplate: "<b>%{y:.4f}</b> at %{x:.3~g} FLOPs<br>%{customdata}<extra></extra>",
    };
  };
  const curve = law.flops ? [{ type: "scatter", mode: "lines", x: law.flops, y: law.losses, line: { color: ink("accent"), width: 1.5, dash: "dash" }, hoverinfo: "skip" }] : [];
  const x = axis("training FLOPs", { type: "log", exponentformat: "power", dtick: "D2" });
  const y = axis("held-out loss");
  Plotly.react("scaling-chart", [...curve, points(false), points(true)], layout(x, y, { margin: { l: 8, r: 24, t: 24, b: 8 } }), OPTIONS);
}

// --- the table -----------------------------------------------------------------------------------

function compareKeys(a, b, sign) { // what is missing comes last either way
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [Number(a), Number(b)];
  return sign * (Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, undefined, { numeric: true }) : x - y);
}

function sortBy(table, place) {
  const heads = [...table.tHead.rows[0].cells];
  const way = heads[place].getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[place].setAttribute("aria-sort", way);
  const key = (row) => row.cells[place].dataset.key;
  const rows = [...table.tBodies[0].rows].sort((a, b) => compareKeys(key(a), key(b), way === "ascending" ? 1 : -1));
  table.tBodies[0].append(...rows);
}

function startTable() {
  const table = find("runs");
  if (!table) return;
  [...table.tHead.rows[0].cells].forEach((head, place) => { head.onclick = () => sortBy(table, place); });
  table.tBodies[0].onclick = (event) => { const row = event.target.closest("tr"); light(+row.dataset.row === state.lit ? null : +row.dataset.row); };
  const filter = find("filter");
  if (filter) filter.oninput = () => filterRows(table, filter.value.toLowerCase().split(/\s+/));
}

function filterRows(table, words) {
  const rows = [...table.tBodies[0].rows];
  rows.forEach((row) => { row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)); });
  const shown = rows.filter((row) => !row.hidden).length;
  find("filter-count").textContent = shown === rows.length ? "" : shown + " of " + rows.length;
}

function draw() {
  const drawn = { loss: () => { legend(); drawLoss(); }, progress: drawProgress, parallel: drawParallel, importance: drawImportance, scaling: drawScaling, reality: drawReality };
  for (const [name, chart] of Object.entries(charts)) if (Object.keys(chart).length) drawn[name]();
}

startTable();
if (charts.loss.runs) startLoss();
draw();
document.documentElement.dataset.drawn = "all";
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
