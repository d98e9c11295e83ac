// The view Find: features by number, token, label, source, score, verdict, density, or by example.
import { at, element, say } from "./elements.js";
import { actions, chip, chips, learn, many, replaceTable, table } from "./feature_items.js";
import { get, send } from "./server.js";
import { changed, state } from "./state.js";
import { digits, percent, thousandths, whole } from "./words.js";

const PAGE = 50; // features
const form = at("find-form");
const FIELDS = [...form.elements].map(({ name }) => name).filter(Boolean);
const EXAMPLES = ["yes", "no"];
let sae = null;
let running = null;
let asked = false; // whether anything was looked for yet

/** Begins with what the link holds. The first page is asked for when the view is first seen. */
export function begin(chosen) {
  running?.abort();
  [sae, asked] = [chosen, false];
  for (const each of form.querySelectorAll("[data-has]")) {
    each.hidden = !sae.has[each.dataset.has];
    if (each.hidden) state.find[each.querySelector("[name]").name] = "";
  }
  if (!sae.sources.includes(state.find.source)) state.find.source = "";
  const sources = sae.sources.map((source) => element("option", { value: source }, `only ${source}`));
  form.elements.source.replaceChildren(element("option", { value: "" }, "any source"), ...sources);
  for (const name of FIELDS) form.elements[name].value = state.find[name];
  for (const name of EXAMPLES) at(name).value = state.find[name];
  at("example").open = state.find.example;
  at("example").hidden = !sae.text;
  at("found-table").replaceChildren();
  at("paging").hidden = true;
}

/** To be called when the view is seen. */
export function see() {
  if (!asked) look();
}

const scaled = (text, unit) => (text === "" ? "" : Number(text) / unit);

async function look() {
  asked = true;
  running?.abort();
  const mine = (running = new AbortController());
  const { find } = state;
  say(at("find-status"), "Looking …");
  try {
    const found = find.example && sae.text ? await byExample(mine.signal) : await byFields(mine.signal);
    if (mine === running) show(found);
  } catch (error) {
    if (error.name === "AbortError") return;
    say(at("find-status"), error.message);
    at("found-table").replaceChildren();
    at("paging").hidden = true;
  }
}

function byFields(signal) {
  const { find } = state;
  const given = Object.fromEntries(FIELDS.map((name) => [name, find[name]]));
  given.min_density = scaled(find.min_density, 100);
  given.max_density = scaled(find.max_density, 100);
  given.min_score = scaled(find.min_score, 1000);
  const page = { sort: find.sort, order: find.sort ? find.order : "", offset: find.offset || "", limit: PAGE };
  return get("/api/find", { sae: state.sae, ...given, ...page }, signal);
}

async function byExample(signal) {
  const [yes, no] = EXAMPLES.map((name) => state.find[name].split("\n").filter((line) => line.trim()));
  if (!yes.length) return { total: 0, features: [], why: "Give a text at least that it should fire on." };
  const { features } = await send("/api/find", { sae: state.sae, yes, no }, signal);
  return { total: features.length, features };
}

function show(found) {
  const { features, total } = found;
  const { find } = state;
  learn(features);
  say(at("find-status"), found.why ?? (total ? `${many(total)} found` : "No feature fits all of this."));
  const made = features.length ? element("div", { className: "scroll" }, table(features, columns(features), sorting(features), resort)) : "";
  replaceTable(at("found-table"), made);
  at("paging").hidden = find.example || total <= PAGE;
  at("page-of").textContent = `${whole(find.offset + 1)} to ${whole(find.offset + features.length)} of ${whole(total)}`;
  at("previous").disabled = find.offset === 0;
  at("next").disabled = find.offset + PAGE >= total;
}

/** What the server sorts by where nothing was chosen. */
function sorting(features) {
  if (state.find.example) return {};
  if (state.find.sort) return state.find;
  const isMatched = features.some(({ match }) => match !== null && match !== undefined);
  return { sort: isMatched ? "match" : sae.has.score ? "score" : "density", order: "desc" };
}

function resort(sort, order) {
  Object.assign(state.find, { sort, order, offset: 0 });
  changed();
  look();
}

function columns(features) {
  const has = (name) => features.some((each) => each[name] !== null && each[name] !== undefined && each[name] !== "");
  const rounded = (name) => (row) => (row[name] === null ? "–" : `${Math.round(100 * row[name])}%`);
  const texts = (name) => (row) => `${digits(row[name])}${row[`${name}_texts`] === undefined ? "" : ` (${row[`${name}_texts`]})`}`;
  const given = state.find.example;
  const all = [
    { key: "number", title: "Feature", cell: (row) => chip(row.number), name: "", first: "asc" },
    has("label") && { key: "label", title: "Label", cell: ({ label }) => label, wide: true, first: "asc", name: "" },
    { key: "fires_on", title: "Fires on", cell: (row) => chips(row.fires_on.slice(0, 5)), wide: true, plain: true, name: "" },
    given && { key: "yes", title: "On these", cell: texts("yes") },
    given && { key: "no", title: "On those", cell: texts("no") },
    has("match") && { key: "match", title: "Match", cell: (row) => digits(row.match) },
    sae.has.score && { key: "score", title: "ReasonScore", cell: (row) => thousandths(row.score) },
    has("verdict") && { key: "verdict", title: "Injection", cell: (row) => row.verdict || "–", text: true, first: "asc" },
    has("explained") && { key: "explained", title: "By token", cell: rounded("explained") },
    has("reasoning_share") && { key: "reasoning_share", title: "In reasoning", cell: rounded("reasoning_share") },
    { key: "density", title: "Density", cell: (row) => percent(row.density) },
    { key: "max", title: "Max", cell: (row) => digits(row.max) },
    { key: "do", title: "", cell: (row) => actions(row.number, sae.text ? state.shade : null), plain: true, name: "" },
  ].filter(Boolean);
  return given ? all.map((column) => ({ ...column, plain: true })) : all; // examples come in the order of how well they fit
}

function turn(by) {
  state.find.offset = Math.max(0, state.find.offset + by);
  changed();
  look();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  for (const name of FIELDS) state.find[name] = form.elements[name].value;
  Object.assign(state.find, { example: false, offset: 0, sort: "" });
  changed();
  look();
});
form.addEventListener("reset", () => setTimeout(() => form.requestSubmit())); // when the fields are empty
at("example-form").addEventListener("submit", (event) => {
  event.preventDefault();
  for (const name of EXAMPLES) state.find[name] = at(name).value;
  Object.assign(state.find, { example: true, offset: 0 });
  changed();
  look();
});
at("previous").addEventListener("click", () => turn(-PAGE));
at("next").addEventListener("click", () => turn(PAGE));
