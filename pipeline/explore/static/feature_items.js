// Features as they stand in lists and tables: a number to drag or to open, a label, and what can be done with it.
// What the buttons do is said once, by main.js, which listens for data-do.
import { element } from "./elements.js";
import { whole } from "./words.js";

export const DRAGGED = "application/x-feature"; // the type of what is dragged: nothing else can be dropped
const known = new Map(); // features to label and tokens, as the server last said them

/** Remembers what features are called, and the tokens that they fire on. */
export function learn(features) {
  for (const { feature, number, label, fires_on } of features) known.set(feature ?? number, { label, fires_on });
}

export const forget = () => known.clear();
export const isKnown = (feature) => known.has(feature);

/** What a feature is called: its label, or the tokens that it fires on most often; empty where neither is known. */
function nameOf(feature) {
  const { label, fires_on } = known.get(feature) ?? {};
  return label || (fires_on ?? []).slice(0, 3).join("  ");
}

/** The same as an element. */
export function told(feature) {
  const { label, fires_on } = known.get(feature) ?? {};
  return element("span", { className: "soft label" }, label || chips((fires_on ?? []).slice(0, 3)));
}

/** A button with the number: opens the feature's card, and can be dragged. */
export function chip(feature) {
  return element(
    "button",
    {
      type: "button",
      className: "feature",
      draggable: true,
      "data-do": "card",
      "data-feature": feature,
      "aria-label": `Feature ${[feature, nameOf(feature)].filter((part) => part !== "").join(", ")}: open its card`,
    },
    String(feature),
  );
}

/** Buttons that shade by a feature and put it into the steering list. */
export function actions(feature, shading = null) {
  const made = element("span", { className: "do" });
  if (shading !== null) {
    const pressed = shading.includes(feature);
    made.append(
      element(
        "button",
        {
          type: "button",
          "data-do": "shade",
          "data-feature": feature,
          "aria-pressed": pressed,
          "aria-label": `Shade the text by feature ${feature}`,
        },
        "Shade",
      ),
    );
  }
  made.append(
    element(
      "button",
      { type: "button", "data-do": "steer", "data-feature": feature, "aria-label": `Add feature ${feature} to the steering list` },
      "Steer",
    ),
  );
  return made;
}

/** Tokens as chips; the server has named what is hidden in them. */
export function chips(texts) {
  return element("span", { className: "chips" }, ...texts.map((text) => element("span", { className: "chip" }, text)));
}

/**
 * A table of features. `columns`: key, title, cell(row), and wide or text (may break), plain (not sorted by), first (the
 * order of a first press), name (on a phone). `sorted` is called with the key and the order that a press on a header asks for.
 */
export function table(rows, columns, { sort, order }, sorted) {
  const heads = columns.map(({ key, title, wide, plain, first = "desc" }) => {
    const head = element("th", { scope: "col", className: `${wide ? "wide" : ""} ${plain ? "plain" : ""}` });
    if (plain) head.append(title);
    else {
      const other = order === "desc" ? "asc" : "desc";
      const press = () => sorted(key, key === sort ? other : first);
      head.append(element("button", { type: "button", onclick: press, "data-key": key }, title));
      if (key === sort) head.setAttribute("aria-sort", order === "desc" ? "descending" : "ascending");
    }
    return head;
  });
  const lines = rows.map((row) => {
    const cells = columns.map(({ title, cell, wide, text, name }) => {
      const made = element("td", { className: wide ? "wide" : text ? "text" : "" }, cell(row));
      if (name !== "") made.dataset.label = name ?? title.toLowerCase();
      return made;
    });
    return element("tr", { className: "row" }, ...cells);
  });
  const made = element("table", { className: "index found" });
  made.append(element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines));
  return made;
}

/** Puts a table in the place of another; a header's button that had the focus has it again. */
export function replaceTable(place, made) {
  const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  place.replaceChildren(made);
  if (key) place.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus();
}

/** "12 features", "1 feature". */
export const many = (count, noun = "feature") => `${whole(count)} ${noun}${count === 1 ? "" : "s"}`;
