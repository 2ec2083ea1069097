// Small helpers for elements.

export const find = (selector) => document.querySelector(selector);

export function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** "3 min", of seconds. */
export function span(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 86400 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

/** A visitor whom no site has vouched for has a long random name. */
export const shortName = (customer) => customer.replace(/^visitor-(.{6}).*$/, "Visitor $1");

/** The hour, and before it the day where that is not today. */
export function time(at) {
  const when = new Date(at * 1000);
  const today = when.toDateString() === new Date().toDateString();
  return when.toLocaleString([], today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" });
}

/** "low confidence", of low_confidence. */
export const words = (code) => code.replaceAll("_", " ");

export const person = (author) =>
  ({ customer: "Customer", bot: "Assistant", queue: "the queue", system: "" })[author] ?? author.replace("agent:", "");
