// The desk: which conversation is open, what the agent does, and news of what others do.

import { follow, get, post } from "./api.js";
import { element, find, person, shortName, span, words } from "./dom.js";
import * as shortcuts from "./shortcuts.js";
import { showThread } from "./thread.js";

let view = "waiting";
let open = new URLSearchParams(location.hash.slice(1)).get("c");
let current = null; // what the server last said of the open one
let listed = [];
let depth = 1; // how often older messages are searched as well
let sending = null; // key of the text that is being sent, so that a second try is not doubled
const drafts = new Map(); // conversation -> what was being written

async function list() {
  const [query, wanted, queue] = [find("#q").value.trim(), view, find("#queue").value];
  const found = query ? await searched(query)
    : await get(`conversations?view=${wanted}&queue=${encodeURIComponent(queue)}`);
  if (query !== find("#q").value.trim() || wanted !== view || queue !== find("#queue").value) return; // another list has been asked for meanwhile
  listed = found.conversations;
  const focused = document.activeElement.dataset.id; // a list that is brought up to date keeps the focus where it was
  find("#list").replaceChildren(...listed.map(row));
  if (focused) find(`#list [data-id="${focused}"]`)?.focus();
  find("#none").hidden = listed.length > 0;
  find("#older").hidden = !found.before;
  find("#list-name").textContent = query ? "Found" : find(`[data-view=${view}] span`).textContent;
  for (const button of document.querySelectorAll("#views button")) {
    button.ariaPressed = String(!query && button.dataset.view === view);
    const state = { people: "person" }[button.dataset.view] ?? button.dataset.view;
    if (found.counts) button.querySelector(".count").textContent = found.counts[state] ?? 0;
  }
  if (!found.people) return;
  offer("#assign", found.people, (name) => name);
  offer("#queue", Object.keys(found.queues), (name) => `${words(name)} (${found.queues[name]})`);
  find("#queue-choice").hidden = Object.keys(found.queues).length < 2;
}

/** What can be chosen after the first, which stands for nothing chosen. What was chosen stays so. */
function offer(where, values, shown) {
  const select = find(where);
  const chosen = select.value;
  select.replaceChildren(select.options[0], ...values.map((v) => element("option", { value: v }, shown(v))));
  select.value = values.includes(chosen) ? chosen : "";
}

/** What was found in the newest messages, and in as many older ones as were asked for. */
async function searched(query) {
  const conversations = [];
  let before = null;
  for (let n = 0; n < depth && (n === 0 || before); n++) {
    const page = await get(`search?q=${encodeURIComponent(query)}${before ? `&before=${before}` : ""}`);
    conversations.push(...page.conversations.filter((c) => !conversations.some((o) => o.id === c.id)));
    before = page.before;
  }
  return { conversations, before };
}

function row(c) {
  const since = span(Date.now() / 1000 - (c.waiting_since ?? c.changed_at));
  const why = c.state === "waiting" && c.reason ? words(c.reason) : c.state === "person" ? person(c.owner) : c.state;
  const button = element("button", { type: "button", "data-id": c.id, "aria-current": String(c.id === open) },
    element("span", { class: "who" }, shortName(c.customer)), element("span", { class: "since" }, since),
    element("span", { class: "last", dir: "auto" }, c.last?.text ?? ""), element("span", { class: "why" }, why));
  button.addEventListener("click", () => choose(c.id));
  return element("li", {}, button);
}

async function choose(id) {
  if (open) drafts.set(open, find("#reply").value);
  open = id;
  history.replaceState(null, "", `#c=${id}`);
  find("#entries").dataset.id = "";
  find("#reply").value = drafts.get(id) ?? "";
  for (const button of document.querySelectorAll("#list button")) button.ariaCurrent = String(button.dataset.id === id);
  problem("");
  document.body.classList.add("reading");
  await refresh();
  look();
}

/** On a narrow screen, where there is room for one of both: from the conversation to the list. */
function back() {
  document.body.classList.remove("reading");
  find("#list [aria-current=true]")?.focus();
}

async function refresh() {
  if (!open) return;
  const id = open;
  const said = await get(`conversations/${id}`);
  if (id !== open) return;
  const news = current?.conversation.id === id && said.entries.length > current.entries.length;
  current = said;
  showThread(said, choose);
  find("#entries").dataset.id = id;
  find("#hint").textContent = hint();
  const last = said.entries.at(-1);
  if (news && last.author === "customer") find("#status").textContent = `${shortName(said.conversation.customer)}: ${last.text}`;
}

function hint() {
  const mine = find("#composer").dataset.mine === "true";
  if (kind() === "notes") return "Only people at the desk see it.";
  return mine ? "Ctrl + Enter sends" : "Take the conversation to reply.";
}

const kind = () => find("[name=kind]:checked").value;

function problem(text) {
  find("#problem").textContent = text;
  find("#problem").hidden = !text;
}

/** Do something to the open conversation, then show what it has become; say what went wrong. */
async function act(what, body) {
  if (!open) return;
  problem("");
  try {
    await post(`conversations/${open}/${what}`, body);
  } catch (error) {
    problem(error.message);
  }
  await Promise.all([refresh(), list()]);
}

