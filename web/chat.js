// Chat and completion in up to four panes (same question, same seed), and best of n by a verifier.
// A turn is {user, seed, replies: one a pane, best}; a reply is {parts: [[text, by calculator], ...], note}.

import { $, api, attempt, button, fillSelect, h, hint, modelGroups, number } from "./lib.js";
import { on, percent, stored, stream, tie } from "./lib.js";

const MOST_TURNS = 100; // kept in the page and in this browser
const SAMPLING = {
  temperature: "Logits are divided by it before the softmax; 0: always the likeliest token.",
  top_p: "Nucleus sampling (Holtzman et al. 2020): the likeliest tokens that hold this probability.",
  top_k: "Only this many likeliest tokens; 0: all.",
  min_p: "Keeps tokens with at least this share of the likeliest token's probability.",
  repetition_penalty: "Above 1 makes tokens that were there less likely (Keskar et al. 2019).",
  seed: "The same seed gives the same text; empty: a new one for every message.",
  max_tokens: "At most this many new tokens; empty: what fits into the context.",
};
const ENDS = { stop: "ended by the model", length: "reached max tokens" };
const state = stored("chat", {
  ...{ models: [], panes: "1", turns: [], system: "", calculator: true, history: true, bestN: "16" },
  ...{ temperature: 0.8, top_p: 0.95, top_k: 0, min_p: 0, repetition_penalty: 1, seed: "", max_tokens: "" },
});
let known = {}; // id of a model -> its meta
let groups = {}; // of the models
let work = null; // AbortController of what is being written
let editing = -1; // the turn that the composer changes; -1: none

export function startChat() {
  for (const [name, help] of Object.entries(SAMPLING)) {
    const input = h("input", { id: `set-${name}`, inputmode: "decimal" });
    $("sampling").append(h("label", {}, name.replaceAll("_", " "), input, hint(help)));
  }
  const names = [...Object.keys(SAMPLING), "calculator", "history", "system"];
  for (const name of names) tie(`set-${name}`, state, name);
  tie("best-n", state, "bestN");
  tie("panes", state, "panes", show);
  on("submit", { composer: (event) => say(event.submitter === $("best-go")) });
  on("click", { "chat-stop": stopChat, "chat-save": save, "chat-clear": clear });
}

/** The models that the server has; a pane without one gets another: chat models, the newest first. */
export function chatModels({ data, verifiers }) {
  known = Object.fromEntries(data.map((model) => [model.id, model.meta]));
  groups = modelGroups(data);
  const rank = (id) => (known[id].stage === "verifier" ? -1 : Number(known[id].chat));
  const newest = groups.models.toReversed().sort((a, b) => rank(b) - rank(a));
  state.models = [0, 1, 2, 3].map((i) => (known[state.models[i]] ? state.models[i] : newest[i] ?? newest[0]));
  fillSelect($("best-verifier"), { verifiers });
  $("best-go").disabled = !verifiers.length;
  $("best-go").title = verifiers.length ? "" : "There is no verifier yet: verifier.py trains one.";
  if (!work) show();
}

export function stopChat() {
  work?.abort();
  if (editing >= 0) edit(-1);
}

function clear() {
  stopChat();
  state.turns = [];
  show();
}

function save() {
  const href = URL.createObjectURL(new Blob([JSON.stringify(state, null, 1)], { type: "application/json" }));
  h("a", { href, download: "conversation.json" }).click();
  URL.revokeObjectURL(href);
}

// ---------------------------------------------------------------------- What one sees
const panes = () => state.models.slice(0, Number(state.panes)).filter(Boolean);

function show() {
  const log = $("chat-log");
  const none = h("p", { class: "muted" }, "No model yet: train one, and it appears here by itself.");
  log.style.setProperty("--panes", state.panes);
  const heads = panes().length ? panes().map(paneHead) : [none];
  log.replaceChildren(...heads, ...state.turns.flatMap(turnBoxes));
  log.scrollTop = log.scrollHeight;
}

