// The conversation: its turns, and how they outlive a reload (not the tab: others may use this computer).
//
// A turn is a question and its answer:
//   question, text    what was asked; the answer so far
//   state             "waiting", "streaming", "done", "stopped" or "failed"
//   who               who was asked: "auto", "base" or an expert's name
//   by                who answers: { expert, version, routed, similarity }, and from which sources:
//                     { known, sources, problems }; null until it is known
//   finish            why the answer ended: "stop" or "length"
//   problem           what went wrong, where it failed (see problem.js)

const KEY = "coterie.conversation";

export const turns = load();

export function add(question) {
  const turn = { question, ...unanswered("auto") };
  turns.push(turn);
  save();
  return turn;
}

export function unanswered(who) {
  return { text: "", state: "waiting", who, by: null, finish: null, problem: null };
}

export function clear() {
  turns.length = 0;
  save();
}

/** What the model is sent for `turn`: the answered turns before it, and its question. */
export function messages(turn) {
  const before = turns.slice(0, turns.indexOf(turn)).filter((t) => t.text && t.state !== "failed");
  const said = before.flatMap((t) => [
    { role: "user", content: t.question },
    { role: "assistant", content: t.by?.sources ? t.text.replaceAll(/ \[(\d+|\?)\]/g, "") : t.text }, // not the marks
  ]);
  return [...said, { role: "user", content: turn.question }];
}

export function save() {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(turns));
  } catch {
    // Storage is full or forbidden: the conversation lives as long as the page.
  }
}

function load() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEY)) ?? [];
    // What was still streaming when the page went away ended there.
    return kept.map((t) => (["waiting", "streaming"].includes(t.state) ? { ...t, state: "stopped" } : t));
  } catch {
    return [];
  }
}
