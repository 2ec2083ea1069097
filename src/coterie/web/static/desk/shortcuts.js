// Keyboard shortcuts that each agent may change; they are kept in the browser.

import { element, find } from "./dom.js";

const DEFAULTS = {
  next: ["j", "Next conversation"], previous: ["k", "Previous conversation"], take: ["t", "Take"],
  reply: ["r", "Write a reply"], note: ["n", "Write a private note"], insert: ["i", "Insert the suggested reply"],
  release: ["u", "To the queue"], bot: ["b", "To the assistant"], resolve: ["e", "Resolve"], search: ["/", "Search"],
  keys: ["?", "Show the shortcuts"],
};
const KEY = "coterie.shortcuts";

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

export const key = (name) => kept()[name] ?? DEFAULTS[name][0];

function set(name, value) {
  try {
    // A key does one thing: who had it before has none.
    const others = Object.keys(DEFAULTS).filter((n) => n !== name && key(n) === value).map((n) => [n, ""]);
    localStorage.setItem(KEY, JSON.stringify({ ...kept(), ...Object.fromEntries(others), [name]: value }));
  } catch {
    // Storage is forbidden: the defaults stand.
  }
  show();
}

/** Run `actions[name]()` when its key is pressed and nobody is writing. */
export function listen(actions) {
  document.addEventListener("keydown", (event) => {
    const writing = event.target.closest("input, textarea, select, [contenteditable], dialog[open]");
    if (event.key === "Escape" && event.target.closest("#composer, #find")) return event.target.blur();
    if (writing || event.ctrlKey || event.metaKey || event.altKey) return;
    const name = Object.keys(DEFAULTS).find((n) => key(n) === event.key);
    if (!name) return;
    event.preventDefault();
    actions[name]();
  });
  find("#keys-open").addEventListener("click", open);
  find("#keys-reset").addEventListener("click", () => {
    localStorage.removeItem(KEY);
    show();
  });
  show();
}

export function open() {
  show();
  find("#keys").showModal();
}

function show() {
  for (const shown of document.querySelectorAll("[data-key]")) shown.textContent = key(shown.dataset.key);
  find("#keys-list").replaceChildren(
    ...Object.entries(DEFAULTS).flatMap(([name, [, label]]) => {
      const field = element("input", { id: `key-${name}`, value: key(name), readonly: "", autocomplete: "off" });
      field.addEventListener("keydown", (event) => {
        if (["Tab", "Escape", "Enter", "Shift", "Control", "Alt", "Meta"].includes(event.key)) return;
        event.preventDefault();
        set(name, event.key);
        find(`#key-${name}`).focus();
      });
      return [element("dt", {}, element("label", { for: `key-${name}` }, label)), element("dd", {}, field)];
    }),
  );
}