function paneHead(id, pane) {
  const select = h("select", { class: "pane-model", "aria-label": `model of pane ${pane + 1}` });
  fillSelect(select, groups, id);
  select.addEventListener("change", () => {
    state.models = state.models.with(pane, select.value);
    show();
  });
  const kind = known[id]?.chat ? "chat" : "base model: continues your last message only";
  return h("div", { class: "pane-head" }, select, " ", h("small", {}, kind));
}

function turnBoxes(turn, i, turns) {
  const user = h("div", { class: "turn" }, h("p", { class: "user" }, turn.user));
  const action = (label, onclick, more) => user.append(button(label, onclick, { class: "quiet", ...more }));
  action("edit", () => edit(i), { class: "quiet edit" });
  const last = i === turns.length - 1;
  if (last) action("another seed", again, { id: "chat-again" });
  if (last && !turn.best) action("continue", () => write(turn, true), { id: "chat-continue" });
  if (turn.best) return [user, bestBox(turn.best)];
  return [user, ...panes().map((_, pane) => replyBox(turn.replies[pane] ?? { parts: [] }))];
}

function replyBox({ parts, note = "" }) {
  return h("article", { class: "reply" }, wordsBox(parts), h("small", { class: "note" }, note));
}

function wordsBox(parts) {
  const mark = { class: "calculator", "data-tip": "The calculator wrote this, not the model.", tabindex: 0 };
  return h("p", { class: "words" }, parts.map(([words, tool]) => (tool ? h("mark", mark, words) : words)));
}

function edit(i) {
  editing = i;
  $("chat-editing").hidden = i < 0;
  $("chat-input").value = state.turns[i]?.user ?? "";
  $("chat-input").focus();
}

// ---------------------------------------------------------------------- Asking
async function say(best) {
  const user = $("chat-input").value;
  if (work || !user.trim() || !panes().length) return;
  const kept = editing < 0 ? state.turns : state.turns.slice(0, editing);
  const seed = state.seed === "" ? Math.floor(Math.random() * 1e6) : Number(state.seed);
  const turn = { user, seed, replies: [], best: best && { answers: [], n: Number($("best-n").value) } };
  state.turns = [...kept, turn].slice(-MOST_TURNS);
  edit(-1);
  await write(turn, false);
}

function again() {
  const turn = state.turns.at(-1);
  turn.seed += 1;
  if (turn.best) turn.best = { answers: [], n: turn.best.n };
  return write(turn, false);
}

/** Writes the replies of a turn, all panes at once; `continuing` goes on where they stopped. */
async function write(turn, continuing) {
  if (work) return;
  work = new AbortController();
  $("chat-stop").disabled = false;
  $("panes").disabled = true;
  const keep = setInterval(() => (state.turns = [...state.turns]), 1000); // a reload loses a second
  turn.replies = panes().map((_, pane) => (continuing && turn.replies[pane]) || { parts: [] });
  show();
  const boxes = [...$("chat-log").children].slice(-panes().length);
  if (turn.best) await attempt(() => bestOf(turn, boxes.at(-1)));
  else await Promise.all(boxes.map((box, pane) => reply(turn, pane, box)));
  work = null;
  clearInterval(keep);
  $("chat-stop").disabled = true;
  $("panes").disabled = false;
  state.turns = [...state.turns]; // stores them
  show();
}

