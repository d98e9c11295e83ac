// Starts the explorer's page: what there is to look at, which view is seen, and what the buttons of features do.
import * as card from "./card.js";
import { at, copy, element, say } from "./elements.js";
import { DRAGGED, forget } from "./feature_items.js";
import * as find from "./find.js";
import * as operations from "./operations.js";
import { get } from "./server.js";
import { changed, keep, state, take } from "./state.js";
import * as steer from "./steer.js";
import * as text from "./text.js";
import { showTip } from "./tokens.js";
import { whole } from "./words.js";

const views = [...document.querySelectorAll("nav [data-view]")];
let about = null;
let sae = null;
let fading = null;

/** A sentence at the top of the page, for a while. */
function tell(sentence) {
  clearTimeout(fading);
  say(at("notice"), sentence);
  fading = setTimeout(() => say(at("notice"), ""), 8000);
}

function look(view) {
  state.view = view;
  document.body.dataset.view = view;
  for (const button of views) {
    const isSeen = button.dataset.view === view;
    if (isSeen) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
    at(`${button.dataset.view}-view`).hidden = !isSeen;
  }
  if (view === "find") find.see();
  changed();
}

function choose(id) {
  take(id);
  sae = about.saes.find((each) => each.id === id);
  at("sae").value = id;
  const told = [sae.title, sae.kind, `${whole(sae.d_sae)} features of ${whole(sae.d_in)} dimensions`, sae.model];
  at("about").textContent = told.filter(Boolean).join(" · ");
  forget();
  operations.allow({ d_sae: sae.d_sae, most: about.limits.operations, thinking: about.thinking });
  state.shade = state.shade.filter((feature) => feature < sae.d_sae);
  text.begin(about, sae);
  find.begin(sae);
  steer.begin(about, sae);
  look(state.view);
}

async function start() {
  try {
    about = await get("/api/saes");
  } catch (error) {
    at("about").textContent = error.message;
    return;
  }
  at("sae").replaceChildren(...about.saes.map(({ id, title }) => element("option", { value: id }, title)));
  const isKnown = about.saes.some(({ id }) => id === state.sae);
  if (state.sae && !isKnown) tell(`The link is of another SAE, ${state.sae}. This server has ${about.saes.length === 1 ? "one" : "others"}.`);
  document.querySelector("label:has(#sae)").hidden = about.saes.length < 2;
  choose(isKnown ? state.sae : about.saes[0].id);
}

const shadingHere = () => (sae.text ? state.shade : null);
const done = {
  card: (feature) => card.open(feature, shadingHere()),
  shade: (feature) => {
    card.close();
    text.toggleShade(feature);
    if (state.view !== "text") look("text");
  },
  steer: (feature) => {
    card.close();
    tell(operations.put(feature));
  },
};

document.addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-do]");
  if (button) done[button.dataset.do](Number(button.dataset.feature));
});
document.addEventListener("dragstart", (event) => {
  const feature = event.target.closest?.("[draggable][data-feature]")?.dataset.feature;
  if (feature === undefined) return;
  event.dataTransfer.setData(DRAGGED, feature);
  event.dataTransfer.setData("text/plain", feature);
  event.dataTransfer.effectAllowed = "copy";
});
operations.droppable(at("steering"), (feature) => tell(operations.put(feature)));
at("operation-form").addEventListener("submit", (event) => {
  event.preventDefault();
  tell(operations.put(at("operation-feature").valueAsNumber));
  at("operation-feature").value = "";
});
for (const button of views) button.addEventListener("click", () => look(button.dataset.view));
at("sae").addEventListener("change", () => choose(at("sae").value));
at("copy-link").addEventListener("click", () => {
  if (keep()) copy(at("copy-link"), location.href);
  else tell("The texts are too long for a link.");
});
at("card-close").addEventListener("click", card.close);
window.addEventListener("hashchange", () => location.reload()); // another link was put in the place of this one
document.addEventListener("scroll", () => showTip(null), { passive: true });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") showTip(null);
});
start();
