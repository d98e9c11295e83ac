// Elements with text in them. What comes from texts, models and settings is only ever a text node or an attribute's
// value: nothing here parses markup.

export const at = (id) => document.getElementById(id);

/** An element with properties (names with a dash, and role, are attributes) and children, strings as text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A sentence in a place of its own that is hidden while there is none. */
export function say(place, sentence) {
  place.textContent = sentence;
  place.hidden = !sentence;
}

/** Copies a text, and says on the button for a moment that it did. */
export async function copy(button, text) {
  const name = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "The browser does not allow copying";
  }
  setTimeout(() => (button.textContent = name), 1500);
}