async function reply(turn, pane, box) {
  const answer = turn.replies[pane];
  const begun = performance.now();
  let tokens = 0;
  let end = "stopped";
  const note = () => {
    const rate = number((1000 * tokens) / (performance.now() - begun), 3);
    answer.note = `${tokens} tokens, ${rate} tokens/s, seed ${turn.seed}, ${end}`;
  };
  const onEvent = ({ choices, usage }) => {
    for (const choice of choices) {
      tokens += append(answer, choice);
      end = ENDS[choice.finish_reason] ?? end;
    }
    tokens = usage?.completion_tokens ?? tokens;
    note();
    box.replaceChildren(...replyBox(answer).children);
  };
  try {
    const { path, body } = await question(turn, pane);
    await stream(path, { ...body, stream_options: { include_usage: true } }, work.signal, onEvent);
    note();
  } catch (error) {
    note();
    if (error.name !== "AbortError") answer.note = error.message;
  }
}

/** Adds a chunk to a reply; chunks of one author become one part. Returns the number of tokens: 0 or 1. */
function append(answer, { text, delta, calculator }) {
  const words = text ?? delta?.content;
  if (!words) return 0;
  const part = answer.parts.at(-1);
  if (part?.[1] === calculator) part[0] += words;
  else answer.parts.push([words, calculator]);
  return 1;
}

const wordsOf = (answer) => answer?.parts.map(([words]) => words).join("") ?? "";

/** A chat model gets the conversation by its template; a base continues the last message alone. */
async function question(turn, pane) {
  const model = state.models[pane];
  const begun = wordsOf(turn.replies[pane]);
  const body = { model, stream: true, calculator: state.calculator };
  for (const name of Object.keys(SAMPLING)) if (state[name] !== "") body[name] = Number(state[name]);
  body.seed = turn.seed;
  if (!known[model].chat) {
    const prompt = turn.user + begun;
    const { count, max_model_len: most } = await api("tokenize", { model, prompt }, work.signal);
    body.max_tokens = Math.max(1, Math.min(body.max_tokens ?? 300, most - count - 1)); // 1: begin of text
    return { path: "v1/completions", body: { ...body, prompt } };
  }
  const messages = state.system ? [{ role: "system", content: state.system }] : [];
  const earlier = state.history ? state.turns.slice(0, state.turns.indexOf(turn)) : [];
  for (const one of [...earlier, turn]) {
    const content = wordsOf(one.replies[pane]);
    if (content || one === turn) messages.push({ role: "user", content: one.user });
    if (content) messages.push({ role: "assistant", content });
  }
  return { path: "v1/chat/completions", body: { ...body, messages, continue_final_message: Boolean(begun) } };
}

// ---------------------------------------------------------------------- Best of n
async function bestOf(turn, box) {
  const { best } = turn;
  const { path, body } = await question(turn, 0);
  const writing = Array.from({ length: best.n }, () => ({ parts: [] }));
  Object.assign(body, { n: best.n, verifier: $("best-verifier").value });
  await stream(path, body, work.signal, ({ choices, verdict }) => {
    for (const choice of choices) append(writing[choice.index], choice);
    Object.assign(best, verdict);
    best.answers = verdict ? verdict.answers.map((one) => ({ ...one, ...writing[one.index] })) : writing;
    box.replaceChildren(...bestBox(best).children);
  });
  turn.replies = panes().map(() => best.answers[0]);
}

function bestBox({ answers, majority, greedy, n }) {
  const cards = answers.map(({ parts, number: found, probability = 0 }) => {
    const label = majority ? `${found ?? "no number"}: right with ${percent(probability)}` : "writing";
    const bar = h("meter", { class: "probability", value: probability, "aria-label": "probability" });
    return h("li", { class: "answer" }, h("b", {}, label), bar, wordsBox(parts));
  });
  const [best] = answers;
  const verdict = majority
    ? `The verifier chooses ${best.number} (${percent(best.probability)}), the majority ${majority.number} `
      + `(${majority.votes} of ${n} votes), greedy decoding ${greedy.number}.`
    : work
      ? `${n} answers are being written; the verifier reads them when all are there.`
      : "Stopped before the verifier read the answers.";
  return h("div", { class: "best" }, h("p", { id: "verdict", role: "status" }, verdict), h("ol", {}, cards));
}
