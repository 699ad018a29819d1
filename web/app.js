// Starts the page: theme, keys, tooltips, the section that the address names, models, the watch stream.

import { $, api, attempt, on, runQuery, stored, stream, takeToken, tried } from "./lib.js";
import { onWatch, showRuns, startRuns } from "./runs.js";
import { startStart } from "./start.js";
import { chatModels, startChat, stopChat } from "./chat.js";
import { insideModels, showInside, startInside, stopInside } from "./inside.js";

const SECTIONS = ["runs", "start", "chat", "inside"];
const THEMES = ["auto", "light", "dark"];
const look = stored("look", { theme: "auto" });
let connection = new AbortController();

/** Shows #runs, #runs/NAME, #start, #chat or #inside. */
function route() {
  const address = tried(() => decodeURIComponent(location.hash.slice(1)), "");
  const [wanted, ...name] = address.split("/");
  const section = SECTIONS.includes(wanted) ? wanted : "runs";
  for (const one of SECTIONS) {
    $(one).hidden = one !== section;
    $(`nav-${one}`).setAttribute("aria-current", one === section ? "page" : "false");
  }
  if (section === "runs") showRuns(name.join("/"));
  if (section === "inside") showInside();
}

/** 1 to 4: a section; Escape: stop; Enter in a textarea: send, unless with Shift. */
function onKey(event) {
  const { target, key, shiftKey, isComposing, ctrlKey, metaKey, altKey } = event;
  if (key === "Escape") {
    stopChat();
    stopInside();
  }
  if (key === "Enter" && target.matches("textarea") && target.form && !shiftKey && !isComposing) {
    event.preventDefault();
    target.form.requestSubmit();
  }
  const typing = ctrlKey || metaKey || altKey || target.closest("input, textarea, select");
  if (!typing) location.hash = SECTIONS[Number(key) - 1] ?? location.hash;
}

/** One tooltip for the page: shows the data-tip of what the pointer or the focus is on. */
function showTip({ target }) {
  const tip = $("tip");
  const owner = target.closest?.("[data-tip]");
  tip.hidden = !owner;
  if (!owner) return;
  tip.textContent = owner.dataset.tip;
  const { left, top, bottom } = owner.getBoundingClientRect();
  const fits = bottom + tip.offsetHeight + 6 < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${fits ? bottom + 6 : Math.max(4, top - tip.offsetHeight - 6)}px`;
}

function showTheme(step) {
  look.theme = THEMES[(THEMES.indexOf(look.theme) + step) % THEMES.length] ?? "auto";
  document.documentElement.dataset.theme = look.theme;
  $("theme").textContent = `◐ ${look.theme}`;
}

/** The one watch stream: opened anew when other runs are selected, and after a while when it broke. */
async function watch(runs) {
  connection.abort();
  const { signal } = (connection = new AbortController());
  const onEvent = (data, name) => {
    connected(true);
    onWatch(data, name);
  };
  while (!signal.aborted) {
    await stream(`lab/watch?${runQuery(runs)}`, undefined, signal, onEvent).catch(() => null);
    if (!signal.aborted) connected(false);
    await new Promise((resume) => setTimeout(resume, 3000));
  }
}

function connected(yes) {
  $("connection").textContent = yes ? "live" : "no connection";
  $("connection").classList.toggle("off", !yes);
}

async function loadModels() {
  const models = await attempt(() => api("v1/models"));
  if (!models) return;
  chatModels(models);
  insideModels(models.data);
}

takeToken();
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, showTip);
document.addEventListener("keydown", onKey);
addEventListener("hashchange", route);
on("click", { theme: () => showTheme(1) });
showTheme(0);
startChat();
startInside();
startStart();
startRuns({ watch, loadModels });
route();
