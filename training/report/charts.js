"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const METRICS = DATA.metrics, STEPS = METRICS.step;
const tip = document.getElementById("tip");

// Every text goes in as textContent: nothing that a model or a tool wrote becomes markup.
function element(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "text", "circle", "g"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e4) {
    const power = Math.min(Math.floor(Math.log10(size) / 3), 5);
    return +(value / 1000 ** power).toPrecision(3) + ["", "k", "M", "G", "T", "P"][power];
  }
  if (size && size < 1e-3) return value.toExponential(1).replace(".0", "").replaceAll("-", "−");
  return String(+value.toPrecision(4)).replace("-", "−");
}

function showTip(event, text) {
  tip.textContent = text;
  tip.hidden = false;
  const x = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 16;
  tip.style.left = Math.max(4, x) + "px";
  tip.style.top = (below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : below) + "px";
}
const hideTip = () => { tip.hidden = true; };

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999);
  const found = [];
  for (let x = Math.ceil(low / size - 1e-9) * size; x <= high + size * 1e-6; x += size) found.push(+x.toPrecision(12));
  return found;
}

function smoothed(points) {
  const half = points.length > 200 ? 10 : 2;
  return points.map(([x], i) => {
    const part = points.slice(Math.max(0, i - half), i + half + 1);
    return [x, part.reduce((sum, p) => sum + p[1], 0) / part.length];
  });
}

