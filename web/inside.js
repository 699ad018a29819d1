// Look inside: what a model makes of a text: surprise, next token, lens, contributions, heads, attention.

import { $, api, attempt, barRow, button, fillSelect, h, hint, modelGroups, number } from "./lib.js";
import { on, percent, request, stored, stream, table, tie, visible } from "./lib.js";

const HELP = {
  tokens: "Surprise: -log2 p of a token given those before it, in bits (a coin toss: 1). Mean: the loss.",
  next: "What the model would write after the selected token. Click one to append it and go on from there.",
  tree: "Every text that you made on the way; click one to go back. Heads that are off stay off.",
  lens: "The logit lens (nostalgebraist 2020) decodes the residual stream after every layer as if it were "
    + "the last: one sees the prediction take shape. Norm: the length of that vector.",
  parts: "Direct logit attribution (Elhage et al. 2021): the last norm's scale held fixed, a logit is the "
    + "sum of what the embedding, every head and every MLP wrote into the residual stream.",
  heads: "Colour: what a head adds to the target's logit (blue: up, red: down). Click: its attention; alt- "
    + "or shift-click: off. Much weight on the first token is an attention sink (Xiao et al. 2023).",
};
const OTHER = "Lens, contributions and switches need a model that model.py computes; this one is transformers'.";
const SHOWN = 10; // next tokens, of the 50 that the server sends for comparisons
const MOST_NODES = 200;
const FIRST = "One day a little fox";
const LAST = { position: -1, target: null };
const PLACE = { model: "", text: FIRST, chat: false, off: [], layer: 0, head: 0, switching: false, ...LAST };
const state = stored("inside", { ...PLACE, tree: [{ text: FIRST, parent: -1 }], node: 0 });
let view = null; // the server's answer
let before = null; // the answer before a swap, at the last token, to compare with
let map = null; // {layer, weights, size}: attention of all heads of the selected layer
let work = new AbortController();

export function startInside() {
  $("inside-text").value = state.text;
  on("submit", { "inside-form": () => read($("inside-text").value) });
  on("change", { "inside-model": () => again({ model: $("inside-model").value, off: [], target: null }) });
  tie("inside-chat", state, "chat", () => again(LAST));
}

export function insideModels(models) {
  const groups = modelGroups(models);
  const ids = Object.values(groups).flat();
  if (!ids.includes(state.model)) Object.assign(state, { model: ids[0] ?? "", off: [], target: null });
  fillSelect($("inside-model"), groups, state.model);
  showInside();
}

export const showInside = () => $("inside").hidden || view || look();
export function stopInside() {
  work.abort();
  work = new AbortController();
}

/** Changes what is looked at, and looks. */
function choose(changes) {
  Object.assign(state, changes);
  if ("text" in changes) $("inside-text").value = changes.text;
  return look();
}

/** The same at the text that stands in the box, also if it was only typed. */
function again(changes) {
  Object.assign(state, changes);
  const text = $("inside-text").value;
  return text === state.text ? look() : read(text);
}

/** Goes to a text: a new root of the tree, or a branch below `parent`. */
function read(text, parent = -1, earlier = null) {
  before = earlier;
  const root = parent < 0 || state.tree.length >= MOST_NODES;
  const tree = root ? [] : [...state.tree];
  const known = tree.findIndex((one) => one.text === text && one.parent === parent);
  const node = known < 0 ? tree.push({ text, parent: root ? -1 : parent }) - 1 : known;
  return choose({ tree, node, text, ...LAST });
}

function ask({ model, text, chat, position, target, off }) {
  const body = { model, text, chat, position, target, heads_off: off };
  return api("lab/inside", body, work.signal);
}

async function look() {
  const { model, text } = state;
  const none = model ? "Type a text, then Look." : "No model yet: train one, and look inside it here.";
  if (!model || !text) return $("inside-out").replaceChildren(h("p", { class: "muted" }, none));
  work.abort();
  work = new AbortController();
  const found = await attempt(() => ask(state));
  if (!found) return undefined;
  view = found;
  map = null;
  return show();
}

