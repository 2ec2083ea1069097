// The account page: one's second factor and tokens; everybody's accounts and the audit log, for those who may.

const find = (selector) => document.querySelector(selector);
const me = document.body.dataset.name;
const roles = document.body.dataset.roles.split(" ");

/** Ask the API; what it says. Throws an Error with its sentence. */
async function ask(method, path, body) {
  const sent = body === undefined ? {} : { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, { method, ...sent }).catch(() => {
    throw new Error("The connection failed. Check that you are online, then try again.");
  });
  if (response.status === 401) location.assign("login"); // the session is over, or the door has just been closed
  if (response.status === 204) return null;
  const said = await response.json();
  if (!response.ok) throw new Error(said.error.message);
  return said;
}

/** Do something that a person wants done, say how it went, and show everything as it is now. */
async function act(deed, done) {
  find("#said").textContent = find("#problem").textContent = "";
  try {
    await deed();
    await show();
    find("#said").textContent = done;
  } catch (error) {
    find("#problem").textContent = error.message;
  }
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** A button of a row. `key` tells it from others, so that the keyboard stays where it is when the row is drawn anew. */
function button(key, words, about, deed, done, sure = "") {
  const made = element("button", { type: "button", "data-key": key, "aria-label": `${words}: ${about}` }, words);
  made.addEventListener("click", () => (!sure || confirm(sure)) && act(deed, done));
  return made;
}

const row = (head, ...cells) => element("tr", {}, element("th", { scope: "row" }, head), ...cells.map((c) => element("td", {}, c)));
const when = (at) => (at ? new Date(at * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "never");

/** Draw a table's rows; the keyboard stays at the button it was on, else it goes to the section's heading. */
function draw(body, rows, nothing) {
  const at = body.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const width = body.closest("table").rows[0].cells.length;
  body.replaceChildren(...(rows.length ? rows : [element("tr", {}, element("td", { colspan: width }, nothing))]));
  if (at === null) return;
  const same = [...body.querySelectorAll("[data-key]")].find((b) => b.dataset.key === at);
  (same ?? body.closest("section").querySelector("h2")).focus();
}

function tokenRow(token) {
  const name = token.label || token.id;
  const revoke = button(`revoke ${token.id}`, "Revoke", name, () => ask("DELETE", `v1/me/tokens/${token.id}`),
    `The token ${name} is revoked.`, `Revoke the token ${name}? Programs that use it stop working.`);
  return row(name, token.scopes, when(token.until), when(token.used_at), revoke);
}

const split = (groups) => groups.split(",").map((group) => group.trim()).filter(Boolean);

function accountRow(account) {
  const { name } = account;
  const path = `v1/accounts/${encodeURIComponent(name)}`;
  const sure = `${name} will be signed out everywhere, and their tokens end.`;
  const state = account.disabled ? "disabled" : account.locked ? "locked for a while" : "active";
  const groups = account.groups.join(", ");
  if (!roles.includes(account.role)) return row(name, account.role, groups, account.second_factor ? "on" : "off", state, "");
  const choice = element("select", { "aria-label": `Role of ${name}`, "data-key": `role ${name}` },
    ...roles.map((r) => element("option", r === account.role ? { selected: "" } : {}, r)));
  const change = button(`change ${name}`, "Change role", name, () => ask("PATCH", path, { role: choice.value }),
    `${name} has another role now.`, sure);
  change.hidden = true;
  choice.addEventListener("change", () => (change.hidden = choice.value === account.role));
  const deeds = element("div", { class: "row" });
  if (account.second_factor) {
    deeds.append(button(`reset ${name}`, "Reset second factor", name, () => ask("DELETE", `${path}/second-factor`),
      `${name} signs in without a code now.`, `${name} will sign in with the password alone.`));
  }
  if (name !== me) {
    deeds.append(button(`able ${name}`, account.disabled ? "Enable" : "Disable", name,
      () => ask("PATCH", path, { disabled: !account.disabled }), `${name} is ${account.disabled ? "enabled" : "disabled"}.`,
      account.disabled ? "" : sure));
  }
  const field = element("input", { value: groups, "aria-label": `Groups of ${name}`, "data-key": `groups ${name}` });
  const join = button(`join ${name}`, "Change groups", name, () => ask("PATCH", path, { groups: split(field.value) }),
    `${name} has other groups now.`, sure);
  join.hidden = true;
  field.addEventListener("input", () => (join.hidden = field.value === groups));
  const belongs = element("div", { class: "row" }, field, join);
  return row(name, element("div", { class: "row" }, choice, change), belongs, account.second_factor ? "on" : "off", state, deeds);
}

function auditRow(line) {
  const detail = Object.entries(line.detail).map(([k, v]) => `${k}: ${Array.isArray(v) ? v.join(" ") : v}`).join(", ");
  return row(when(line.at), line.actor, line.action, line.subject, detail);
}

/** Show everything as it is now. */
async function show() {
  if (find("#factor")) {
    const { second_factor: on } = await ask("GET", "v1/me");
    find("#factor").textContent = on ? "A code is asked for when you sign in." : "Only your password is asked for.";
    find("#offer").textContent = on ? "Set up another device" : "Set up";
    find("#former").hidden = !on;
    find("#take").elements.current.required = on;
    draw(find("#tokens"), (await ask("GET", "v1/me/tokens")).map(tokenRow), "You have no tokens.");
  }
  if (find("#accounts")) draw(find("#accounts"), (await ask("GET", "v1/accounts")).map(accountRow), "There are none yet.");
  if (find("#audit")) draw(find("#audit"), (await ask("GET", "v1/audit?limit=30")).map(auditRow), "Nothing yet.");
}

find("#offer")?.addEventListener("click", () => act(async () => {
  const { secret, address } = await ask("POST", "v1/me/second-factor");
  find("#secret").textContent = secret.match(/.{1,4}/g).join(" ");
  find("#secret").dataset.secret = secret;
  find("#address").href = address;
  find("#take").hidden = false;
  find("#take").elements.code.focus();
}, ""));
find("#take")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const { code, current, password } = Object.fromEntries(new FormData(event.target));
  act(async () => {
    await ask("PUT", "v1/me/second-factor", { secret: find("#secret").dataset.secret, code, current, password });
    event.target.hidden = true;
    event.target.reset();
    find("#secret").textContent = find("#secret").dataset.secret = "";
    find("#address").removeAttribute("href");
    find("#offer").focus();
  }, "The second factor is on.");
});
find("#new-token")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const given = new FormData(event.target);
  act(async () => {
    const scopes = given.getAll("scopes");
    if (!scopes.length) throw new Error("Choose at least one thing that the token may do.");
    const made = await ask("POST", "v1/me/tokens", { label: given.get("label"), days: Number(given.get("days")), scopes });
    find("#token").textContent = made.token;
    find("#made").hidden = false;
    event.target.reset();
    find("#token").focus();
  }, "The token is made. Copy it now; it is not shown again.");
});
find("#copy")?.addEventListener("click", async () => {
  await navigator.clipboard.writeText(find("#token").textContent);
  find("#said").textContent = "Copied.";
});
find("#new-account")?.addEventListener("submit", (event) => {
  event.preventDefault();
  const { name, role, password, groups } = Object.fromEntries(new FormData(event.target));
  act(async () => {
    await ask("POST", "v1/accounts", { name, role, password, groups: split(groups) });
    event.target.reset();
  }, `${name} can sign in now.`);
});

await act(async () => {}, "");
