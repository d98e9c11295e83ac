// The view Steer: a conversation, answered by the model as it is and steered, side by side and token by token.
import { at, copy, element, say } from "./elements.js";
import { many } from "./feature_items.js";
import { events, get, Problem } from "./server.js";
import { changed, ROLES, state } from "./state.js";
import { level, shadeClass, showTip, TokenLine } from "./tokens.js";
import { digits, visible, whole } from "./words.js";

const NUMBERS = ["max_new_tokens", "temperature", "top_p", "seed"];
const sides = Object.fromEntries(["plain", "steered"].map((name) => [name, new Side(name)]));
let about = null;
let running = null; // what stops the answers under way
let top = 0; // activation of the strongest shade

/** One of the two answers. */
function Side(name) {
  this.name = name;
  this.place = at(name);
  this.line = new TokenLine(this.place, (n) => {
    const value = this.values[n];
    const told = value === null || value === undefined ? "not read by the model" : digits(value);
    showTip(this.line.tokens[n], n < 0 ? "" : `${told}  ·  ${visible(this.texts[n])}`);
  });
  this.clear = () => {
    this.line.clear();
    [this.values, this.texts] = [[], []];
    at(`${name}-end`).textContent = "";
    document.querySelector(`[data-keep=${name}]`).hidden = true;
  };
  this.append = ({ text, value }) => {
    const { scrollHeight, scrollTop, clientHeight } = this.place;
    const isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
    this.values.push(value);
    this.texts.push(text);
    this.line.append(text);
    if (isAtEnd) this.place.scrollTop = this.place.scrollHeight;
  };
  this.shade = (from) => {
    for (let n = from; n < this.values.length; n++) this.line.shade(n, shadeClass(level(this.values[n] ?? 0, top)));
  };
  this.end = ({ ended, tokens, processed, changed: at_ }) => {
    const place = name === "steered" ? ` Operated on at ${whole(at_)} of ${whole(processed)} tokens.` : "";
    const why = ended ? "ended by the model" : "cut at the number of new tokens";
    at(`${name}-end`).textContent = `${many(tokens, "token")}, ${why}.${place}`;
  };
  this.clear();
}

/** Begins with what the link holds. Nothing is written before the button is pressed. */
export function begin(server, sae) {
  about = server;
  stop();
  running = null;
  say(at("steer-off"), sae.text ? "" : `Nothing can be steered: ${sae.why_no_text}`);
  at("steer-form").hidden = !sae.text;
  for (const each of document.querySelectorAll("#steer-form [data-chat]")) each.hidden = !about.chat;
  at("steer-chat").checked = state.conversation;
  at("max_new_tokens").max = about.limits.new_tokens;
  at("answer-shade").max = sae.d_sae - 1;
  for (const name of NUMBERS) at(name).value = state[name];
  at("answer-shade").value = state.answerShade ?? "";
  at("answers").hidden = true;
  at("command").hidden = true;
  say(at("steer-status"), "");
  draw();
}

const isConversation = () => about.chat && state.conversation;

function draw(focus = -1) {
  if (!state.messages.length) state.messages.push({ role: "user", content: "" });
  const shown = isConversation() ? state.messages : state.messages.slice(0, 1);
  at("messages").replaceChildren(...shown.map(turn));
  at("add-message").hidden = !isConversation();
  if (focus >= 0) at("messages").querySelectorAll("textarea")[focus]?.focus();
}

function turn(message, n) {
  const name = isConversation() ? `Message ${n + 1}` : "Prompt";
  const box = element("textarea", { rows: 3, value: message.content, "aria-label": name, autocomplete: "off" });
  box.addEventListener("input", () => {
    message.content = box.value;
    changed();
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("steer-form").requestSubmit();
  });
  if (!isConversation()) return element("li", {}, element("label", { className: "field" }, name, box));
  const role = element("select", { "aria-label": `Who says message ${n + 1}` });
  role.append(...ROLES.map((each) => element("option", {}, each)));
  role.value = message.role;
  role.addEventListener("change", () => {
    message.role = role.value;
    changed();
  });
  const remove = element("button", { type: "button", "aria-label": `Remove message ${n + 1}` }, "✕");
  remove.addEventListener("click", () => {
    state.messages.splice(n, 1);
    changed();
    draw(Math.max(0, n - 1));
  });
  return element("li", { className: "turn" }, role, box, remove);
}