const end = () => view.tokens.length - 1;
const at = () => (state.position < 0 ? end() : Math.min(state.position, end()));
const card = (title, help, ...inner) =>
  h("div", { class: "card" }, h("h2", {}, title, " ", hint(help)), ...inner);

function show() {
  const other = h("p", { class: "note" }, OTHER);
  const [parts, lens] = view.lens ? [partsCard(), lensCard()] : [other, ""];
  $("inside-out").replaceChildren(tokensCard(), nextCard(), parts, treeCard(), headsCard(), lens);
  return showAttention();
}

// ---------------------------------------------------------------------- Tokens
function tokensCard() {
  const known = view.surprise.filter(Boolean);
  const mean = known.reduce((sum, one) => sum + one.bits, 0) / (known.length || 1);
  const size = `${view.tokens.length} of ${view.context_length} tokens, ${number(mean, 3)} bits a token`;
  const heat = (i) => `${Math.min(100, 8 * (view.surprise[i]?.bits ?? 0))}%`;
  const chip = ({ text, special }, i) => button(visible(text), () => choose({ position: i, target: null }), {
    class: special ? "token special" : "token", "data-index": i, "data-tip": factsOf(i),
    "aria-pressed": i === at(), "--heat": heat(i),
  });
  const chips = h("div", { class: "tokens" }, view.tokens.map(chip));
  const facts = h("p", { id: "token-facts" }, factsOf(at()));
  return card("Tokens and surprise", HELP.tokens, chips, h("small", {}, size), facts, swapForm(at()));
}

function factsOf(i) {
  const { id, bytes, merge, special } = view.tokens[i];
  const hex = bytes.map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
  const origin = special ? "special" : merge === null ? "no merge" : `made by merge ${merge}`;
  const facts = `token ${i}: id ${id}, bytes ${hex}, ${origin}`;
  if (!view.surprise[i]) return facts;
  const { bits, rank, p, top } = view.surprise[i];
  const expected = top.map(([words, q]) => `${visible(words)} ${percent(q)}`).join(", ");
  return `${facts}; ${number(bits, 3)} bits, rank ${rank}, p ${percent(p)}; expected ${expected}`;
}

function swapForm(i) {
  if (state.chat) return h("small", {}, " Only in a plain text can tokens be swapped and appended.");
  const { text } = view.tokens[i];
  const disabled = text.startsWith("bytes:"); // a part of a character cannot be typed
  const input = h("input", { id: "swap-text", value: text, disabled });
  const onsubmit = async (event) => {
    event.preventDefault();
    const swapped = textOf(0, i) + input.value + textOf(i + 1);
    read(swapped, state.node, await attempt(() => ask({ ...state, ...LAST })));
  };
  const label = h("label", {}, "replace by", input);
  return h("form", { class: "bar", onsubmit }, label, h("button", { id: "swap-go" }, "Swap"));
}

/** The text of some tokens, from their bytes, because a character may be spread over several. */
function textOf(from, to) {
  const bytes = view.tokens.slice(from, to).flatMap((token) => (token.special ? [] : token.bytes));
  return new TextDecoder().decode(new Uint8Array(bytes));
}

// ---------------------------------------------------------------------- Next token, and the tree of texts
/** [likeliest next tokens, earlier ones to compare with or null, what differs]. */
function comparison() {
  if (view.next_off) return [view.next_off, view.next, `, heads off: ${state.off.length} (thin: all on)`];
  if (before && state.position < 0) return [view.next, before.next, ", swapped (thin: before)"];
  return [view.next, null, ""];
}

function nextCard() {
  const [now, then, note] = comparison();
  const first = [...now.slice(0, SHOWN), ...(then ?? []).slice(0, 3)];
  const rows = first.filter((one, i) => first.findIndex(({ id }) => id === one.id) === i);
  const p = (list, id) => list?.find((one) => one.id === id)?.p;
  const bars = rows.map((one) => nextRow(one, p(now, one.id), p(then, one.id), Boolean(then)));
  const title = h("small", {}, `after token ${at()}${note}`);
  return card("Next token", HELP.next, title, h("div", { id: "next" }, bars));
}

