// The conversation in the middle, and what is known beside it.

import { element, find, person, shortName, span, time, words } from "./dom.js";
import { render, show } from "../render.js";

/** Show what the server said of one conversation. */
export function showThread({ conversation: c, entries, profile, trouble, others, disliked, present, approvals }, choose) {
  find("#nothing").hidden = true;
  find("#open").hidden = find("#facts").hidden = false;
  find("#customer").textContent = shortName(c.customer);
  find("#standing").textContent = standing(c);
  showEntries(entries, disliked);
  const mine = c.owner === `agent:${document.body.dataset.agent}`;
  const can = { take: !mine || c.state === "resolved", release: mine && c.state !== "resolved",
    bot: mine, resolve: c.state !== "resolved" };
  for (const [action, yes] of Object.entries(can)) find(`[data-action=${action}]`).hidden = !yes;
  find("#snooze").closest("label").hidden = !(mine && ["person", "snoozed"].includes(c.state));
  find("#composer").dataset.mine = mine && c.state !== "resolved";
  collision(present, c);
  approval(approvals[0]);
  brief(entries);
  find("#trouble").textContent = trouble;
  find("#trouble").hidden = !trouble;
  const known = Object.entries({ ...profile, Channel: c.channel, "First written": time(c.opened_at) });
  find("#profile").replaceChildren(...known.flatMap(([k, v]) => [element("dt", {}, words(k)), element("dd", {}, String(v))]));
  find("#before").hidden = !others.length;
  find("#others").replaceChildren(...others.map((o) => {
    const button = element("button", { type: "button", class: "link" }, `${time(o.opened_at)}, ${o.state}`);
    button.addEventListener("click", () => choose(o.id));
    return element("li", {}, button);
  }));
}

function standing(c) {
  const waits = c.waiting_since ? ` for ${span(Date.now() / 1000 - c.waiting_since)}` : "";
  const until = c.wake_at ? ` until ${time(c.wake_at)}` : "";
  const state = { bot: c.answering === null ? "with the assistant" : "the assistant is writing", waiting: `waiting${waits}`,
    person: `with ${person(c.owner)}`, snoozed: `snoozed by ${person(c.owner)}${until}`, resolved: "resolved" }[c.state];
  return c.queue === "general" ? state : `${state} · ${c.queue}`;
}

function showEntries(entries, disliked) {
  const list = find("#entries");
  const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  const shown = entries.filter((m) => !(m.kind === "suggestion" || (m.kind === "note" && m.author === "bot")));
  const unfolded = list.dataset.id ? [...list.querySelectorAll("li:has(details[open])")].map((li) => li.dataset.seq) : [];
  list.replaceChildren(...shown.map((m) => entry(m, disliked)));
  for (const seq of unfolded) list.querySelector(`[data-seq="${seq}"] details`).open = true;
  if (follows || !list.dataset.id) list.scrollTop = list.scrollHeight;
}

function entry(m, disliked) {
  if (m.kind === "event") {
    const said = { take: `${person(m.data.to)} took the conversation`, ask: "The customer asked for a person",
      back: "Back to the assistant", hand_over: "The assistant called a person", release: "Back to the queue",
      snooze: "Snoozed", wake: "Awake again", resolve: "Resolved", say: "Opened again" }[m.data.action] ?? m.data.action;
    return element("li", { class: "event" }, `${said} · ${time(m.at)}`);
  }
  const body = element("div", { class: "words", dir: "auto" });
  show(body, m.author === "customer" || m.kind === "note" ? [element("p", {}, m.text)] : render(m.text));
  const label = m.kind === "note" ? `Private note of ${person(m.author)}` : person(m.author);
  const parts = [element("p", { class: "byline" }, `${label} · ${time(m.at)}${m.data.expert ? ` · ${m.data.expert}` : ""}`), body];
  if (m.data.sources?.length) parts.push(element("p", { class: "aside" }, m.data.sources.map((s) => s.where).join(" · ")));
  if (m.data.email) parts.splice(1, 0, element("p", { class: "aside", dir: "auto" }, mailLine(m.data.email)));
  if (m.data.quoted) parts.push(element("details", { class: "aside" }, element("summary", {}, "Quoted"), element("p", { dir: "auto" }, m.data.quoted)));
  if (m.data.files?.length) parts.push(element("ul", { class: "aside files" }, ...m.data.files.map(fileLink)));
  if (m.data.stopped) parts.push(element("p", { class: "aside" }, "The customer stopped it here."));
  if (m.seq in disliked) parts.push(element("p", { class: "warn" }, `Not helpful${disliked[m.seq] ? `: ${disliked[m.seq]}` : ""}`));
  return element("li", { class: `entry ${m.kind} ${m.author.split(":")[0]}`, "data-seq": m.seq }, ...parts);
}

