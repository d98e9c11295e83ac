// A small card of one feature over the page, with a link to its whole page.
import { actions, chips, learn } from "./feature_items.js";
import { at, element } from "./elements.js";
import { get } from "./server.js";
import { state } from "./state.js";
import { level, shadeClass } from "./tokens.js";
import { digits, percent, running, thousandths, whole } from "./words.js";

const dialog = at("card");
let shown = 0; // counts what was asked for, as answers may come in another order

/** Opens the card of a feature. `shading` are those that shade the text, null where there is none to shade. */
export async function open(feature, shading) {
  const asked = ++shown;
  at("card-title").textContent = `Feature ${feature}`;
  at("card-body").replaceChildren("Loading …");
  if (!dialog.open) dialog.showModal();
  try {
    const found = await get(`/api/feature/${encodeURIComponent(state.sae)}/${feature}`);
    if (asked === shown) fill(feature, found, shading);
  } catch (error) {
    if (asked === shown) at("card-body").replaceChildren(error.message);
  }
}

export const close = () => dialog.close();

function fill(feature, found, shading) {
  learn([found]);
  const figures = [
    ["Density", percent(found.density)],
    ["Largest activation", digits(found.max)],
    ["ReasonScore, 10⁻³", found.score == null ? null : `${thousandths(found.score)}, rank ${whole(found.rank)}`],
    ["Token injection", found.verdict],
    ["Explained by token", found.explained == null ? null : percent(found.explained)],
  ].filter(([, value]) => value !== null && value !== undefined);
  const lists = [
    ["Fires on", found.fires_on],
    ["Promotes", found.promoted],
  ].filter(([, texts]) => texts?.length);
  at("card-body").replaceChildren(
    ...(found.label ? [element("p", { className: "label" }, found.label)] : []),
    element("dl", {}, ...figures.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    ...lists.flatMap(([name, texts]) => [element("h3", {}, name), chips(texts)]),
    ...excerpts(found),
    element(
      "p",
      { className: "controls" },
      element("a", { href: `/feature/${encodeURIComponent(state.sae)}/${feature}` }, "Its page"),
      actions(feature, shading),
    ),
  );
}

function excerpts(found) {
  if (!found.excerpts?.length) return [element("p", { className: "soft" }, "It fires on none of the held-out tokens.")];
  const lines = found.excerpts.map((tokens) => {
    const made = tokens.map(({ text, value }) =>
      element("i", { className: shadeClass(level(value, found.max)) }, running(text)),
    );
    return element("p", { className: "tokens" }, ...made);
  });
  return [element("h3", {}, "Strongest contexts"), ...lines];
}
