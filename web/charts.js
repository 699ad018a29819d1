// Live line charts on uPlot: bounded curves, smoothing, log scale, three x axes, zoom and pointer shared.

import { h, number } from "./lib.js";

const MOST_POINTS = 4000; // of a curve; one that grows beyond loses every second point
const COLOURS = ["#3d86d6", "#e0812a", "#3a9e68", "#c45c9a", "#8a71d6", "#b08d2e", "#2a9aa5", "#d25a52"];
const [GRID, MUTED] = ["#8883", "#808a96"]; // like the colours: to be seen on white and on black
const CHARTS = [
  { key: "loss", title: "loss, nats a token", log: true },
  { key: "learning_rate", title: "learning rate", log: true },
  { key: "grad_norm", title: "gradient norm", log: true },
  { key: "tokens_per_second", title: "speed, tokens/s" },
  { key: "peak_memory_gib", title: "peak memory, GiB" },
  { key: "mfu", title: "model FLOP utilisation, %" },
];
const drawn = new Map(); // key of a chart -> {plot, shape, box}

const bounded = (points) => (points.length > MOST_POINTS ? points.filter((_, i) => i % 2 === 0) : points);

/** The lines of one run; validation losses apart, so that thinning keeps the rare ones. */
export class Curve {
  train = [];
  validation = [];

  add(lines) {
    const having = (key) => lines.filter((line) => Number.isFinite(line[key]));
    this.train = bounded([...this.train, ...having("loss")]);
    this.validation = bounded([...this.validation, ...having("val_loss")]);
  }
}

/** Exponential moving average, unbiased at the start (as in Adam, Kingma & Ba 2015). */
function smoothed([xs, ys], weight) {
  let [mean, mass] = [0, 0];
  const smooth = (y) => {
    mean = weight * mean + (1 - weight) * y;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  };
  return [xs, ys.map(smooth)];
}

/** [xs, ys] of one value, without what the scale cannot show. */
function points(lines, key, { x, log, perplexity }) {
  const usable = (line) => Number.isFinite(line[x]) && Number.isFinite(line[key]) && !(log && line[key] <= 0);
  const y = (value) => (perplexity ? Math.exp(value) : key === "mfu" ? 100 * value : value);
  const shown = lines.filter(usable);
  return [shown.map((line) => line[x]), shown.map((line) => y(line[key]))];
}

/** The lines of a chart; the loss has a faint raw one, a smooth one and a dashed one for validation. */
function linesOf(key, curves, options) {
  const lines = curves.flatMap(([run, curve], i) => {
    const colour = COLOURS[i % COLOURS.length];
    const data = points(curve.train, key, options);
    const smooth = { label: run, colour, data: smoothed(data, options.smooth) };
    if (key !== "loss") return [smooth];
    const raw = { label: `${run} raw`, colour, data: options.smooth > 0 ? data : [[]], faint: true };
    const other = curves.length === 1 ? COLOURS[1] : colour;
    const validation = points(curve.validation, "val_loss", options);
    const dashed = { label: `${run} validation`, colour: other, data: validation, dashed: true };
    return [raw, { ...smooth, label: `${run} training` }, dashed];
  });
  return lines.filter((line) => line.data[0].length);
}

/** Draws each chart that has data. curves: [[run, Curve], ...]; options: x, log, smooth, perplexity. */
export function drawCharts(host, curves, options) {
  for (const chart of CHARTS) {
    const perplexity = options.perplexity && chart.key === "loss";
    const scale = { x: options.x, log: options.log && chart.log, perplexity };
    drawOne(host, chart, linesOf(chart.key, curves, { ...options, ...scale }), scale);
  }
}

function drop(key) {
  drawn.get(key)?.plot.destroy();
  drawn.get(key)?.box.remove();
  drawn.delete(key);
}

function drawOne(host, chart, lines, scale) {
  if (!lines.length) return drop(chart.key);
  const shape = JSON.stringify([lines.map((line) => line.label), scale]);
  const data = uPlot.join(lines.map((line) => line.data));
  const old = drawn.get(chart.key);
  if (old?.shape === shape) return update(old.plot, data);
  drop(chart.key);
  const box = h("figure", { class: "chart", "data-chart": chart.key });
  host.append(box);
  const plot = new uPlot(settings(chart, lines, scale, box), data, box);
  return drawn.set(chart.key, { plot, shape, box });
}

/** New data; a chart that the person has zoomed keeps its view. */
function update(plot, data) {
  const { min, max } = plot.scales.x;
  const zoomed = min > plot.data[0][0] || max < plot.data[0].at(-1);
  plot.setData(data, !zoomed);
  if (zoomed) plot.redraw();
}

function settings(chart, lines, { x, log, perplexity }, box) {
  const values = (_, splits) => splits.map((value) => (value === null ? "" : number(value)));
  const axis = { values, grid: { stroke: GRID, width: 1 }, stroke: MUTED, ticks: { show: false } };
  const tight = log ? (_, low, high) => [low / 1.05, high * 1.05] : undefined;
  return {
    title: perplexity ? "perplexity" : chart.title,
    width: box.clientWidth - 14,
    height: chart.key === "loss" ? 300 : 190,
    cursor: { sync: { key: "lab" } },
    scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: tight } },
    axes: [{ ...axis, size: 30 }, { ...axis, size: 56 }],
    series: [{ label: x, value: valueAt }, ...lines.map(series)],
  };
}

function series({ label, colour, data, faint, dashed }) {
  const stroke = faint ? `${colour}55` : colour;
  const dash = dashed ? [6, 3] : undefined;
  const show = dashed && data[0].length < 60;
  return { label, stroke, dash, points: { show }, width: faint ? 1 : 1.75, spanGaps: true, value: valueAt };
}

/** What the legend says: the value under the pointer, else the last one before it. */
function valueAt(plot, _, line, index) {
  const values = plot.data?.[line] ?? [];
  return number(values.slice(0, (index ?? values.length) + 1).findLast(Number.isFinite));
}

/** Keeps the charts as wide as their boxes. */
export function followWidth(host) {
  const width = (box) => Math.max(100, box.clientWidth - 14);
  const fit = ({ plot, box }) => plot.setSize({ width: width(box), height: plot.height });
  new ResizeObserver(() => requestAnimationFrame(() => drawn.forEach(fit))).observe(host);
}
