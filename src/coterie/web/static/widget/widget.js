// The widget: a web component whose shadow DOM the site's own styles do not reach.

import { render, show } from "./render.js";
import { speak } from "./strings.js";
import { Visit, remember, remembered } from "./visit.js";

const ICONS = {
  chat: '<path d="M4 5h16v11H9l-5 4z"/>', close: '<path d="m6 6 12 12M18 6 6 18"/>', up: '<path d="M12 19V5m-6 6 6-6 6 6"/>',
  stop: '<rect class="solid" x="6" y="6" width="12" height="12" rx="2"/>',
  good: '<path d="M7 11v9H4v-9zM7 11l4-7c2 0 2.5 1.5 2 3l-.7 3H19c1 0 2 1 1.700 2l-1.700 6.500c-.2.800-.9 1.500-2 1.500H7"/>',
  bad: '<path d="M7 13V4H4v9zM7 13l4 7c2 0 2.500-1.500 2-3l-.7-3H19c1 0 2-1 1.700-2L19 5.500C18.800 4.700 18.100 4 17 4H7"/>',
  circles: '<circle cx="12" cy="8.2" r="5"/><circle cx="7.7" cy="15.4" r="5"/><circle cx="16.3" cy="15.4" r="5"/>',
};

/** Put the widget on the page. */
export async function mount(base, options) {
  const sheets = await Promise.all(["tokens.css", "widget.css"].map((name) => sheet(new URL(`widget/static/${name}`, base))));
  class Widget extends HTMLElement {
    connectedCallback() {
      const root = this.attachShadow({ mode: "open" });
      root.adoptedStyleSheets = sheets;
      new Panel(this, root, base, options);
    }
  }
  if (!customElements.get("coterie-desk")) customElements.define("coterie-desk", Widget);
  document.body.append(document.createElement("coterie-desk"));
}

async function sheet(url) {
  const made = new CSSStyleSheet();
  made.replaceSync((await (await fetch(url)).text()).replaceAll(":root", ":host"));
  return made;
}

