// Start: a form made of the settings of a stage; Plan says what a run costs, Start begins it.

import { $, api, attempt, fillSelect, h, on, stored, text, tie, toast } from "./lib.js";

const state = stored("start", { stage: "train", config: "", name: "", changes: {} });
let forms = null;
let planned = ""; // the state whose plan succeeded

export async function startStart() {
  forms = await attempt(() => api("lab/forms"));
  if (!forms) return;
  fillSelect($("start-stage"), { stages: Object.keys(forms.stages) }, state.stage);
  $("start-why").hidden = forms.allow_training;
  on("change", {
    "start-stage": () => choose($("start-stage").value, ""),
    "start-config": () => choose(state.stage, $("start-config").value),
    "start-anyway": showChanges,
  });
  on("click", { "start-plan": plan });
  on("submit", { "start-form": start });
  tie("start-name", state, "name", showChanges);
  choose(state.stage, state.config, state.changes);
}

function choose(stage, config, changes = {}) {
  stage = forms.stages[stage] ? stage : "train";
  const { configs, doc, groups } = forms.stages[stage];
  const [first] = Object.keys(configs);
  Object.assign(state, { stage, changes, config: config in configs ? config : first });
  fillSelect($("start-config"), { configs: Object.keys(configs) }, state.config);
  $("start-doc").textContent = doc;
  const opened = [...document.querySelectorAll("#start-fields details[open]")].map((group) => group.id);
  const boxes = Object.entries(groups).map(([title, fields], i) => {
    const inner = fields.map((field) => fieldBox(field, configs[state.config][field.name]));
    const open = opened.length ? opened.includes(title) : i === 0;
    return h("details", { id: title, open }, h("summary", {}, title), h("div", { class: "fields" }, inner));
  });
  $("start-fields").replaceChildren(...boxes);
  showChanges();
}

/** A control of a setting; `usual` is its value in the config file, or the default. */
function fieldBox({ name, kind, choices, help }, usual) {
  const id = `field-${name}`;
  const value = state.changes[name] ?? usual;
  const input = h(kind === "choice" ? "select" : "input", { id, spellcheck: "false" });
  if (kind === "choice") fillSelect(input, { choices }, text(value));
  else if (kind === "bool") Object.assign(input, { type: "checkbox", checked: value });
  else input.value = value === null ? "" : text(value);
  const label = h("label", { for: id }, name.replaceAll("_", " "));
  const box = h("div", { class: "field", "data-field": name }, label, input, h("small", {}, help));
  box.classList.toggle("changed", name in state.changes);
  input.addEventListener("input", () => {
    const entered = kind === "bool" ? input.checked : input.value.trim();
    const { [name]: _, ...others } = state.changes;
    const same = text(entered) === text(usual ?? "");
    state.changes = same ? others : { ...others, [name]: entered };
    box.classList.toggle("changed", !same);
    showChanges();
  });
  return box;
}

function showChanges() {
  const names = Object.keys(state.changes);
  $("start-changed").textContent = names.length ? `changed: ${names.join(", ")}` : "nothing changed";
  const ready = planned === JSON.stringify(state) || $("start-anyway").checked;
  $("start-go").disabled = !forms.allow_training || !ready;
}

async function plan() {
  const body = JSON.stringify(state);
  $("start-plan").disabled = true;
  $("start-text").hidden = false;
  $("start-text").textContent = "Planning measures this machine: seconds to a minute.";
  const answer = await attempt(() => api("lab/plan", JSON.parse(body)));
  $("start-plan").disabled = false;
  $("start-text").textContent = answer?.text ?? "There is no plan.";
  if (answer?.ok) planned = body;
  showChanges();
}

async function start() {
  if ($("start-go").disabled) return;
  $("start-go").disabled = true;
  const answer = await attempt(() => api("lab/start", state));
  showChanges();
  if (!answer) return;
  toast(`${answer.name} is starting.`, "good");
  location.hash = `runs/${encodeURIComponent(answer.name)}`;
}
