// A visit to the desk: who the visitor is, what they send, and what comes back. Knows nothing of how it looks.
//
// Nothing that was sent is lost or doubled: each message has a key of its own and stays in the outbox, which outlives
// a reload, until the server says that it has it.

const RETRY_MS = [500, 1000, 2000, 5000, 10000];
const store = {
  get: (key) => {
    try {
      return JSON.parse(localStorage.getItem(`coterie.${key}`));
    } catch {
      return null; // forbidden, or damaged: the visit lives as long as the page
    }
  },
  set: (key, value) => {
    try {
      localStorage.setItem(`coterie.${key}`, JSON.stringify(value));
    } catch {
      // as above
    }
  },
};

export const remember = store.set;
export const remembered = store.get;

/** What the server refused: `code` is its own, or "network". */
export class Refused extends Error {
  constructor(code, message, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { code, status, retryAfter });
  }
}

export class Visit {
  /** `on` gets: entry(message), state(now), piece(text), ended(), outbox(messages), line(open). */
  constructor(base, identity, language, on) {
    Object.assign(this, { base, identity, language, on, facts: null, token: "", id: null, last: 0, stopper: null });
    this.outbox = store.get("outbox") ?? [];
  }

  /** Begin, or go on with the conversation of before. */
  async begin() {
    const former = store.get("visit") ?? {};
    const { identity, language } = this;
    this.facts = await this.ask("visits", { identity, language, token: former.token ?? "" }, false);
    this.token = this.facts.token;
    this.id = this.facts.conversation;
    store.set("visit", { token: this.token });
    if (this.id) this.listen();
    if (this.outbox.length) this.flush();
    return this.facts;
  }

  /** `pressed`: of a button, { start } or { asked }. */
  say(text, pressed = {}) {
    this.outbox.push({ text, ...pressed, key: crypto.randomUUID?.() ?? String(Math.random()).slice(2) });
    this.keep();
    return this.flush();
  }

  /** Send what is in the outbox, in order. */
  async flush() {
    if (this.flushing) return;
    this.flushing = true;
    try {
      for (let tries = 0; this.outbox.length; ) {
        const [message] = this.outbox;
        try {
          if (!this.id) {
            this.id = (await this.ask("conversations", { key: message.key })).id;
            this.listen();
          }
          await this.ask(`conversations/${this.id}/messages`, message);
          this.outbox.shift();
          tries = 0;
          this.keep();
        } catch (error) {
          if (error.code !== "network" && error.status < 500 && error.status !== 429) {
            this.outbox.shift(); // it will never be taken
            this.keep();
            throw error;
          }
          await wait(error.retryAfter * 1000 || RETRY_MS[Math.min(tries++, RETRY_MS.length - 1)]);
        }
      }
    } finally {
      this.flushing = false;
    }
  }

  keep() {
    store.set("outbox", this.outbox);
    this.on.outbox(this.outbox);
  }

  async person() {
    if (!this.id) {
      this.id = (await this.ask("conversations", { key: crypto.randomUUID?.() ?? String(Math.random()) })).id;
      this.listen();
    }
    this.on.state(await this.ask(`conversations/${this.id}/person`, {}));
  }

  async bot() {
    this.on.state(await this.ask(`conversations/${this.id}/bot`, {}));
  }

  stop() {
    return this.ask(`conversations/${this.id}/stop`, {});
  }

  rate(seq, good, reason = "") {
    return this.ask(`conversations/${this.id}/ratings`, { seq, good, reason });
  }

  /** To what they agree, or no longer; `version`: of the text that they saw. */
  agree(purpose, version, agreed) {
    return this.ask("consents", { purpose, version, agreed });
  }

  /** Follow the conversation until `leave`, whatever the line does. */
  async listen() {
    if (this.stopper) return;
    this.stopper = new AbortController();
    const { signal } = this.stopper;
    for (let tries = 0; !signal.aborted; ) {
      try {
        const path = `conversations/${this.id}/events?after=${this.last}`;
        const response = await this.reach(path, { headers: this.headers(), signal });
        this.on.line(true);
        tries = 0;
        for await (const { kind, data } of events(response.body)) {
          if (kind === "entry") this.last = data.seq;
          this.on[kind]?.(data);
        }
      } catch (error) {
        if (signal.aborted) return;
        if (error.status === 401) await this.renew().catch(() => {});
        if (error.status === 404) return;
      }
      this.on.line(false);
      await wait(RETRY_MS[Math.min(tries++, RETRY_MS.length - 1)]);
    }
  }

  leave() {
    this.stopper?.abort();
    this.stopper = null;
  }

  headers() {
    return { "Content-Type": "application/json", Authorization: `Bearer ${this.token}` };
  }

  async ask(path, body, renew = true) {
    const how = () => ({ method: "POST", headers: this.headers(), body: JSON.stringify(body) });
    try {
      return await (await this.reach(path, how())).json();
    } catch (error) {
      if (!renew || error.status !== 401) throw error;
      await this.renew();
      return (await this.reach(path, how())).json();
    }
  }

  async renew() {
    const { identity, language, token } = this;
    this.facts = await this.ask("visits", { identity, language, token }, false);
    this.token = this.facts.token;
    store.set("visit", { token: this.token });
  }

  async reach(path, how) {
    let response;
    try {
      response = await fetch(new URL(`widget/${path}`, this.base), { ...how, credentials: "omit" });
    } catch (error) {
      throw error.name === "AbortError" ? error : new Refused("network", error.message);
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    const after = Number(response.headers.get("Retry-After")) || 0;
    throw new Refused(said.error?.code ?? "http", said.error?.message ?? String(response.status), response.status, after);
  }
}

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

/** { kind, data } of each server-sent event in a stream of bytes. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const [, kind, data] = part.match(/^event: (.*)\ndata: (.*)$/) ?? [];
      if (kind) yield { kind, data: JSON.parse(data) };
    }
  }
}