function nextRow({ id, text, logit }, p, earlier, compared) {
  const disabled = state.chat || text.startsWith("bytes:"); // a part of a character cannot be typed
  const append = () => read(textOf(0, at() + 1) + text, state.node);
  const grow = button(visible(text), append, { class: "grow", disabled });
  const fill = (name, share) => h("span", { class: name, width: `${100 * (share ?? 0)}%` });
  const bars = compared ? [fill("fill", p), fill("fill thin", earlier)] : fill("fill", p);
  const share = (q) => (q === undefined ? "rank > 50" : percent(q));
  const figure = compared ? `${share(earlier)} → ${share(p)}` : share(p);
  const tip = `Who put its logit (${number(logit)}) there?`;
  const why = button("why", () => choose({ target: id }), { class: "quiet", "data-tip": tip });
  return barRow(grow, bars, figure, why);
}

function treeCard() {
  const up = state.tree[state.node].parent;
  const back = button("Back", () => open(up), { id: "back", disabled: up < 0 });
  const go = button("Generate 20 tokens", generate, { id: "generate", disabled: state.chat });
  const list = h("div", { id: "tree", class: "scroll" }, branches(-1));
  return card("Tree of texts", HELP.tree, h("div", { class: "bar" }, go, back), list);
}

function open(node) {
  before = null;
  return choose({ node, text: state.tree[node].text, ...LAST });
}

function branches(parent) {
  const start = state.tree[parent]?.text ?? "";
  const items = state.tree.map((one, i) => {
    if (one.parent !== parent) return null;
    const words = one.text.startsWith(start) ? one.text.slice(start.length) : one.text;
    const pressed = { class: "node", "aria-pressed": i === state.node };
    return h("li", {}, button(visible(words), () => open(i), pressed), branches(i));
  });
  return h("ul", { class: "tree" }, items);
}

async function generate() {
  const { model, text: prompt, off: heads_off } = state;
  const body = { model, prompt, heads_off, max_tokens: 20, temperature: 0, stream: true };
  const onEvent = ({ choices }) => ($("inside-text").value += choices[0]?.text ?? "");
  work = new AbortController();
  await attempt(() => stream("v1/completions", body, work.signal, onEvent));
  if ($("inside-text").value !== prompt) read($("inside-text").value, state.node);
}

// ---------------------------------------------------------------------- Lens and contributions
function lensCard() {
  const max = Math.max(...view.lens.map((one) => one.norm));
  const heat = (words, p) => ({ class: "heat", "--heat": `${100 * p}%`, "data-tip": `${visible(words)} ${percent(p)}` });
  const token = ([words, p]) => h("span", heat(words, p), visible(words));
  const length = (norm) => h("span", {}, h("meter", { max, value: norm }), ` ${number(norm, 3)}`);
  const row = ({ name, top, target_p: p, norm }) => [name, ...top.map(token), percent(p), length(norm)];
  const head = ["after", "1st", "2nd", "3rd", "4th", "5th", "p of target", "norm"];
  return card("Logit lens", HELP.lens, table(head, view.lens.map(row), { id: "lens" }));
}

function partsCard() {
  const { parts, target, sum, why_not: why } = view.parts;
  if (why) return card("Who put the logit there", HELP.parts, h("p", { class: "note" }, why));
  const most = Math.max(...parts.map((part) => Math.abs(part.value)));
  const row = ({ name, value }) => {
    const width = `${(50 * Math.abs(value)) / most}%`;
    const fill = h("span", { class: value < 0 ? "fill minus" : "fill plus", width });
    return barRow(h("span", {}, name), fill, value.toFixed(3));
  };
  const logit = `logit of ${visible(target.text)} ${target.logit.toFixed(5)}`;
  const total = `sum of the parts ${sum.toFixed(5)}; ${logit}`;
  const list = h("div", { id: "parts", class: "scroll" }, parts.map(row));
  return card("Who put the logit there", HELP.parts, h("p", { id: "parts-sum" }, total), list);
}

