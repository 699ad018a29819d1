// Runs: the list, live curves, one run's page, the comparison of ticked runs, a text through all checkpoints.

import { $, api, attempt, duration, h, number, on, runQuery, stored, table, text, tie } from "./lib.js";
import { Curve, drawCharts, followWidth } from "./charts.js";

const HEAD = ["", "run", "stage", "state", "step", "loss", "val. loss", "tokens/s", "time left"];
const SMOKE = "A smoke run: it was cut short, and its results are not meaningful.";
const USUAL = { ticked: null, x: "step", smooth: "0", log: false, perplexity: false, prompt: "One day" };
const state = stored("runs", USUAL);
const curves = new Map(); // run -> Curve, of the watched runs only
const rowElements = new Map(); // run -> its table row, kept so that clicks and focus survive the updates
let app; // {watch, loadModels}
let rows = []; // what the server last said of all runs
let opened = ""; // the run whose page is shown; "": the list
let page = null; // what /lab/run said of the opened run
let watched = null; // names of the watched runs, joined
let texts = []; // [label, prompt, text] of each checkpoint of the opened run, oldest first
let samples = []; // of the opened run, the newest last
let timer = 0;

export function startRuns(given) {
  app = given;
  for (const name of ["x", "smooth", "log", "perplexity"]) tie(`chart-${name}`, state, name, draw);
  tie("walk-prompt", state, "prompt");
  on("submit", { walk });
  on("input", { "walk-step": showStep });
  on("click", { pause: order, resume: order });
  $("run-list").append(table(HEAD, []));
  followWidth($("charts"));
  select();
}

/** Shows the list (name "") or the page of one run. */
export function showRuns(name) {
  [opened, page, texts, samples] = [name, null, [], []];
  $("run-list").hidden = Boolean(name);
  $("run-page").hidden = $("run-details").hidden = !name;
  for (const id of ["run-facts", "samples"]) $(id).replaceChildren();
  showStep();
  select();
  showHead();
  refreshPage();
}

const rowOf = (name) => rows.find((row) => row.name === name);
const hasFolder = (name) => Number.isFinite(rowOf(name)?.step); // one that only begins has none

/** Watches what is shown: the opened run, or the ticked ones. */
function select() {
  const names = (opened ? [opened] : state.ticked ?? []).filter(hasFolder);
  const key = [opened, ...names].join(); // the page of a run needs its samples again
  $("chart-bar").hidden = !names.length;
  if (key === watched) return;
  watched = key;
  curves.clear();
  draw();
  app.watch(names);
  compare(names, key);
}

export function onWatch(data, event) {
  if (event === "runs") showRows(data);
  if (event === "samples" && data.run === opened) showSamples(data);
  if (event !== "curve") return;
  if (data.reset || !curves.has(data.run)) curves.set(data.run, new Curve());
  curves.get(data.run).add(data.lines);
  timer ||= setTimeout(draw, 300);
}

function draw() {
  clearTimeout(timer);
  timer = 0;
  const sorted = [...curves].sort(([a], [b]) => a.localeCompare(b));
  drawCharts($("charts"), sorted, { ...state, smooth: Number(state.smooth) });
}

// ---------------------------------------------------------------------- The list
function showRows(data) {
  const states = (list) => JSON.stringify(list.map((row) => [row.name, row.state, row.has_results]));
  const newestFirst = [...data].reverse();
  const news = states(rows) !== states(newestFirst) || !data.length;
  rows = newestFirst;
  if (rows.length) state.ticked ??= rows.map((row) => row.name).filter(hasFolder).slice(0, 1);
  rows.forEach(showLine);
  $("empty").hidden = rows.length > 0;
  $("run-list").lastChild.hidden = !rows.length;
  select();
  showHead();
  if (!news) return;
  $("run-list").querySelector("tbody").replaceChildren(...rows.map((row) => rowElements.get(row.name)));
  app.loadModels();
  refreshPage();
}

function showLine(row) {
  if (!rowElements.has(row.name)) rowElements.set(row.name, newLine(row));
  const line = rowElements.get(row.name);
  const left = timeLeft(row);
  const figures = [number(row.loss), number(row.val_loss), number(row.tokens_per_second, 3), left];
  const values = [row.stage, row.state, `${number(row.step)} / ${number(row.max_steps)}`, ...figures];
  values.forEach((value, i) => (line.cells[i + 2].textContent = value));
  line.dataset.state = row.state;
  line.style.setProperty("--done", `${(100 * row.step) / row.max_steps}%`);
  line.querySelector(".tick").checked = state.ticked.includes(row.name);
}

function timeLeft({ state, step, max_steps: most, step_seconds: seconds }) {
  return state === "running" && seconds && most > step ? duration((most - step) * seconds) : "";
}

