"use strict";
// Tables are sorted by a column: highest first, and lowest first at the next press. What has no value comes last.
function sortable(table, value) {
  const body = table.tBodies[0];
  const headers = [...table.querySelectorAll("th[data-key]")];
  const sort = (header, descending) => {
    for (const other of headers) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const keyed = [...body.rows].map((row) => [value(row, header), row]);
    keyed.sort(([a], [b]) => Number.isNaN(a) - Number.isNaN(b) || (descending ? b - a : a - b) || 0);
    body.append(...keyed.map(([, row]) => row));
  };
  for (const header of headers) {
    const first = header.dataset.first ?? "descending";
    header.querySelector("button").addEventListener("click", () => {
      const sorted = header.getAttribute("aria-sort");
      sort(header, sorted ? sorted === "ascending" : first === "descending");
    });
  }
  return () => {
    const header = headers.find((each) => each.hasAttribute("aria-sort"));
    if (header) sort(header, header.getAttribute("aria-sort") === "descending");
  };
}

const ofCell = (row, header) => Number(row.cells[header.cellIndex].dataset.value || "NaN");
sortable(document.querySelector(".conditions"), ofCell);

// Problems: search, and compare the model as it is with one condition.
const problems = document.querySelector(".problems");
const rows = [...problems.tBodies[0].rows];
const search = document.getElementById("search");
const chosen = document.getElementById("chosen");
const differing = document.getElementById("differing");
const found = document.getElementById("found");
const numbers = new Map(
  rows.map((row) => [row, [row.dataset.right, row.dataset.tokens].map((list) => list.split(" ").map(Number))]),
);

function ofProblem(row, header) {
  const [right, tokens] = numbers.get(row);
  const other = Number(chosen?.value ?? 0);
  const values = {
    order: () => Number(row.dataset.order),
    none: () => right[0],
    chosen: () => right[other],
    difference: () => right[other] - right[0],
    tokens: () => tokens[0],
    longer: () => tokens[other] - tokens[0],
  };
  return values[header.dataset.key]();
}
const resort = sortable(problems, ofProblem);

function filter() {
  const wanted = search.value.trim().toLowerCase().split(/\s+/).join(" ");
  const other = Number(chosen?.value ?? 0);
  let count = 0;
  for (const row of rows) {
    const [right] = numbers.get(row);
    const differs = right[0] !== right[other];
    row.hidden = !((wanted === "" || row.dataset.text.includes(wanted)) && (!differing?.checked || differs));
    count += !row.hidden;
  }
  found.textContent = `${count} of ${rows.length} problems`;
}

const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toFixed(0);
function compare() {
  const other = Number(chosen.value);
  for (const row of rows) {
    const [right, tokens] = numbers.get(row);
    const change = right[other] - right[0];
    row.querySelector("a").hash = `c${other}`;
    row.querySelector(".chosen").textContent = `${right[other]} of ${problems.dataset.samples}`;
    const difference = row.querySelector(".difference");
    difference.textContent = signed(change);
    difference.className = `difference ${change > 0 ? "up" : change < 0 ? "down" : ""}`;
    row.querySelector(".longer").textContent = signed(Math.round(tokens[other] - tokens[0]));
  }
  resort();
  filter();
}

if (chosen) {
  chosen.addEventListener("change", compare);
  differing.addEventListener("change", filter);
}
search.addEventListener("input", filter);
window.addEventListener("pageshow", chosen ? compare : filter); // a browser that goes back fills the fields again
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !["INPUT", "SELECT"].includes(document.activeElement.tagName)) {
    event.preventDefault();
    search.focus();
  }
});
