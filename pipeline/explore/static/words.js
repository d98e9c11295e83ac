// Figures and tokens as text, as the feature pages show them (evaluate/feature_views.py).

const LONGEST = 40; // characters of a token that are shown
const NAMED = { " ": "·", "\n": "↵", "\t": "⇥", "\r": "␍" };
const HIDDEN = /[\p{C}\p{Z}]/u;

/** Three digits that count; small ones as powers of ten; a dash where there is none. */
export function digits(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  const after = value === 0 ? 2 : Math.max(0, 2 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en", { minimumFractionDigits: after, maximumFractionDigits: after });
}

export const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + digits(Math.abs(value));
export const percent = (value) => (value === null || value === undefined ? "–" : `${digits(100 * value)}%`);
export const thousandths = (value) => (value === null || value === undefined ? "–" : (1000 * value).toFixed(3));
export const whole = (value) => value.toLocaleString("en");

/** A token's text with nothing in it that cannot be seen or that moves other text about. */
export function visible(text, blank = NAMED[" "]) {
  const characters = [...text];
  const shown = characters.slice(0, LONGEST).map((each) => {
    if (each === " ") return blank;
    if (each in NAMED) return NAMED[each];
    return HIDDEN.test(each) ? `⟨U+${each.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩` : each;
  });
  const mark = /^\p{M}/u.test(text) ? "◌" : ""; // it would sit on the token before
  const more = characters.length > LONGEST ? `… (${whole(characters.length)} characters)` : "";
  return mark + shown.join("") + more;
}

/** The same within running text: blanks are blanks, and a line ends where the token ends it. */
export function running(text) {
  const shown = text.replaceAll(" ", "") ? visible(text, " ") : visible(text);
  return text.includes("\n") ? shown.replaceAll("↵", "↵\n") : shown;
}
