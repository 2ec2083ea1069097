// Who may answer: the radio buttons of the page, and the face that each choice has.

const group = document.querySelector("#who");
const toggle = document.querySelector("#choose"); // opens the group where there is no room for it
const KEY = "coterie.who";

/** The value of the chosen button: "auto", "base" or an expert's name. */
export function chosen() {
  return group.querySelector("input:checked").value;
}

/** Colour and mark of an answerer. An expert that has left the library since has a grey one. */
export function face(name) {
  const input = [...group.querySelectorAll("input")].find((i) => i.value === name);
  if (input) {
    const choice = input.closest(".choice");
    return { hue: choice.dataset.hue, mark: choice.querySelector(".mark").cloneNode(true) };
  }
  const mark = document.createElement("span");
  mark.className = "mark disc";
  mark.ariaHidden = "true";
  mark.textContent = name[0];
  return { hue: "", mark };
}

function show() {
  document.body.dataset.hue = face(chosen()).hue;
  document.querySelector("#chosen").textContent = chosen();
  document.querySelector("#to").textContent = chosen();
}

function open(yes) {
  toggle.ariaExpanded = String(yes);
}

/** Close the group if it is open over the page; says whether it was. */
export function close() {
  const was = toggle.ariaExpanded === "true";
  open(false);
  return was;
}

try {
  const kept = [...group.querySelectorAll("input")].find((i) => i.value === sessionStorage.getItem(KEY));
  if (kept) kept.checked = true;
} catch {
  // Storage is forbidden: the page's own choice stands.
}
show();
group.addEventListener("change", () => {
  show();
  try {
    sessionStorage.setItem(KEY, chosen());
  } catch {
    // The choice lives as long as the page.
  }
});
toggle.addEventListener("click", () => open(toggle.ariaExpanded !== "true"));
document.addEventListener("click", (event) => {
  const pointed = event.detail > 0; // arrow keys click too, and must be able to pass by
  if (pointed && !toggle.contains(event.target) && (!group.contains(event.target) || event.target.closest(".choice"))) {
    close();
  }
});
