// The page: what happens when the visitor writes, sends, stops, tries again or starts anew.

import { ask } from "./api.js";
import * as conversation from "./conversation.js";
import * as experts from "./experts.js";
import { explain } from "./problem.js";
import { view } from "./turn.js";

const find = (selector) => document.querySelector(selector);
const scroller = find("#scroller");
const message = find("#message");
const views = new Map(); // turn -> its view
let stopper = null; // of the answer under way

async function answer(turn) {
  stopper = new AbortController();
  Object.assign(turn, conversation.unanswered(experts.chosen()));
  busy(true);
  refresh(turn, true);
  try {
    for await (const piece of ask(turn.who, conversation.messages(turn), stopper.signal)) {
      if (piece.text) turn.state = "streaming"; // who answers is known before the first word
      turn.text += piece.text;
      turn.by = piece.by;
      turn.finish = piece.finish;
      refresh(turn);
    }
    turn.state = "done";
  } catch (error) {
    turn.state = stopper.signal.aborted ? "stopped" : "failed";
    if (turn.state === "failed") turn.problem = explain(error, turn === conversation.turns[0]);
  }
  stopper = null;
  busy(false);
  refresh(turn);
  conversation.save();
  announce(turn);
}

function send(question) {
  if (!question.trim() || stopper) return;
  const turn = conversation.add(question.trim());
  append(turn);
  answer(turn);
}

function stop() {
  if (document.activeElement === find("#stop")) message.focus(); // the button is about to go
  stopper?.abort();
}

function remedy(turn) {
  if (turn.problem.remedy === "edit") message.value = turn.question;
  if (turn.problem.remedy !== "retry") startAnew();
  if (turn.problem.remedy === "restart") send(turn.question);
  if (turn.problem.remedy === "retry" && !stopper) answer(turn);
  fit();
  message.focus();
}

function startAnew() {
  stopper?.abort();
  conversation.clear();
  views.clear();
  find("#turns").replaceChildren();
  find("#empty").hidden = false;
  message.focus();
}

function append(turn) {
  const made = view(turn, remedy);
  views.set(turn, made);
  find("#empty").hidden = true;
  find("#turns").append(made.element);
}

/** Bring a turn up to date, and stay at the end if that is where the visitor reads. */
function refresh(turn, jump = false) {
  const follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
  views.get(turn)?.update();
  if (follows || jump) scroller.scrollTop = scroller.scrollHeight;
}

function busy(yes) {
  find("#stop").hidden = !yes;
  find("#send").hidden = yes;
  if (yes) find("#status").textContent = "The answer is being written.";
}

/** Screen readers hear the answer once, when it is complete, and not every piece of it. */
function announce(turn) {
  if (!views.has(turn)) return; // a new conversation has begun
  const { title, advice } = turn.problem ?? {};
  find("#status").textContent = title ? `${title} ${advice}` : `${turn.by?.expert ?? "base"} answers: ${turn.text}`;
}

/** Let the text area grow with its text; the style sheet says how far. */
function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight}px`;
}

function submit() {
  if (stopper) return;
  send(message.value);
  message.value = "";
  fit();
  message.focus();
}

find("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
find("#stop").addEventListener("click", stop);
find("#new").addEventListener("click", startAnew);
find("#empty").addEventListener("click", (event) => {
  const suggestion = event.target.closest(".suggestions button");
  if (suggestion) send(suggestion.textContent);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !experts.close()) stop();
});
addEventListener("pagehide", () => {
  stopper?.abort(); // else the browser breaks the connection, which would look like a failure
  conversation.save();
});

conversation.turns.forEach(append);
scroller.scrollTop = scroller.scrollHeight;
