// The view Text: which features fire at each token, of one text or of two side by side.
import { at, element, say } from "./elements.js";
import { actions, chip, chips, learn, many, replaceTable, table, told } from "./feature_items.js";
import { send } from "./server.js";
import { changed, state } from "./state.js";
import { HUES, level, shadeClass, showTip, TokenLine } from "./tokens.js";
import { digits, percent, signed, thousandths, visible, whole } from "./words.js";

const AT_A_TOKEN = 12; // features listed
const ROWS = 50; // of the table, until more are asked for
const boxes = [at("text-0"), at("text-1")];
const lines = [0, 1].map((n) => new TokenLine(at(`tokens-${n}`), (place, held) => point(n, place, held)));
let reads = []; // of each text: its tokens, and in CSR the features of each
let rows = []; // of the table
let shown = ROWS;
let held = null; // [text, place] of the token whose list stays
let running = null; // what would stop the request under way

export const shading = () => (state.shade.length || !rows.length ? state.shade : [rows[0].feature]);

/** Begins with what the link holds; a text in it is read at once. */
export function begin(about, sae) {
  for (const each of document.querySelectorAll("#text-form [data-chat]")) each.hidden = !about.chat;
  say(at("text-off"), sae.text ? "" : `No text can be read: ${sae.why_no_text}`);
  at("text-form").hidden = !sae.text;
  boxes.forEach((box, n) => (box.value = state.texts[n] ?? ""));
  at("text-chat").checked = state.chat;
  at("comparing").checked = state.comparing;
  compare();
  reset();
  if (sae.text && state.texts[0]?.trim()) read();
}

function reset() {
  running?.abort();
  [reads, rows, held] = [[], [], null];
  at("reading").hidden = true;
}

function compare() {
  for (const each of document.querySelectorAll("#text-view [data-second]")) each.hidden = !state.comparing;
}

async function read() {
  running?.abort();
  const mine = (running = new AbortController());
  const texts = boxes.slice(0, state.comparing ? 2 : 1).map((box) => box.value);
  if (texts.some((text) => !text.trim())) {
    return say(at("text-status"), texts.length > 1 ? "Both texts need a word at least." : "There is no text yet: type or paste one.");
  }
  say(at("text-status"), "Reading …");
  const late = setTimeout(() => say(at("text-status"), "Reading … After a start the model has to be loaded first."), 2500);
  try {
    const asked = { sae: state.sae, chat: state.chat };
    const found = await Promise.all(texts.map((text) => send("/api/features", { ...asked, text }, mine.signal)));
    if (mine === running) show(found);
  } catch (error) {
    if (error.name !== "AbortError") say(at("text-status"), error.message);
  } finally {
    clearTimeout(late);
  }
}

function show(found) {
  reads = found;
  held = null;
  shown = ROWS;
  found.forEach((each, n) => {
    learn(each.features);
    each.by = new Map(each.features.map((feature) => [feature.feature, feature]));
    lines[n].fill(each.tokens.map(({ text }) => text));
  });
  at("reading").hidden = false;
  list(-1);
  sortRows();
  const took = Math.max(...found.map(({ ms }) => ms ?? 0));
  const sizes = found.map(({ tokens, cut }) =>
    cut ? `Cut: the first ${whole(cut.kept)} of ${whole(cut.tokens)} tokens are read, as the model takes no more.` : many(tokens.length, "token"),
  );
  say(at("text-status"), `${sizes.join("; ")}${took ? ` (${digits(took)} ms)` : ""}`);
}

// Shading

/** Shades by a feature, or no longer by it. */
export function toggleShade(feature) {
  const others = state.shade.filter((each) => each !== feature);
  state.shade = others.length < state.shade.length ? others : [...others, feature].slice(-HUES);
  changed();
  for (const button of document.querySelectorAll("[data-do=shade][aria-pressed]")) {
    button.setAttribute("aria-pressed", state.shade.includes(Number(button.dataset.feature)));
  }
  drawShades();
}