class Panel {
  constructor(host, root, base, options) {
    const { say, language, direction } = speak(options.language, document.documentElement.lang, navigator.language);
    Object.assign(this, { host, root, say, views: new Map(), draft: "", now: { state: "bot", answering: false, with: "" } });
    host.lang = language;
    host.dir = direction;
    this.build();
    this.visit = new Visit(base, options.identity ?? "", language, {
      entry: (m) => this.entry(m), state: (now) => this.state(now), outbox: (messages) => this.pending(messages),
      line: (open) => this.line(open),
      piece: ({ text }) => {
        this.draft += text;
        this.showDraft();
      },
      ended: () => {
        this.draft = "";
        this.showDraft();
      },
    });
    if (remembered("open") ?? "open" in options) this.open(false);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  build() {
    const { say } = this;
    this.root.append(
      element("button", { class: "launcher", type: "button", "aria-expanded": "false", "aria-label": say("open") }, icon("chat")),
      element("section", { class: "panel", role: "dialog", "aria-label": say("open"), hidden: "" },
        element("header", {},
          element("span", { class: "mark", "aria-hidden": "true" }, icon("circles")),
          element("div", { class: "title" }, element("h2", { dir: "auto" }), element("p", { class: "with" }, say("assistant"))),
          element("button", { class: "icon close", type: "button", "aria-label": say("close") }, icon("close"))),
        element("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": say("log") },
          element("p", { class: "disclosure", dir: "auto" }),
          element("p", { class: "greeting", dir: "auto" }),
          element("div", { class: "consents", role: "group", "aria-label": say("consents"), hidden: "" }),
          element("ol", { class: "entries" }),
          element("ol", { class: "outbox" }),
          element("div", { class: "choices", role: "group", "aria-label": say("choices"), hidden: "" }),
          element("article", { class: "entry bot draft", hidden: "" }, element("div", { class: "words", dir: "auto" })),
          element("p", { class: "writing", hidden: "" }, say("writing"), element("span", { class: "dots", "aria-hidden": "true" }))),
        element("p", { class: "line", hidden: "" }, say("offline")),
        element("p", { class: "problem", hidden: "" }),
        element("div", { class: "ways" },
          element("button", { class: "quiet person", type: "button" }, say("person")),
          element("button", { class: "quiet return", type: "button", hidden: "" }, say("bot"))),
        element("form", {},
          element("label", { class: "unseen", for: "message" }, say("message")),
          element("textarea", { id: "message", rows: "1", dir: "auto", placeholder: say("write"), maxlength: "20000", enterkeyhint: "send" }),
          element("button", { class: "icon round send", "aria-label": say("send") }, icon("up")),
          element("button", { class: "icon round stop", type: "button", "aria-label": say("stop"), hidden: "" }, icon("stop"))),
        element("div", { class: "unseen status", role: "status" })),
    );
    this.find(".launcher").addEventListener("click", () => (this.find(".panel").hidden ? this.open() : this.close()));
    this.find(".close").addEventListener("click", () => this.close());
    this.find(".person").addEventListener("click", () => this.tried(this.visit.person()));
    this.find(".return").addEventListener("click", () => this.tried(this.visit.bot()));
    this.find(".stop").addEventListener("click", () => this.tried(this.visit.stop()));
    this.find("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.find("textarea").addEventListener("input", () => this.fit());
    this.find("textarea").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.find(".panel").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.close();
      event.stopPropagation(); // the site's own shortcuts are not meant
    });
  }

  async open(focus = true) {
    this.find(".panel").hidden = false;
    this.find(".launcher").ariaExpanded = "true";
    this.host.toggleAttribute("open", true);
    remember("open", true);
    if (focus) this.find("textarea").focus();
    if (this.visit.facts || this.beginning) return;
    this.beginning = true;
    try {
      const facts = await this.visit.begin();
      this.find("h2").textContent = facts.business;
      this.find(".panel").ariaLabel = facts.business;
      this.find(".disclosure").textContent = facts.disclosure;
      this.find(".greeting").textContent = facts.greeting;
      this.consents(facts.consents);
      this.pending(this.visit.outbox);
      if (!this.visit.id) this.choices(facts.offers.map(({ name, title }) => [title, { start: name }]));
    } catch (error) {
      this.problem(error);
      if (error.code === "network") setTimeout(() => !this.find(".panel").hidden && this.open(false), 3000);
    } finally {
      this.beginning = false;
    }
  }

  close() {
    this.find(".panel").hidden = true;
    this.find(".launcher").ariaExpanded = "false";
    this.host.toggleAttribute("open", false);
    remember("open", false);
    this.find(".launcher").focus();
  }

  send() {
    const text = this.find("textarea").value.trim();
    if (!text) return;
    this.find("textarea").value = "";
    this.fit();
    this.tried(this.visit.say(text));
  }

  async tried(doing) {
    this.find(".problem").hidden = true;
    try {
      await doing;
    } catch (error) {
      this.problem(error);
    }
  }

  problem(error) {
    const line = this.find(".problem");
    line.textContent = error.code === "network" ? this.say("offline") : this.say("failed", error.message);
    line.hidden = false;
    this.find(".status").textContent = line.textContent;
  }

  line(open) {
    this.find(".line").hidden = open;
    if (open) this.find(".problem").hidden = true;
  }

  entry(m) {
    if (this.views.has(m.seq)) return;
    const text = m.kind === "event" ? this.happened(m) : m.text;
    if (!text) return;
    if (m.author !== "customer" && m.kind === "message") {
      this.draft = "";
      this.showDraft();
    }
    if (m.author === "customer") {
      // It may be here before the server's word that it has it: it is shown once.
      const sent = this.visit.outbox.find((o) => o.text === m.text && !o.arrived);
      if (sent) sent.arrived = true;
      this.pending(this.visit.outbox);
    }
    const made = m.kind === "event" ? element("p", {}, text) : this.message(m);
    const item = element("li", { class: m.kind === "event" ? "event" : `entry ${m.author}` }, made);
    this.views.set(m.seq, item);
    this.follow(() => this.find(".entries").append(item));
    const { buttons, asked, stop } = m.procedure ?? { buttons: [] };
    this.choices([...buttons.map((text) => [text, { asked }]), ...(stop ? [[stop, {}, "stopping"]] : [])]);
    if (m.author !== "customer" && this.visit.facts) this.find(".status").textContent = text;
  }

  message(m) {
    const { say } = this;
    const words = element("div", { class: "words", dir: "auto" });
    show(words, m.author === "customer" ? [element("p", {}, m.text)] : render(m.text));
    const who = { customer: say("you"), bot: say("assistant"), agent: m.name }[m.author];
    const parts = [element("p", { class: m.author === "customer" ? "unseen" : "byline" }, who), words];
    if (m.procedure?.status === "asking")
      parts.splice(1, 0, element("p", { class: "note" }, `${m.procedure.title} · ${say("step", `${m.procedure.step}/${m.procedure.of}`)}`));
    if (m.stopped) parts.push(element("p", { class: "note" }, say("stopped")));
    if (m.sources?.length) {
      const list = m.sources.map((s, n) => element("li", {}, element("cite", {}, `[${n + 1}] `, s.link ? element("a", { href: s.link, target: "_blank", rel: "noopener noreferrer" }, s.where) : s.where), element("p", { dir: "auto" }, s.text)));
      parts.push(element("details", {}, element("summary", {}, `${say("sources")} (${m.sources.length})`), element("ol", {}, ...list)));
    }
    if (m.author !== "customer") parts.push(this.thumbs(m.seq));
    return element("article", {}, ...parts);
  }

  /** Buttons that answer the last question: [text, what goes with it, a class]. */
  choices(wanted) {
    const box = this.find(".choices");
    const focused = box.contains(this.root.activeElement);
    box.replaceChildren(...wanted.map(([text, pressed, kind = ""]) => {
      const button = element("button", { class: `quiet ${kind}`, type: "button", dir: "auto" }, text);
      button.addEventListener("click", () => {
        this.tried(this.visit.say(text, pressed));
        this.choices([]);
      });
      return button;
    }));
    this.follow(() => (box.hidden = !wanted.length));
    if (focused) (box.firstChild ?? this.find("textarea")).focus();
  }

  /** A box to tick for each thing that the visitor is asked to agree to; it shows what is on record. */
  consents(asked) {
    const box = this.find(".consents");
    box.replaceChildren(...asked.map(({ purpose, version, text, language, agreed }) => {
      const tick = element("input", { type: "checkbox" });
      tick.checked = agreed;
      tick.addEventListener("change", () => this.tried(this.agree(tick, purpose, version)));
      return element("label", { dir: "auto", ...(language && { lang: language }) }, tick, element("span", {}, text));
    }));
    box.hidden = !asked.length;
  }

  async agree(tick, purpose, version) {
    const wanted = tick.checked;
    tick.disabled = true;
    try {
      await this.visit.agree(purpose, version, wanted);
      this.find(".status").textContent = this.say(wanted ? "agreed" : "withdrawn");
    } catch (error) {
      tick.checked = !wanted; // not on record
      throw error;
    } finally {
      tick.disabled = false;
      tick.focus();
    }
  }

  thumbs(seq) {
    const { say } = this;
    const [good, bad] = ["good", "bad"].map((which) =>
      element("button", { class: "icon", type: "button", "aria-pressed": "false", "aria-label": say(which === "good" ? "helpful" : "unhelpful") }, icon(which)));
    const box = element("div", { class: "thumbs" }, good, bad);
    let before = Promise.resolve(); // one after another, so that the last word is the one that counts
    const rate = (...what) => (before = before.then(() => this.tried(this.visit.rate(seq, ...what))));
    const rated = (yes) => {
      good.ariaPressed = String(yes);
      bad.ariaPressed = String(!yes);
      rate(yes);
      box.querySelector("form")?.remove();
    };
    good.addEventListener("click", () => rated(true));
    bad.addEventListener("click", () => {
      rated(false);
      const field = element("input", { "aria-label": say("why"), placeholder: say("why"), maxlength: "2000", dir: "auto" });
      const form = element("form", {}, field, element("button", { class: "quiet" }, say("sendReason")));
      form.addEventListener("submit", async (event) => {
        event.preventDefault();
        await rate(false, field.value);
        form.replaceWith(element("p", { class: "note", role: "status" }, say("thanks")));
      });
      this.follow(() => box.append(form));
      field.focus();
    });
    return box;
  }

  happened(m) {
    return { person: m.with && this.say("joined", m.with), waiting: this.say("asked"), bot: this.say("back"), resolved: this.say("resolved") }[m.state];
  }

  state(now) {
    const { say } = this;
    this.now = now;
    const person = ["waiting", "person", "snoozed"].includes(now.state);
    this.find(".with").textContent = now.with || (now.state === "waiting" ? say("waiting") : say("assistant"));
    this.find(".person").hidden = person;
    this.find(".return").hidden = !person;
    if (person) this.choices([]);
    this.host.dataset.with = person ? "person" : "bot";
    this.showDraft();
  }

  showDraft() {
    const writing = this.now.state === "bot" && this.now.answering;
    if (!writing) this.draft = "";
    this.follow(() => {
      this.find(".draft").hidden = !this.draft;
      show(this.find(".draft .words"), render(this.draft));
      this.find(".writing").hidden = !writing;
    });
    if (!writing && this.root.activeElement === this.find(".stop")) this.find("textarea").focus();
    this.find(".stop").hidden = !writing;
    this.find(".send").hidden = writing && !this.find("textarea").value.trim();
  }

  pending(messages) {
    const shown = messages.filter((m) => !m.arrived).map((m) =>
      element("li", { class: "entry customer pending" }, element("article", {},
        element("div", { class: "words", dir: "auto" }, element("p", {}, m.text)), element("p", { class: "note" }, this.say("sending")))));
    this.follow(() => this.find(".outbox").replaceChildren(...shown), shown.length > 0);
  }

  fit() {
    const area = this.find("textarea");
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight}px`;
    this.showDraft();
  }

  /** Change something, and stay at the end if that is where the visitor reads. */
  follow(change, always = false) {
    const scroller = this.find(".scroller");
    const follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
    change();
    if (follows || always) scroller.scrollTop = scroller.scrollHeight;
  }
}

function icon(name) {
  const template = document.createElement("template");
  template.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true">${ICONS[name]}</svg>`;
  return template.content.firstChild;
}

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