// Frame of a chart: axes, grid, and the two maps from values to pixels.
function frame(holder, low, high, { log = false, bands = false } = {}) {
  const width = Math.max(holder.clientWidth, 280), height = bands ? 260 : 200;
  const left = 52, right = 10, top = 8, bottom = 38;
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img" });
  const pad = bands ? 0.5 : 0, first = STEPS[0] - pad, last = Math.max(STEPS[STEPS.length - 1], STEPS[0] + 1) + pad;
  const from = DATA.evaluations.length && !bands ? Math.min(first, DATA.evaluations[0].step) : first;
  const x = (step) => left + ((step - from) / (last - from)) * (width - left - right);
  const place = log ? Math.log10 : (v) => v;
  const y = (v) => height - bottom - ((place(v) - place(low)) / (place(high) - place(low))) * (height - top - bottom);
  let marks;
  if (log) {
    const powers = Math.round(Math.log10(high / low)), every = Math.ceil(powers / 5);
    marks = [];
    for (let i = 0; i <= powers; i += every) marks.push(low * 10 ** i);
  } else marks = ticks(low, high, 4);
  for (const mark of marks) {
    svg.append(element("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }));
    svg.append(element("text", { x: left - 7, y: y(mark) + 4, "text-anchor": "end" }, format(mark)));
  }
  svg.append(element("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  const labels = ticks(from, last, Math.max(2, Math.floor(width / 110))).filter((step) => Number.isInteger(step) && step >= from);
  for (const step of labels)
    svg.append(element("text", { x: x(step), y: height - bottom + 16, "text-anchor": "middle" }, String(step)));
  svg.append(element("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, "step"));
  return { svg, x, y, width, height, left, right, top, bottom };
}

// A cursor at the nearest row under the pointer, and what stands there.
function hover({ svg, x, top, height, bottom }, describe) {
  const cursor = element("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    let nearest = 0;
    STEPS.forEach((step, i) => { if (Math.abs(x(step) - at) < Math.abs(x(STEPS[nearest]) - at)) nearest = i; });
    cursor.setAttribute("x1", x(STEPS[nearest]));
    cursor.setAttribute("x2", x(STEPS[nearest]));
    cursor.setAttribute("visibility", "visible");
    showTip(event, `step ${STEPS[nearest]}\n` + describe(nearest));
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); hideTip(); });
}

const key = (kind, name) => element("span", {}, element("i", { class: "swatch " + kind }), name);
const path = (points) => points.map(([x, y], i) => (i ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1)).join("");

function lineChart(holder, chart) {
  const series = [];
  for (const [metric, name] of Object.entries(chart.series)) {
    const points = STEPS.map((step, i) => [step, METRICS[metric][i]]).filter((p) => p[1] !== null && (!chart.log || p[1] > 0));
    const same = series.find((one) => String(one.points) === String(points));
    if (same) same.name += " = " + name; // one would hide the other
    else series.push({ metric, name, points, kind: "colour-" + series.length });
  }
  const dots = chart.evaluations ? DATA.evaluations : [];
  const modes = [...new Set(dots.map((dot) => dot.mode))];
  const kindOf = (mode) => "colour-" + (series.length + modes.indexOf(mode));
  const keys = element("div", { class: "keys" });
  for (const one of series) keys.append(key(one.kind, one.name));
  for (const mode of modes) keys.append(key(kindOf(mode), "accuracy, " + mode));
  holder.replaceChildren(element("h3", {}, chart.title), element("div", { class: "quiet" }, chart.note), keys);
  const values = series.flatMap((one) => one.points.map((p) => p[1])).concat(dots.flatMap((d) => [d.accuracy_low, d.accuracy_high]));
  if (!values.length) { keys.replaceChildren("always 0"); return; }
  let low = Math.min(...values), high = Math.max(...values);
  if (chart.log) { low = 10 ** Math.floor(Math.log10(low) + 1e-9); high = Math.max(10 ** Math.ceil(Math.log10(high) - 1e-9), low * 10); }
  else if (chart.share) { low = 0; high = 1; }
  else {
    if (chart.zero) low = Math.min(0, low);
    if (high === low) { const around = Math.abs(high) * 0.5 || 1; high += around; if (!chart.zero) low -= around; }
    const room = (high - low) * 0.06;
    if (!chart.zero || low < 0) low -= room;
    high += room;
  }
  const drawing = frame(holder, low, high, { log: chart.log });
  const { svg, x, y } = drawing;
  for (const { points, kind, name } of series) {
    const placed = points.map(([step, value]) => [x(step), y(value)]);
    const few = placed.length <= 12;
    if (!few) svg.append(element("path", { class: "raw " + kind, d: path(placed), fill: "none" }));
    svg.append(element("path", { class: "smooth " + kind, d: path(few ? placed : smoothed(placed)), "data-series": name }));
    if (placed.length === 1) svg.append(element("circle", { class: kind, cx: placed[0][0], cy: placed[0][1], r: 3 }));
  }
  for (const dot of dots) {
    const kind = kindOf(dot.mode), at = x(dot.step);
    svg.append(element("line", { class: kind, x1: at, x2: at, y1: y(dot.accuracy_low), y2: y(dot.accuracy_high) }));
    svg.append(element("circle", { class: kind, cx: at, cy: y(dot.accuracy), r: 3.5 }));
  }
  hover(drawing, (i) => {
    const lines = series.map((one) => `${one.name}: ${format(METRICS[one.metric][i])}`);
    for (const dot of dots) if (dot.step === STEPS[i]) lines.push(`accuracy, ${dot.mode}: ${format(dot.accuracy)}`);
    return lines.join("\n");
  });
  holder.append(svg);
}

function timeChart(holder) {
  const columns = DATA.parts.map((part) => [part, METRICS["time/" + part]]);
  const totals = STEPS.map((_, i) => columns.reduce((sum, [, values]) => sum + (values[i] || 0), 0));
  const keys = element("div", { class: "keys" });
  for (const [part] of columns) keys.append(key("part-" + part, part.replace("_", " ")));
  holder.replaceChildren(element("h3", {}, "Seconds of each step"), keys);
  const drawing = frame(holder, 0, Math.max(...totals) * 1.04 || 1, { bands: true });
  const { svg, x, y, width, left, right } = drawing;
  const room = (width - left - right) / Math.max(STEPS.length, 1), thick = Math.max(1, Math.min(40, room * 0.86));
  STEPS.forEach((step, i) => {
    let below = 0;
    for (const [part, values] of columns) {
      const seconds = values[i] || 0;
      if (seconds) {
        const box = { x: x(step) - thick / 2, width: thick, y: y(below + seconds), height: y(below) - y(below + seconds) };
        svg.append(element("rect", { class: "part-" + part, ...box }));
      }
      below += seconds;
    }
  });
  hover(drawing, (i) => columns.filter(([, values]) => values[i]).map(([part, values]) =>
    `${part.replace("_", " ")}: ${format(values[i])} s, ${Math.round((100 * values[i]) / totals[i])}%`).join("\n") + `\ntogether: ${format(totals[i])} s`);
  holder.append(svg);
}

const drawings = [];
for (const group of ["learning", "speed"])
  for (const chart of DATA.charts[group]) {
    const holder = element("div", { class: "chart" });
    document.getElementById(group + "-charts").append(holder);
    drawings.push(() => lineChart(holder, chart));
  }
if (DATA.parts.length) drawings.push(() => timeChart(document.getElementById("time-chart")));
const metric = document.getElementById("metric");
for (const name of Object.keys(METRICS).filter((name) => name !== "step").sort()) metric.append(element("option", {}, name));
if ("learning_rate" in METRICS) metric.value = "learning_rate";
const drawMetric = () =>
  lineChart(document.getElementById("metric-chart"), { title: "", note: "", series: { [metric.value]: metric.value } });
if (metric.options.length) drawings.push(drawMetric);
metric.addEventListener("change", drawMetric);
const drawAll = () => drawings.forEach((draw) => draw());
drawAll();
let resized;
window.addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawAll, 150); });