async function send() {
  const text = find("#reply").value.trim();
  if (!open || !text) return;
  problem("");
  const [id, to] = [open, kind()];
  sending ??= crypto.randomUUID?.() ?? String(Math.random()).slice(2);
  find("#send").disabled = true;
  try {
    await post(`conversations/${id}/${to}`, { text, key: sending });
    sending = null;
    drafts.delete(id);
    if (id === open) find("#reply").value = "";
  } catch (error) {
    if (error.code !== "network") sending = null;
    problem(error.message);
  }
  find("#send").disabled = false;
  await Promise.all([refresh(), list()]);
}

function insert(text) {
  const area = find("#reply");
  const [from, to] = [area.selectionStart, area.selectionEnd];
  area.setRangeText(text, from, to, "end");
  area.focus();
  changed();
}

function changed() {
  sending = null;
  look();
}

function look() {
  if (open) post(`conversations/${open}/looking`, { typing: Boolean(find("#reply").value.trim()) }).catch(() => {});
}

function step(by) {
  const at = listed.findIndex((c) => c.id === open);
  const to = listed[at < 0 ? 0 : Math.min(Math.max(at + by, 0), listed.length - 1)];
  if (to) choose(to.id);
}

function write(what) {
  find(`[name=kind][value=${what}]`).checked = true;
  find("#hint").textContent = hint();
  find("#reply").focus();
}

async function overview() {
  const s = await get("state");
  const sure = s.assistant.calibrated;
  const groups = {
    Conversations: [
      ["Waiting", s.counts.waiting ?? 0], ...Object.entries(s.queues).map(([queue, n]) => [`in the queue ${queue}`, n]),
      ["Longest wait", span(s.longest_wait_s)], ["With the assistant", s.counts.bot ?? 0],
      ["With people", s.counts.person ?? 0], ...Object.entries(s.people).map(([name, n]) => [`with ${name}`, n]),
    ],
    Assistant: [
      ["State", s.assistant.alive ? "at work" : "stopped"], ["Answers being written", s.assistant.writing],
      ["Confidence", sure ? `${Math.round(sure.handled * 100)}% handled at ${sure.error * 100}% error` : "not calibrated"],
    ],
    "Last 24 hours": [
      ["Thumbs", `${s.ratings.up} up, ${s.ratings.down} down`],
      ...Object.entries(s.reasons).map(([reason, n]) => [`Handed over: ${words(reason)}`, n]),
    ],
  };
  find("#overview-body").replaceChildren(...Object.entries(groups).flatMap(([name, rows]) => [
    element("h3", {}, name),
    element("dl", {}, ...rows.flatMap(([k, v]) => [element("dt", {}, k), element("dd", {}, String(v))])),
  ]));
  if (!find("#overview").open) find("#overview").showModal();
}

let waiting = null; // several pieces of news are one look
function news(ids) {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (ids === null || ids.includes(open)) refresh().catch(() => {});
    list().catch(() => {});
  }, 50);
}

find("#q").addEventListener("input", () => (depth = 1));
find("#older button").addEventListener("click", () => {
  depth++;
  list();
});
for (const button of document.querySelectorAll("#views button"))
  button.addEventListener("click", () => {
    view = button.dataset.view;
    find("#q").value = "";
    list();
  });
for (const button of document.querySelectorAll("[data-action]"))
  button.addEventListener("click", () => act(button.dataset.action, button.dataset.action === "take" ? { seen: current.conversation.owner } : {}));
find("#queue").addEventListener("change", () => list().catch((error) => problem(error.message)));
find("#assign").addEventListener("change", async (event) => {
  const to = event.target.value;
  event.target.value = "";
  if (to) await act("take", { to });
});
find("#snooze").addEventListener("change", async (event) => {
  const minutes = Number(event.target.value);
  event.target.value = "";
  if (minutes) await act("snooze", { minutes });
});
find("#canned").addEventListener("change", (event) => {
  if (event.target.value) insert(event.target.value);
  event.target.value = "";
});
for (const [button, approve] of [["#approve", true], ["#refuse", false]])
  find(button).addEventListener("click", async () => {
    const note = find("#approval-note").value;
    find("#approval-note").value = "";
    await act("approval", { run: find("#approval").dataset.run, approve, note });
  });
find("#insert").addEventListener("click", () => insert(find("#suggested").textContent));
find("#find").addEventListener("submit", (event) => event.preventDefault());
find("#q").addEventListener("input", () => list().catch((error) => problem(error.message)));
find("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
find("#reply").addEventListener("input", changed);
find("#reply").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});
for (const radio of document.querySelectorAll("[name=kind]")) radio.addEventListener("change", () => (find("#hint").textContent = hint()));
find("#overview-open")?.addEventListener("click", overview);
find("#back").addEventListener("click", back);
document.body.classList.toggle("reading", open !== null);
shortcuts.listen({
  next: () => step(1), previous: () => step(-1), take: () => find("[data-action=take]").click(),
  reply: () => write("replies"), note: () => write("notes"), insert: () => find("#suggestion").hidden || find("#insert").click(),
  release: () => act("release"), bot: () => act("bot"), resolve: () => act("resolve"), search: () => find("#q").focus(),
  keys: shortcuts.open,
});
follow(news);
setInterval(look, 8000);
setInterval(() => list().catch(() => {}), 30000);
list().then(() => open && refresh()).catch((error) => problem(error.message));
