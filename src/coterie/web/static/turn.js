// How one turn looks: the question, who answers it, the answer, and what can be done about it.

import { face } from "./experts.js";
import { render, show } from "./render.js";
import { showSources } from "./sources.js";

const REMEDIES = { retry: "Try again", restart: "Ask in a new conversation", edit: "Edit the message" };
const NOTES = { stopped: "Stopped before the end.", length: "The answer has reached its greatest length." };

/** An element for `turn`, and `update()` to bring it up to date. `onRemedy(turn)` is called when a remedy is pressed. */
export function view(turn, onRemedy) {
  const element = document.querySelector("#turn").content.cloneNode(true).firstElementChild;
  const part = (selector) => element.querySelector(selector);
  part(".question .words").textContent = turn.question;
  part(".copy").addEventListener("click", () => copy(turn.text, part(".copy span")));
  part(".remedy").addEventListener("click", () => onRemedy(turn));

  function update() {
    const answer = part(".answer");
    answer.dataset.state = turn.state;
    answer.ariaBusy = String(["waiting", "streaming"].includes(turn.state));
    showByline(turn, answer);
    show(part(".answer .words"), render(turn.text));
    showSources(turn, part(".sources"));
    part(".copy").hidden = !turn.text || answer.ariaBusy === "true";
    const note = NOTES[turn.state] ?? (turn.state === "done" && NOTES[turn.finish]);
    part(".note").textContent = note || "";
    part(".note").hidden = !note;
    showProblem(turn.problem, element);
  }

  update();
  return { element, update };
}

function showByline(turn, answer) {
  const part = (selector) => answer.querySelector(selector);
  const name = turn.by ? (turn.by.expert ?? "base") : turn.who; // "auto" until it has chosen
  const { hue, mark } = face(name);
  answer.dataset.hue = hue;
  if (!part(".mark").isEqualNode(mark)) part(".mark").replaceWith(mark);
  part(".byline .name").textContent = name;
  part(".byline .version").textContent = turn.by?.version ? `version ${turn.by.version}` : "";
  part(".byline .chosen").textContent = turn.by ? reason(turn.by) : turn.state === "waiting" ? "one moment" : "";
}

/** Why this one answers. The similarity is of the question to the nearest that the expert was trained on. */
function reason({ expert, routed, similarity, known }) {
  if (known === false && !routed && !expert) return "no source says anything about it";
  if (!routed) return "";
  if (!expert) return "chosen by auto, as no expert is near enough";
  return similarity === null ? "chosen by a rule" : `chosen by auto, similarity ${similarity.toFixed(2)}`;
}

function showProblem(problem, element) {
  const part = (selector) => element.querySelector(selector);
  part(".problem").hidden = !problem;
  if (!problem) return;
  part(".problem .title").textContent = problem.title;
  part(".problem .advice").textContent = problem.advice;
  const button = part(".remedy");
  const tick = () => {
    const wait = Math.ceil(((problem.until ?? 0) - Date.now()) / 1000);
    button.disabled = wait > 0;
    button.textContent = REMEDIES[problem.remedy] + (wait > 0 ? ` in ${wait} s` : "");
    if (wait > 0) setTimeout(tick, 250);
  };
  tick();
}

async function copy(text, label) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text);
  }
  label.textContent = "Copied";
  setTimeout(() => (label.textContent = "Copy"), 2000);
}

/** Browsers keep the clipboard API to https and localhost; this is the way on a shop's own network. */
function copyBySelection(text) {
  const focused = document.activeElement;
  const area = document.createElement("textarea");
  area.className = "unseen";
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
  focused?.focus();
}