function drawShades() {
  const set = shading();
  const tops = set.map((feature) => Math.max(0, ...reads.map((each) => topOf(each, feature))));
  reads.forEach((each, n) => {
    const hues = new Map(set.map((feature, hue) => [feature, hue]));
    const { indptr, feature, value } = each.active;
    for (let place = 0; place < each.tokens.length; place++) {
      let [depth, chosen] = [0, 0];
      for (let i = indptr[place]; i < indptr[place + 1]; i++) {
        const hue = hues.get(feature[i]);
        const here = hue === undefined ? 0 : level(value[i], tops[hue]);
        if (here > depth || (here && here === depth && hue < chosen)) [depth, chosen] = [here, hue];
      }
      lines[n].shade(place, each.tokens[place].counts === false ? "x" : shadeClass(depth, chosen));
    }
  });
  const legend = set.map((feature, hue) => {
    const className = `shade ${shadeClass(5, hue)}`;
    if (!state.shade.length) return element("span", { className }, `${feature} `, told(feature), " the first of the table");
    const about = { "data-do": "shade", "data-feature": feature, "aria-label": `No longer shade by feature ${feature}` };
    return element("button", { type: "button", className, ...about }, `${feature} `, told(feature), " ✕");
  });
  const hadFocus = at("shades").contains(document.activeElement);
  at("shades").replaceChildren(...legend);
  if (hadFocus) (at("shades").querySelector("button") ?? at("tokens-0")).focus();
  const most = tops.map((top) => digits(top)).join(", ");
  at("scale").textContent = set.length ? `up to ${most}${set.length > 1 ? "; where several fire, the strongest for its scale" : ""}` : "";
}

/** What a shade is a part of: the largest activation on held-out text; in this one, where there is none. */
function topOf(each, feature) {
  const known = each.by.get(feature);
  return known ? (known.held_out_max ?? 0) || known.max : 0;
}

// The list at a token

function active(n, place) {
  const { indptr, feature, value } = reads[n].active;
  const found = [];
  for (let i = indptr[place]; i < indptr[place + 1]; i++) found.push([feature[i], value[i]]);
  return found.sort((a, b) => b[1] - a[1]);
}

function point(n, place, hold) {
  if (hold) held = place >= 0 ? [n, place] : null;
  if (place >= 0) {
    const values = new Map(active(n, place));
    const firing = shading().filter((feature) => values.has(feature));
    const words = firing.map((feature) => `${feature}: ${digits(values.get(feature))}`).join("  ·  ");
    showTip(lines[n].tokens[place], words || "0");
  } else showTip(null);
  if (hold || !held) list(place >= 0 ? n : -1, place);
}

function list(n, place = 0) {
  if (n < 0) {
    at("at-title").textContent = "Strongest features at a token";
    at("at-about").textContent = "Point at a token, or go to one with the arrow keys. A click or Enter holds it.";
    return at("at-list").replaceChildren();
  }
  const found = active(n, place);
  const left = reads[n].tokens[place].counts === false ? " Training leaves this row out: its activations mean little." : "";
  at("at-title").textContent = `${visible(reads[n].tokens[place].text)}, token ${whole(place)}${state.comparing ? ` of text ${n + 1}` : ""}`;
  at("at-about").textContent = `${found.length ? `${many(found.length)} active` : "No feature is active here"}.${held ? " Held: Escape lets go." : ""}${left}`;
  const items = found.slice(0, AT_A_TOKEN).map(([feature, value]) =>
    element(
      "li",
      {},
      chip(feature),
      element("b", { className: "number" }, digits(value)),
      told(feature),
      actions(feature, state.shade),
    ),
  );
  at("at-list").replaceChildren(...items);
}

// The table

