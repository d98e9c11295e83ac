"use strict";
// Activations of tokens: under the mouse, at a tap, and with the arrow keys within a context that has the focus.
const tip = document.getElementById("tip");
let marked = null;

function show(token) {
  if (marked) marked.classList.remove("on");
  marked = token;
  tip.hidden = !token;
  if (!token) return;
  token.classList.add("on");
  const line = token.parentElement;
  const place = Number(line.dataset.start) + Array.prototype.indexOf.call(line.children, token);
  const value = token.classList.contains("x") ? "left out of training" : token.dataset.v || "0";
  tip.textContent = `${value}  ·  ${JSON.stringify(token.textContent)}, position ${place}`;
  const box = token.getClientRects()[0];
  const left = Math.min(Math.max(4, box.left), document.documentElement.clientWidth - tip.offsetWidth - 4);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 0 ? above : box.bottom + 6}px`;
}

const tokenAt = (event) => event.target.closest?.(".tokens[data-start] > i") ?? null;
document.addEventListener("pointerover", (event) => {
  if (event.pointerType === "mouse") show(tokenAt(event));
});
document.addEventListener("click", (event) => show(tokenAt(event)));
document.addEventListener("scroll", () => show(marked), { passive: true });
document.addEventListener("focusout", () => show(null));
document.addEventListener("keydown", (event) => {
  const line = document.activeElement;
  if (event.key === "Escape") show(null);
  if (!line.matches(".tokens[data-start]") || !["ArrowLeft", "ArrowRight"].includes(event.key)) return;
  event.preventDefault();
  const next = event.key === "ArrowLeft" ? "previousElementSibling" : "nextElementSibling";
  show(marked?.parentElement === line ? marked[next] ?? marked : line.querySelector(".peak"));
});

// The index: search by number and by token, sort by column.
const search = document.getElementById("search");
if (search) {
  const body = document.querySelector(".index tbody");
  const rows = [...body.rows];
  const found = document.getElementById("found");
  const headers = [...document.querySelectorAll(".index th[data-key]")];

  const filter = () => {
    const wanted = search.value.trim().toLowerCase().replaceAll(" ", "·"); // as tokens show their blanks
    let count = 0;
    for (const row of rows) {
      const isNumber = /^\d+$/.test(wanted) && row.dataset.number.startsWith(wanted);
      row.hidden = !(wanted === "" || isNumber || row.dataset.tokens.includes(wanted));
      count += !row.hidden;
    }
    found.textContent = `${count} of ${rows.length} features`;
  };
  const sort = (header) => {
    const down = header.getAttribute("aria-sort") !== "descending" && header.dataset.key !== "number";
    const descending = header.dataset.key === "number" ? header.getAttribute("aria-sort") === "ascending" : down;
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const value = (row) => Number(row.dataset[header.dataset.key]);
    rows.sort((a, b) => (descending ? value(b) - value(a) : value(a) - value(b)));
    body.append(...rows);
  };
  for (const header of headers) header.querySelector("button").addEventListener("click", () => sort(header));
  search.addEventListener("input", filter);
  window.addEventListener("pageshow", filter); // a browser that goes back fills the field again
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== search) {
      event.preventDefault();
      search.focus();
    }
  });
}