// ---------------------------------------------------------------------- Heads and attention
function headsCard() {
  if (!view.layers) return h("p", { class: "note" }, "transformers gives no attention of this model.");
  const parts = view.parts?.parts ?? [];
  const value = Object.fromEntries(parts.map((part) => [[part.layer, part.head], part.value]));
  const most = Math.max(1e-9, ...Object.values(value).map(Math.abs));
  const heads = Array.from({ length: view.heads }, (_, head) => head);
  const squares = (layer) => heads.map((head) => headButton(layer, head, (value[[layer, head]] ?? 0) / most));
  const row = (_, layer) => h("div", { class: "head-row" }, h("small", {}, `layer ${layer}`), squares(layer));
  const grid = h("div", { class: "scroll" }, Array.from({ length: view.layers }, row));
  const check = h("input", { id: "switch-off", type: "checkbox", checked: state.switching });
  check.addEventListener("change", () => (state.switching = check.checked));
  const all = button("all on", () => choose({ off: [] }), { id: "heads-on" });
  const bar = h("div", { class: "bar" }, h("label", {}, check, "a click switches a head"), all);
  const canvas = h("canvas", { id: "attention", role: "img", "aria-label": "attention map" });
  return card("Heads and attention", HELP.heads, bar, grid, h("p", { id: "attention-facts" }), canvas);
}

function headButton(layer, head, share) {
  const others = state.off.filter(([l, k]) => l !== layer || k !== head);
  const off = others.length < state.off.length;
  const shown = layer === state.layer && head === state.head;
  const click = (event) => {
    const flip = view.lens && (state.switching || event.altKey || event.shiftKey);
    if (flip) return choose({ off: off ? others : [...others, [layer, head]] });
    Object.assign(state, { layer, head });
    return show();
  };
  const hue = share < 0 ? "var(--minus)" : "var(--plus)";
  const colour = { "--heat": `${100 * Math.abs(share)}%`, "--hue": hue };
  const place = { "data-layer": layer, "data-head": head, "data-tip": `layer ${layer}, head ${head}` };
  const mark = shown ? "head shown" : "head";
  return button(head, click, { class: mark, "aria-pressed": off, ...place, ...colour });
}

async function showAttention() {
  if (!view.layers) return;
  const { model, text, chat } = state;
  const layer = Math.min(state.layer, view.layers - 1);
  const head = Math.min(state.head, view.heads - 1);
  if (map?.layer !== layer) {
    const answer = await attempt(() => request("lab/attention", { model, text, chat, layer }, work.signal));
    if (!answer) return;
    const weights = new Uint8Array(await answer.arrayBuffer());
    if (layer !== Math.min(state.layer, view.layers - 1)) return; // another one was chosen meanwhile
    map = { layer, weights, size: Number(answer.headers.get("X-Tokens")) };
  }
  drawMap(map.weights.subarray(head * map.size ** 2), map.size, `layer ${layer}, head ${head}`);
}

/** One pixel a pair of tokens: row i looks at column j; CSS enlarges the canvas without smoothing. */
function drawMap(weights, size, name) {
  const canvas = $("attention");
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  for (let i = 0; i < size * size; i += 1) image.data.set([224, 122, 31, weights[i]], 4 * i);
  canvas.getContext("2d").putImageData(image, 0, 0);
  const token = (i) => `${visible(view.tokens[i].text)} (${i})`;
  const place = (offset) => Math.max(0, Math.min(size - 1, Math.floor((offset / canvas.clientWidth) * size)));
  const tell = (i, j) => {
    const weight = percent(weights[i * size + j] / 255);
    $("attention-facts").textContent = `${name}: ${token(i)} looks at ${token(j)} with ${weight}`;
  };
  tell(at(), 0);
  canvas.onpointermove = ({ offsetX, offsetY }) => tell(place(offsetY), place(offsetX));
}
