// What the desk asks of the server.

export class ApiError extends Error {
  constructor(code, message, status) {
    super(message);
    Object.assign(this, { code, status });
  }
}

async function reach(path, how = {}) {
  let response;
  try {
    response = await fetch(`desk/api/${path}`, how);
  } catch (error) {
    throw new ApiError("network", "The connection failed; nothing is lost. Try again.", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new ApiError(said.error?.code ?? "http", said.error?.message ?? `The server answered ${response.status}.`, response.status);
}

export const get = async (path) => (await reach(path)).json();

export const post = async (path, body = {}) =>
  (await reach(path, {
    method: "POST", headers: { "Content-Type": "application/json", "X-Coterie-Desk": "1" }, body: JSON.stringify(body),
  })).json();

/** Call `changed(ids)` for news, and `changed(null)` when the line was down meanwhile. Goes on for ever. */
export function follow(changed) {
  const source = new EventSource("desk/api/events");
  let begun = false;
  source.addEventListener("ready", () => {
    if (begun) changed(null);
    begun = true;
  });
  source.addEventListener("changed", (event) => changed(JSON.parse(event.data).ids));
}