const mailLine = ({ from, name, subject, verified, cut }) =>
  `${name ? `${name} ` : ""}<${from}>${verified ? "" : " (sender not verified)"} · ${subject || "no subject"}${cut ? " · only the beginning was read" : ""}`;

/** A file is saved, never shown here: it comes from a stranger. */
const fileLink = ({ id, name, size }) => element("li", {},
  element("a", { href: `desk/api/files/${encodeURIComponent(id)}`, download: name, dir: "auto" }, name), ` ${Math.max(1, Math.round(size / 1024))} KiB`);

/** What a procedure wants to do, exactly as it will be done. */
function approval(wanted) {
  find("#approval").hidden = !wanted;
  find("#approval").dataset.run = wanted?.run ?? "";
  if (!wanted) return;
  const mine = wanted.by !== "supervisor" || document.body.dataset.role === "supervisor";
  find("#approval-what").textContent = `${wanted.procedure}: ${wanted.action}`;
  find("#approval-arguments").replaceChildren(...Object.entries(wanted.arguments).flatMap(([k, v]) =>
    [element("dt", {}, words(k)), element("dd", { dir: "auto" }, v)]));
  find("#approval-why").textContent = [wanted.agreed ? "The customer has agreed." : "", mine ? "" : "A supervisor decides."].join(" ");
  find("#approval-facts").replaceChildren(...wanted.facts.map((fact) => element("li", { dir: "auto" }, fact)));
  find("#approve").disabled = find("#refuse").disabled = !mine;
}

export function collision(present, c) {
  const others = present.map((p) => `${p.name} is ${p.typing ? "writing" : "looking at this"}`);
  const line = find("#collision");
  line.textContent = others.length ? `${others.join(", ")}.` : "";
  line.hidden = !others.length;
}

/** Why a person is needed, from the latest briefing; and the latest suggestion after the last thing said. */
function brief(entries) {
  const note = entries.findLast((m) => m.kind === "note" && m.author === "bot");
  find("#handoff").hidden = !note;
  if (note) {
    const sure = note.data.confidence === null ? "" : ` (${Math.round(note.data.confidence * 100)}% sure)`;
    find("#reason").textContent = words(note.data.reason) + sure;
    find("#detail").textContent = note.data.detail;
    find("#summary").textContent = note.text;
  }
  const spoke = entries.findLast((m) => m.kind === "message" && m.author.startsWith("agent:"))?.seq ?? 0;
  const suggestion = entries.findLast((m) => m.kind === "suggestion" && m.seq > spoke);
  find("#suggestion").hidden = !suggestion;
  find("#suggested").textContent = suggestion?.text ?? "";
  const evidence = note?.data.evidence ?? [];
  find("#evidence").hidden = !evidence.length;
  find("#sources").replaceChildren(...evidence.map((e) =>
    element("li", {}, element("details", {}, element("summary", {}, e.where), element("p", { dir: "auto" }, e.text),
      ...(e.link ? [element("a", { href: e.link, target: "_blank", rel: "noopener noreferrer" }, e.link)] : [])))));
}
