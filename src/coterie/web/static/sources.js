// The sources under an answer: those that it cites, each opening the exact passage, row or triple; and those that could
// not be asked.

/** Bring `list` up to date with the sources that `turn` cites; all text becomes text nodes, never HTML. */
export function showSources(turn, list) {
  const done = !["waiting", "streaming"].includes(turn.state);
  const cited = new Set([...turn.text.matchAll(/ \[(\d+)\]/g)].map((match) => Number(match[1])));
  const shown = done ? (turn.by?.sources ?? []).filter((source) => cited.has(source.number)) : [];
  const unsaid = done && turn.by?.sources && turn.text.includes(" [?]");
  const notes = [...(unsaid ? ["[?] No source says this."] : []), ...((done && turn.by?.problems) || [])];
  list.hidden = !shown.length && !notes.length;
  list.replaceChildren(...shown.map(item), ...notes.map(note));
}

function item(source) {
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = `[${source.number}] ${source.source}: ${source.where}`;
  const passage = document.createElement("blockquote");
  passage.textContent = source.text;
  details.append(summary, passage);
  if (source.link) {
    const link = document.createElement("a");
    Object.assign(link, { href: source.link, target: "_blank", rel: "noopener noreferrer", textContent: source.link });
    details.append(link);
  }
  if (source.query) {
    const query = document.createElement("pre");
    query.textContent = source.query;
    details.append(query);
  }
  if (source.thing) details.append(picture(source));
  const entry = document.createElement("li");
  entry.append(details);
  return entry;
}

/** What a thing of the graph is tied to, drawn by the server when it comes into sight; an <img>, so nothing in it runs. */
function picture(source) {
  const image = document.createElement("img");
  const address = new URLSearchParams({ source: source.source, thing: source.thing });
  Object.assign(image, { loading: "lazy", alt: `The neighbourhood in ${source.source}`, src: `knowledge/picture?${address}` });
  image.addEventListener("error", () => image.remove());
  return image;
}

function note(text) {
  const entry = document.createElement("li");
  entry.textContent = text;
  return entry;
}