function sortRows() {
  const all = new Map();
  reads.forEach(({ features }, n) => {
    for (const each of features) {
      const row = all.get(each.feature) ?? { ...each, both: [0, 0] };
      row.both[n] = each.max;
      all.set(each.feature, row);
    }
  });
  const { sort, order } = sorting();
  const key = {
    difference: (row) => Math.abs(row.both[0] - row.both[1]),
    first: (row) => row.both[0],
    second: (row) => row.both[1],
  }[sort] ?? ((row) => row[sort]);
  const [down, differing] = [order === "desc" ? 1 : -1, state.comparing && at("only-differing").checked];
  const lacks = (row) => key(row) === null || key(row) === undefined;
  rows = [...all.values()]
    .filter((row) => !differing || !row.both[0] !== !row.both[1])
    .sort((a, b) => lacks(a) - lacks(b) || down * (key(b) - key(a)) || a.feature - b.feature);
  drawTable();
}

const isTwo = () => reads.length > 1;

function sorting() {
  const known = columns().some(({ key }) => key === state.sort);
  return known ? state : { sort: isTwo() ? "difference" : "max", order: "desc" };
}

function columns() {
  const here = (row) => element("span", { className: "chip" }, visible(reads[0].tokens[row.at].text));
  const ofOne = [
    { key: "max", title: "Max", cell: (row) => digits(row.max) },
    { key: "at", title: "Strongest at", cell: here, plain: true },
    { key: "sum", title: "Sum", cell: (row) => digits(row.sum) },
    { key: "count", title: "Tokens", cell: (row) => whole(row.count) },
    { key: "unusual", title: "Unusual", cell: (row) => digits(row.unusual) },
  ];
  const ofTwo = [
    { key: "first", title: "Max in first", cell: (row) => digits(row.both[0]) },
    { key: "second", title: "Max in second", cell: (row) => digits(row.both[1]) },
    { key: "difference", title: "Difference", cell: (row) => signed(row.both[0] - row.both[1]) },
  ];
  const scored = reads.some(({ features }) => features.some(({ score }) => score !== null));
  return [
    { key: "feature", title: "Feature", cell: (row) => chip(row.feature), name: "", first: "asc" },
    ...(rows.some(({ label }) => label) ? [{ key: "label", title: "Label", cell: ({ label }) => label, wide: true, plain: true, name: "" }] : []),
    { key: "fires_on", title: "Fires on", cell: ({ fires_on }) => chips(fires_on), wide: true, plain: true, name: "" },
    ...(isTwo() ? ofTwo : ofOne),
    ...(scored ? [{ key: "score", title: "ReasonScore", cell: (row) => thousandths(row.score) }] : []),
    { key: "density", title: "Density", cell: (row) => percent(row.density) },
    { key: "do", title: "", cell: (row) => actions(row.feature, state.shade), plain: true, name: "" },
  ];
}

function drawTable() {
  const made = table(rows.slice(0, shown), columns(), sorting(), (sort, order) => {
    Object.assign(state, { sort, order });
    changed();
    sortRows();
  });
  const scroll = element("div", { className: "scroll" }, made);
  const more = Math.min(100, rows.length - shown);
  if (more > 0) {
    const press = () => {
      shown += more;
      drawTable();
    };
    scroll.append(element("button", { type: "button", onclick: press, "data-key": "more" }, `Show ${many(more)} more`));
  }
  replaceTable(at("features-table"), rows.length ? scroll : element("p", {}, whyEmpty()));
  at("features-found").textContent = many(rows.length);
  drawShades();
  if (held) list(...held);
}

function whyEmpty() {
  const isCounted = reads.some((each) => each.tokens.some((token) => token.counts !== false));
  if (!isCounted) return "Training leaves out the first row of a text, and there is no other: put a word before.";
  return isTwo() ? "No feature fires in one of the texts alone." : "No feature fires on this text.";
}

at("text-form").addEventListener("submit", (event) => {
  event.preventDefault();
  read();
});
boxes.forEach((box, n) => {
  box.addEventListener("input", () => {
    state.texts = boxes.map(({ value }) => value);
    changed();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) read();
  });
});
at("text-chat").addEventListener("change", () => {
  state.chat = at("text-chat").checked;
  changed();
});
at("comparing").addEventListener("change", () => {
  state.comparing = at("comparing").checked;
  compare();
  changed();
  if (!state.comparing && isTwo()) show(reads.slice(0, 1));
});
at("only-differing").addEventListener("change", sortRows);
