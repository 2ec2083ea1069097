// Talks to the HTTP API: one conversation in, the answer out in pieces.

/** What the API, or the way to it, did not do. `code` is the API's own, or "network", "broken", "cancelled". */
export class ApiError extends Error {
  constructor(code, message, retryAfter = 0) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter; // seconds
  }
}

/**
 * Ask `model` and yield { text, finish, by } as they arrive; `by` says who answers
 * (expert, version, routed, similarity; where the business has knowledge: known, sources, problems), `finish` why the
 * answer ended, once it has.
 * Throws ApiError; or the signal's AbortError where the visitor stopped it.
 */
export async function* ask(model, messages, signal) {
  const grounded = "knowledge" in document.body.dataset ? { knowledge: true } : {};
  const response = await reach(() =>
    fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ model, messages, stream: true, ...grounded }),
      signal,
    }),
  );
  if (!response.ok) throw await refusal(response);
  let finish = null;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code, chunk.error.message);
    const [choice] = chunk.choices;
    finish = choice?.finish_reason ?? finish;
    if (finish === "cancelled") throw new ApiError("cancelled", "the server stopped this answer");
    yield { text: choice?.delta.content ?? "", finish, by: chunk.coterie };
  }
  if (!finish) throw new ApiError("broken", "the answer broke off");
}

/** The data of each server-sent event in a stream of bytes. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  while (true) {
    const { value, done } = await reach(() => reader.read());
    if (done) return;
    const parts = (buffer + value).split("\n\n");
    buffer = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice("data: ".length);
  }
}

/** Run a step that needs the network; the browser's own errors for a lost connection are one of ours. */
async function reach(step) {
  try {
    return await step();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("network", error.message);
  }
}

async function refusal(response) {
  const retryAfter = Number(response.headers.get("Retry-After")) || 0;
  try {
    const { error } = await response.json();
    return new ApiError(error.code, error.message, retryAfter);
  } catch {
    return new ApiError("http", `the server answered ${response.status}`, retryAfter);
  }
}
