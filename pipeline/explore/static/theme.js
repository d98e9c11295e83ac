"use strict";
// Light or dark: as the system says, or as the button was last left. The styles have one set of dark colours, in media
// rules, so the choice changes what these rules ask for. Loaded before the page is painted, so nothing flashes.
const system = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = localStorage.getItem("theme");
  return chosen ? chosen === "dark" : system.matches;
}

function darkRules() {
  const rules = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
  return rules.filter((rule) => rule instanceof CSSMediaRule && /color-scheme|^all$|^not all$/.test(rule.media.mediaText));
}

function paint() {
  for (const rule of darkRules()) rule.media.mediaText = isDark() ? "all" : "not all";
  document.documentElement.style.colorScheme = isDark() ? "dark" : "light";
  const button = document.getElementById("theme");
  if (button) button.textContent = isDark() ? "Light" : "Dark"; // what it would do
}

paint();
system.addEventListener("change", paint);
document.addEventListener("DOMContentLoaded", () => {
  paint();
  document.getElementById("theme").addEventListener("click", () => {
    localStorage.setItem("theme", isDark() ? "light" : "dark");
    paint();
  });
});
