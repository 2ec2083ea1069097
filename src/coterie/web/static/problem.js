// What went wrong, in the visitor's words, and what helps.

/**
 * { title, advice, remedy, until } of an error. `remedy` is "retry", "restart" (ask again in a new conversation) or
 * "edit" (shorten the message); before `until` (ms since 1970) a retry would fail again. `first`: it was the first turn.
 */
export function explain(error, first) {
  switch (error.code) {
    case "rate_limit_exceeded":
      return {
        title: "Many people are asking right now.",
        advice: "Please wait a moment; your message is kept.",
        remedy: "retry",
        until: Date.now() + 1000 * Math.max(1, error.retryAfter),
      };
    case "context_length_exceeded":
      return first
        ? { title: "This message is too long.", advice: sentence(error.message), remedy: "edit" }
        : {
            title: "This conversation has grown too long.",
            advice: "A new one starts without what was said before.",
            remedy: "restart",
          };
    case "network":
      return { title: "The connection failed.", advice: "Check that you are online, then try again.", remedy: "retry" };
    case "broken":
    case "cancelled":
      return { title: "The answer broke off.", advice: "What arrived is kept above.", remedy: "retry" };
    default:
      return { title: "That did not work.", advice: sentence(error.message), remedy: "retry" };
  }
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
