// A line of tokens: built once, then only its classes change, so that thousands stay smooth. One listener for all.
import { at, element } from "./elements.js";
import { running } from "./words.js";

export const LEVELS = 9; // of shading, as features.css has them
export const HUES = 6; // of features that shade together, as explore.css has them
const tip = at("tip");

/** How strongly a token is shaded, from 0 to LEVELS. */
export const level = (value, top) => (value > 0 ? Math.min(LEVELS, Math.ceil((LEVELS * value) / top)) : 0);

/** The class of a shade; `hue` counts features that shade together. */
export const shadeClass = (depth, hue = 0) => (depth ? `a${depth}${hue ? ` h${hue}` : ""}` : "");

/** Text beside a token, or nothing. */
export function showTip(token, text) {
  tip.hidden = !token || !text;
  if (tip.hidden) return;
  tip.textContent = text;
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const left = Math.min(Math.max(4, box.left), document.documentElement.clientWidth - tip.offsetWidth - 4);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
}

export class TokenLine {
  /**
   * `point(place, held)` is told which token is pointed at by mouse or arrow keys (-1: none any more), and whether a
   * click or Enter holds it.
   */
  constructor(line, point) {
    this.line = line;
    this.point = point;
    this.tokens = [];
    this.shades = [];
    this.places = new Map();
    this.marked = -1;
    line.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && this.places.has(event.target)) this.mark(this.places.get(event.target), false);
    });
    line.addEventListener("pointerleave", () => this.mark(-1, false));
    line.addEventListener("click", (event) => {
      if (this.places.has(event.target)) this.mark(this.places.get(event.target), true);
    });
    line.addEventListener("keydown", (event) => this.key(event));
    line.addEventListener("blur", () => this.mark(-1, false));
    line.addEventListener("scroll", () => showTip(null), { passive: true });
  }

  clear() {
    this.line.replaceChildren();
    this.tokens = [];
    this.shades = [];
    this.places.clear();
    this.marked = -1;
  }

  fill(texts) {
    this.clear();
    const made = document.createDocumentFragment();
    for (const text of texts) made.append(this.made(text));
    this.line.append(made);
  }

  append(text) {
    this.line.append(this.made(text));
  }

  made(text) {
    const token = element("i", { textContent: running(text) });
    this.places.set(token, this.tokens.length);
    this.tokens.push(token);
    this.shades.push("");
    return token;
  }

  /** The class of the shade of a token; only a change touches the document. */
  shade(place, name) {
    if (this.shades[place] === name) return;
    this.shades[place] = name;
    this.tokens[place].className = place === this.marked ? `${name} on` : name;
  }

  mark(place, held) {
    if (this.marked >= 0) this.tokens[this.marked].classList.remove("on");
    this.marked = place;
    if (place >= 0) this.tokens[place].classList.add("on");
    this.point(place, held);
  }

  key(event) {
    const last = this.tokens.length - 1;
    const here = Math.max(0, this.marked);
    const to = {
      ArrowLeft: () => here - 1,
      ArrowRight: () => (this.marked < 0 ? 0 : here + 1),
      ArrowUp: () => this.beside(here, -1),
      ArrowDown: () => this.beside(here, 1),
      Home: () => 0,
      End: () => last,
      Enter: () => here,
    }[event.key];
    if (event.key === "Escape") this.mark(-1, true);
    if (!to || last < 0) return;
    event.preventDefault();
    const place = Math.min(last, Math.max(0, to()));
    this.tokens[place].scrollIntoView({ block: "nearest" });
    this.mark(place, event.key === "Enter");
  }

  /** The token above (-1) or below (1) one, in the lines that the browser made. */
  beside(place, step) {
    const from = this.tokens[place].getBoundingClientRect();
    let found = place;
    for (let next = place + step; next >= 0 && next < this.tokens.length; next += step) {
      const box = this.tokens[next].getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      if (found !== place && Math.abs(box.top - this.tokens[found].getBoundingClientRect().top) > from.height / 2) break;
      found = next;
      if (step > 0 ? box.right >= from.left : box.left <= from.left) break;
    }
    return found;
  }
}
