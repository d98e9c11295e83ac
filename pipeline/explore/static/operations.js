// The steering list: features with an operation, a strength and a place, beside every view. Features are dropped on it,
// or put into it by a button or by number.
import { at, element } from "./elements.js";
import { chip, DRAGGED, isKnown, learn, told } from "./feature_items.js";
import { get } from "./server.js";
import { add, changed, OPS, state, WHERE } from "./state.js";

const ABOUT = {
  add: "add: strength times its largest activation is added",
  set: "set: becomes strength times its largest activation",
  ablate: "ablate: becomes 0",
  scale: "scale: is multiplied by strength",
};
const PLACES = {
  all: "at all tokens",
  prompt: "at the prompt's tokens",
  generated: "at generated tokens",
  thinking: "between <think> and </think>",
};
const list = at("operations");
const steering = at("steering");
let known = { d_sae: 0, most: 0, thinking: false };

/** Begins with what the SAE and the server allow. */
export function allow(limits) {
  known = limits;
  at("operation-feature").max = known.d_sae - 1;
  state.operations = state.operations.filter(({ feature }) => feature < known.d_sae).slice(0, known.most);
  draw();
}

/** Puts a feature into the list; the sentence that says what became of it. */
export function put(feature) {
  if (!(Number.isSafeInteger(feature) && feature >= 0 && feature < known.d_sae)) {
    return `There is no feature ${feature}: this SAE has 0 to ${known.d_sae - 1}.`;
  }
  if (state.operations.some((each) => each.feature === feature)) return `Feature ${feature} is in the steering list.`;
  if (state.operations.length >= known.most) return `The steering list is full: ${known.most} features at most.`;
  add(state, feature);
  draw();
  changed();
  return `Feature ${feature} was added to the steering list.`;
}

function choice(name, all, chosen, about, take) {
  const made = element("select", { "aria-label": name, title: about[chosen] });
  for (const each of all) made.append(element("option", { value: each, title: about[each] }, each));
  made.value = chosen;
  made.addEventListener("change", () => take(made.value));
  return made;
}

function line(operation) {
  const { feature } = operation;
  const set = (name) => (value) => {
    operation[name] = value;
    changed();
    if (name !== "strength") draw(`[data-of="${feature}"] [data-name="${name}"]`);
  };
  const strength = element("input", {
    type: "number",
    step: "any",
    value: operation.strength,
    disabled: operation.op === "ablate",
    "aria-label": `Strength for feature ${feature}`,
  });
  strength.addEventListener("input", () => {
    if (strength.value !== "" && strength.validity.valid) set("strength")(strength.valueAsNumber);
  });
  const where = WHERE.filter((each) => each !== "thinking" || known.thinking || operation.where === each);
  const op = choice(`Operation on feature ${feature}`, OPS, operation.op, ABOUT, set("op"));
  const place = choice(`Where feature ${feature} is operated on`, where, operation.where, PLACES, set("where"));
  op.dataset.name = "op";
  place.dataset.name = "where";
  const remove = element("button", { type: "button", "aria-label": `Remove feature ${feature}` }, "✕");
  remove.addEventListener("click", () => {
    state.operations = state.operations.filter((each) => each !== operation);
    draw("#operation-feature");
    changed();
  });
  const head = element("div", { className: "head" }, chip(feature), told(feature), remove);
  const made = element("li", {}, head, element("div", { className: "controls" }, op, strength, place));
  made.dataset.of = feature;
  return made;
}

/** Asks what a feature is called that came by a link or by number. Without an answer its number is enough. */
async function introduce(feature) {
  const found = await get(`/api/feature/${encodeURIComponent(state.sae)}/${feature}`).catch(() => null);
  if (!found) return;
  learn([found]);
  list.querySelector(`[data-of="${feature}"] .label`)?.replaceWith(told(feature));
}

/** Draws the list anew; `focus` is a selector of what has the focus then. */
export function draw(focus = "") {
  list.replaceChildren(...state.operations.map(line));
  for (const { feature } of state.operations) if (!isKnown(feature)) introduce(feature);
  at("steering-empty").hidden = state.operations.length > 0;
  at("steering-title").textContent = state.operations.length ? `Steering list (${state.operations.length})` : "Steering list";
  if (focus) steering.querySelector(focus)?.focus();
}

/** Whatever is dragged over a place as a feature can be dropped there. */
export function droppable(place, take) {
  const isFeature = (event) => event.dataTransfer.types.includes(DRAGGED);
  const over = (event) => {
    if (!isFeature(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    place.classList.add("over");
  };
  place.addEventListener("dragenter", over);
  place.addEventListener("dragover", over);
  place.addEventListener("dragleave", (event) => {
    if (!place.contains(event.relatedTarget)) place.classList.remove("over");
  });
  place.addEventListener("drop", (event) => {
    place.classList.remove("over");
    if (!isFeature(event)) return;
    event.preventDefault();
    take(Number(event.dataTransfer.getData(DRAGGED)));
  });
}