function newLine({ name, smoke }) {
  const tick = h("input", { type: "checkbox", class: "tick", "aria-label": `show the curves of ${name}` });
  tick.addEventListener("change", () => {
    const others = state.ticked.filter((one) => one !== name && rowOf(one));
    state.ticked = tick.checked ? [...others, name] : others;
    select();
  });
  const link = h("a", { class: "open", href: `#runs/${encodeURIComponent(name)}` }, name);
  const mark = smoke ? h("span", { class: "mark", "data-tip": SMOKE }, "smoke") : null;
  const cells = HEAD.map((_, i) => h("td", {}, [[tick], [link, mark]][i] ?? []));
  return h("tr", { "data-run": name }, cells);
}

const bullets = (list) => h("ul", {}, list.length ? list.map((line) => h("li", {}, line)) : "None.");
const section = (title, ...content) => h("div", {}, h("h2", {}, title), ...content);

async function compare(names, key) {
  $("compare").replaceChildren();
  if (names.length < 2) return;
  const found = await attempt(() => api(`lab/compare?${runQuery(names)}`));
  if (!found || key !== watched) return;
  const seen = Object.entries(found.observations).flatMap(([run, list]) => [h("h3", {}, run), bullets(list)]);
  const differences = section("Settings that differ", table(found.differences.head, found.differences.rows));
  $("compare").replaceChildren(differences, section("Observations", ...seen));
}

// ---------------------------------------------------------------------- One run's page
function showHead() {
  const row = rowOf(opened) ?? { state: "not found", stage: "there is no such run in this folder" };
  const left = timeLeft(row) && `, ${timeLeft(row)} left`;
  $("run-name").textContent = opened;
  $("run-page").dataset.state = $("run-state").textContent = row.state;
  $("run-now").textContent = `${row.stage}, step ${number(row.step)} of ${number(row.max_steps)}${left}`;
  $("pause").hidden = row.state !== "running";
  $("resume").hidden = !["interrupted", "lost", "failed"].includes(row.state);
  $("run-error").hidden = !row.error || !["failed", "lost"].includes(row.state);
  $("run-error").textContent = row.error;
}

async function order({ target }) {
  target.disabled = true;
  await attempt(() => api(`lab/${target.id}`, { name: opened }));
  target.disabled = false;
}

async function refreshPage() {
  const name = opened;
  const known = hasFolder(name) || rowOf(name)?.state === "failed";
  const found = known && await attempt(() => api(`lab/run?name=${encodeURIComponent(name)}`));
  if (!found || name !== opened) return;
  page = found;
  const bold = (key, value) => (page.changed.includes(key) ? h("b", {}, text(value)) : value);
  const settings = Object.entries(page.settings).map(([key, value]) => [bold(key, key), bold(key, value)]);
  const none = h("p", { class: "muted" }, "No results yet: evaluate the run with eval.py.");
  const { head, rows: results } = page.results;
  const changed = h("summary", {}, `Settings (${page.changed.length} changed: bold)`);
  const log = [h("summary", {}, "End of the log"), h("pre", { id: "run-log" }, page.log)];
  $("run-facts").replaceChildren(
    section("Results", h("div", { id: "results" }, results.length ? table(head, results) : none)),
    section("Observations", bullets(page.observations)),
    page.todo.length ? section("Still to do", bullets(page.todo)) : "",
    h("details", { id: "settings" }, changed, table(["setting", "value"], settings)),
    h("details", { open: Boolean(rowOf(name).error) }, log),
  );
}

function showSamples({ reset, lines }) {
  samples = [...(reset ? [] : samples), ...lines].slice(-60);
  const words = (one) => h("p", {}, h("span", { class: "muted" }, one.prompt), one.text);
  const item = (one) => h("li", {}, h("b", {}, `step ${number(one.step)}`), words(one));
  const list = h("ol", { class: "scroll", tabindex: 0 }, samples.map(item).reverse());
  $("samples").replaceChildren(section("Samples by step", list));
  refreshPage(); // a sample comes with an evaluation, and often with a checkpoint
}

/** Completes one text by every checkpoint, with the same seed; the slider walks through the answers. */
async function walk() {
  const [name, prompt] = [opened, state.prompt];
  const models = [...(page?.checkpoints ?? []), ...(rowOf(name)?.state === "finished" ? [name] : [])];
  texts = [];
  $("walk-go").disabled = true;
  $("walk-label").textContent = models.length ? "" : "No checkpoint yet: the first save makes one.";
  for (const model of models) {
    const body = { model, prompt, max_tokens: 80, temperature: 0.8, top_p: 0.95, seed: 0 };
    const answer = await attempt(() => api("v1/completions", body));
    if (!answer || name !== opened) break;
    texts.push([model === name ? "final" : model.split("/").at(-1), prompt, answer.choices[0].text]);
    $("walk-step").max = texts.length - 1;
    $("walk-step").value = texts.length - 1;
    showStep();
  }
  $("walk-go").disabled = false;
}

function showStep() {
  const [label, prompt, words] = texts[$("walk-step").value] ?? ["", "", ""];
  $("walk-step").disabled = !texts.length;
  $("walk-label").textContent = label;
  $("walk-text").replaceChildren(h("span", { class: "muted" }, prompt), words);
}
