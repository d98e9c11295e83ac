// All that the views show, kept in the link's fragment, which no server and no log of one ever sees. A link may come
// from a stranger: each field is taken only if it is of its kind, and nothing is written by the model until a button is
// pressed. The tab remembers the state too, so a link with some fields alone (a feature page's) changes only those.

export const OPS = ["add", "set", "ablate", "scale"];
export const WHERE = ["all", "prompt", "generated", "thinking"];
export const ROLES = ["user", "assistant", "system"];
const LONGEST = 1_000_000; // characters of a fragment; browsers refuse twice as much

const string = (value) => (typeof value === "string" ? value : undefined);
const flag = (value) => (typeof value === "boolean" ? value : undefined);
const among = (all) => (value) => (all.includes(value) ? value : undefined);
const number = (low, high) => (value) => (typeof value === "number" && value >= low && value <= high ? value : undefined);
const count = (low = 0) => (value) => (Number.isSafeInteger(value) && value >= low ? value : undefined);
const list = (clean) => (value) =>
  Array.isArray(value) ? value.map(clean).filter((each) => each !== undefined) : undefined;
const orNone = (clean) => (value) => (value === null ? null : clean(value));
const fields = (shape) => (value) => {
  const given = value !== null && typeof value === "object" && !Array.isArray(value) ? value : {};
  const entries = Object.entries(shape).map(([name, [clean, otherwise]]) => [name, clean(given[name]) ?? otherwise()]);
  return Object.fromEntries(entries);
};

const operation = fields({
  feature: [count(), () => 0],
  op: [among(OPS), () => "add"],
  strength: [number(-1e6, 1e6), () => 1],
  where: [among(WHERE), () => "all"],
});
const message = fields({ role: [among(ROLES), () => "user"], content: [string, () => ""] });
const find = fields({
  ...Object.fromEntries(
    ["q", "token", "promotes", "label", "source", "verdict", "min_density", "max_density", "min_score", "yes", "no"].map(
      (name) => [name, [string, () => ""]],
    ),
  ),
  example: [flag, () => false],
  sort: [string, () => ""],
  order: [among(["asc", "desc"]), () => "desc"],
  offset: [count(), () => 0],
});
const clean = fields({
  view: [among(["text", "find", "steer"]), () => "text"],
  sae: [string, () => ""],
  texts: [list(string), () => ["", ""]],
  chat: [flag, () => false],
  comparing: [flag, () => false],
  shade: [list(count()), () => []],
  sort: [string, () => ""],
  order: [among(["asc", "desc"]), () => "desc"],
  find: [find, () => find({})],
  operations: [list(operation), () => []],
  messages: [list(message), () => [message({})]],
  conversation: [flag, () => true],
  max_new_tokens: [count(1), () => 64],
  temperature: [number(0, 100), () => 0],
  top_p: [number(0, 1), () => 1],
  seed: [count(), () => 0],
  answerShade: [orNone(count()), () => null],
});

const OF_ONE_SAE = ["shade", "operations", "answerShade"]; // another one's features have other meanings

function parsed(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" ? value : {};
  } catch {
    return {};
  }
}

function start() {
  const kept = parsed(sessionStorage.getItem("explore"));
  let fragment = location.hash.slice(1);
  try {
    fragment = decodeURIComponent(fragment);
  } catch {
    fragment = ""; // no UTF-8
  }
  const given = parsed(fragment);
  if (given.sae && given.sae !== kept.sae) for (const name of OF_ONE_SAE) delete kept[name];
  const found = clean({ ...kept, ...given });
  for (const feature of list(count())(given.add) ?? []) add(found, feature);
  return found;
}

export const state = start();

/** Another SAE: what speaks of features of the one before goes. */
export function take(sae) {
  if (state.sae && state.sae !== sae) {
    const empty = clean({});
    for (const name of OF_ONE_SAE) state[name] = empty[name];
  }
  state.sae = sae;
}

/** Adds a feature to the steering list of a state, unless it is there. */
export function add(to, feature) {
  if (!to.operations.some((each) => each.feature === feature)) to.operations.push(operation({ feature }));
}

let waiting = null;
/** To be called after each change: writes the link a moment later, as browsers bound how often that may be done. */
export function changed() {
  clearTimeout(waiting);
  waiting = setTimeout(keep, 200);
}

window.addEventListener("pagehide", () => {
  if (waiting) keep();
});

/** Writes the link now; whether the state fits into one. */
export function keep() {
  clearTimeout(waiting);
  waiting = null;
  const text = JSON.stringify(state);
  const fragment = encodeURIComponent(text);
  const fits = fragment.length <= LONGEST;
  if (fits) sessionStorage.setItem("explore", text);
  history.replaceState(null, "", fits ? `#${fragment}` : location.pathname);
  return fits;
}