function asked() {
  const operations = state.operations.map((each) => ({ ...each }));
  const sampling = Object.fromEntries(NUMBERS.map((name) => [name, state[name]]));
  const text = isConversation() ? { messages: state.messages, chat: true } : { prompt: state.messages[0].content, chat: false };
  const shade = state.answerShade ?? operations[0]?.feature ?? null;
  return { sae: state.sae, ...text, operations, ...sampling, shade };
}

async function write() {
  stop();
  if (!state.messages.some(({ content }) => content.trim())) {
    return say(at("steer-status"), "There is nothing to answer yet: write a message.");
  }
  const mine = (running = new AbortController());
  const body = asked();
  for (const side of Object.values(sides)) side.clear();
  const title = body.shade === null ? "" : `, shaded by feature ${body.shade}`;
  at("plain-title").textContent = `As it is${title}`;
  at("steered-title").textContent = `Steered${title}`;
  at("answers").hidden = false;
  at("steered").closest("section").hidden = !body.operations.length;
  at("command").hidden = true;
  busy(true);
  say(at("steer-status"), body.operations.length ? "Writing …" : "Writing … The steering list is empty: this is the model as it is.");
  try {
    await scaleOf(body.shade, mine.signal);
    await follow(body, mine.signal);
    say(at("steer-status"), "Done.");
  } catch (error) {
    const count = Object.values(sides).reduce((sum, { values }) => sum + values.length, 0);
    const isStopped = error.name === "AbortError";
    if (mine === running) say(at("steer-status"), isStopped ? `Stopped after ${many(count, "token")}.` : error.message);
    if (!isStopped && !(error instanceof Problem)) throw error;
  } finally {
    if (mine === running) busy(false);
  }
}

/** What a shade is a part of: the feature's largest activation on held-out text. */
async function scaleOf(feature, signal) {
  top = 0;
  if (feature === null) return;
  top = (await get(`/api/feature/${encodeURIComponent(state.sae)}/${feature}`, {}, signal)).max ?? 0;
}

async function follow(body, signal) {
  for await (const event of events("/api/steer", body, signal)) {
    if (event.error) throw new Problem(event.error);
    if (event.done) return showCommand(event.command);
    const side = sides[event.side];
    if (!side) continue;
    if (event.end) side.end(event);
    else {
      side.append(event);
      const isStronger = event.value > top;
      if (isStronger) top = event.value;
      for (const each of isStronger ? Object.values(sides) : [side]) each.shade(isStronger ? 0 : side.values.length - 1);
    }
  }
  throw new Problem("The answers broke off: the server closed the connection.");
}

function showCommand(command) {
  at("command").hidden = false;
  at("command-text").textContent = command ?? "None: steer takes one prompt, and one operation at least.";
  at("copy-command").hidden = !command;
}

function busy(isBusy) {
  at("stop").disabled = !isBusy;
  for (const side of Object.values(sides)) {
    side.place.setAttribute("aria-busy", isBusy);
    const isThere = !isBusy && isConversation() && side.texts.some((text) => text.trim());
    document.querySelector(`[data-keep=${side.name}]`).hidden = !isThere;
  }
}

function stop() {
  running?.abort();
}

at("steer-form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
at("stop").addEventListener("click", () => {
  stop();
  at("write").focus();
});
at("add-message").addEventListener("click", () => {
  state.messages.push({ role: state.messages.at(-1)?.role === "user" ? "assistant" : "user", content: "" });
  changed();
  draw(state.messages.length - 1);
});
at("steer-chat").addEventListener("change", () => {
  state.conversation = at("steer-chat").checked;
  changed();
  draw();
});
for (const name of NUMBERS) {
  at(name).addEventListener("input", () => {
    if (!at(name).validity.valid || at(name).value === "") return;
    state[name] = at(name).valueAsNumber;
    changed();
  });
}
at("answer-shade").addEventListener("input", () => {
  if (!at("answer-shade").validity.valid) return;
  state.answerShade = at("answer-shade").value === "" ? null : at("answer-shade").valueAsNumber;
  changed();
});
for (const button of document.querySelectorAll("[data-keep]")) {
  button.addEventListener("click", () => {
    const content = sides[button.dataset.keep].texts.join("");
    state.messages.push({ role: "assistant", content }, { role: "user", content: "" });
    changed();
    draw(state.messages.length - 1);
  });
}
at("copy-command").addEventListener("click", () => copy(at("copy-command"), at("command-text").textContent));
