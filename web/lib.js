// What every module uses: elements, numbers with units, memory of this browser, requests, streams, tooltips.
// Text of models reaches the page through text nodes only; innerHTML is never set.

export const $ = (id) => document.getElementById(id);
export const button = (label, onclick, more = {}) => h("button", { type: "button", onclick, ...more }, label);
export const hint = (words) => h("button", { ...HINT, "data-tip": words, "aria-label": words }, "?");
const HINT = { type: "button", class: "hint" };

/** An element: h("p", {class: "note", onclick: f, "--heat": "9%"}, "text", child, [more], null). */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  element.append(...children.flat().filter((child) => child !== null));
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--") || name === "width") element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "disabled", "open"].includes(name)) element[name] = value;
    else element.setAttribute(name, value);
  }
  return element;
}

/** A table in a box of its own that scrolls, so that the page never does. */
export function table(head, rows, more = {}) {
  const cell = (value) => h("td", {}, value instanceof Node ? value : text(value));
  const top = h("tr", {}, head.map((name) => h("th", { scope: "col" }, name)));
  const body = h("tbody", {}, rows.map((row) => h("tr", {}, row.map(cell))));
  return h("div", { class: "scroll", tabindex: 0, ...more }, h("table", {}, h("thead", {}, top), body));
}

/** A row of a bar chart: label, bars on one track, figure, more. */
export function barRow(label, bars, figure, ...more) {
  const track = h("span", { class: "track" }, bars);
  return h("div", { class: "bar-row" }, label, track, h("span", { class: "figure" }, figure), ...more);
}

/** Models that continue texts, as groups for `fillSelect`. */
export function modelGroups(models) {
  const ids = (checkpoint) =>
    models.filter(({ meta }) => meta.kind === "causal" && meta.checkpoint === checkpoint).map(({ id }) => id);
  return { models: ids(false), checkpoints: ids(true) };
}

/** Options of a select: {label: [value, ...], ...}; empty groups are left out. */
export function fillSelect(select, groups, chosen) {
  const option = (value) => h("option", { value }, value);
  const filled = Object.entries(groups).filter(([, values]) => values.length);
  select.replaceChildren(...filled.map(([label, values]) => h("optgroup", { label }, values.map(option))));
  if (chosen !== undefined) select.value = chosen;
}

/** Listeners by id: on("click", {"chat-stop": stop, ...}). No form is sent by the browser itself. */
export function on(kind, listeners) {
  for (const [id, listener] of Object.entries(listeners)) {
    $(id).addEventListener(kind, (event) => {
      if (kind === "submit") event.preventDefault();
      listener(event);
    });
  }
}

/** Ties the control `id` to state[name]: shows it, and keeps what the person enters. */
export function tie(id, state, name, changed) {
  const property = $(id).type === "checkbox" ? "checked" : "value";
  $(id)[property] = state[name];
  $(id).addEventListener("input", () => {
    state[name] = $(id)[property];
    changed?.();
  });
}

/** What work() returns, or `otherwise` if it throws. */
export function tried(work, otherwise) {
  try {
    return work();
  } catch {
    return otherwise;
  }
}

/**
 * An object that survives a reload: what is assigned to its properties is stored, for this tab alone
 * (sessionStorage) and as what a new tab starts from (localStorage).
 */
export function stored(key, initial) {
  const [id, state] = [`lab.${key}`, { ...initial }];
  const kept = sessionStorage.getItem(id) ?? localStorage.getItem(id);
  for (const [name, value] of Object.entries(tried(() => JSON.parse(kept), null) ?? {})) {
    const usual = initial[name] ?? []; // a value of another type is damaged
    if (typeof value === typeof usual && Array.isArray(value) === Array.isArray(usual)) state[name] = value;
  }
  const set = (_, name, value) => {
    state[name] = value;
    try {
      for (const storage of [sessionStorage, localStorage]) storage.setItem(id, JSON.stringify(state));
    } catch {
      toast("This browser's storage is full: a reload will forget the latest changes.");
    }
    return true;
  };
  return new Proxy(state, { set });
}

// ---------------------------------------------------------------------- Text and numbers
/** A token as one can see it: spaces and line ends get signs. */
export const visible = (token) => token.replaceAll(" ", "·").replaceAll("\n", "⏎") || "∅";
export const runQuery = (names) => names.map((name) => `runs=${encodeURIComponent(name)}`).join("&");
export const percent = (p) => `${(100 * p).toFixed(p < 0.0995 ? 2 : 1)} %`;

export function text(value) {
  return value && typeof value === "object" ? JSON.stringify(value) : `${value ?? "–"}`;
}

export function number(value, digits = 4) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 1e3) return Math.round(value).toLocaleString("en");
  return value && Math.abs(value) < 1e-4 ? value.toExponential(2) : `${Number(value.toPrecision(digits))}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// ---------------------------------------------------------------------- Requests and streams
/** Takes the token out of the address (#token=...), so that it is neither shown nor bookmarked. */
export function takeToken() {
  const [, token] = /token=([^&]+)/.exec(location.hash) ?? [];
  if (!token) return;
  sessionStorage.setItem("lab.token", token);
  history.replaceState(null, "", "#runs");
}

/** GET without a body, POST with one; throws an Error whose message is for the person. */
export async function request(path, body, signal) {
  const token = sessionStorage.getItem("lab.token");
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The server does not answer: is serve.py running?");
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `The server answered ${response.status} to ${path}.`);
}

export const api = async (...all) => (await request(...all)).json();

/** Reads server-sent events and calls onEvent(data, name); aborting `signal` hangs up: the work stops. */
export async function stream(path, body, signal, onEvent) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const blocks = (rest + read.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [, name] = /^event: (.*)$/m.exec(block) ?? [];
      const [, data = "[DONE]"] = /^data: (.*)$/m.exec(block) ?? [];
      const event = data === "[DONE]" ? null : JSON.parse(data);
      if (event?.error?.message) throw new Error(event.error.message);
      if (event) onEvent(event, name);
    }
  }
}

/** Runs `work` and shows what it throws; hanging up on purpose is no error. */
export const attempt = (work) => work().catch((error) => error.name !== "AbortError" && toast(error.message));

/** Shows a sentence for ten seconds; at most four at a time. */
export function toast(words, kind = "error") {
  const box = h("div", { class: `toast ${kind}`, onclick: () => box.remove() }, words);
  $("toasts").append(box);
  if ($("toasts").children.length > 4) $("toasts").firstChild.remove();
  setTimeout(() => box.remove(), 10_000);
}
