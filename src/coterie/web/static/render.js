// Turns what a model writes into nodes: paragraphs, headings, lists, **bold**, `code` and fenced code.
// Text becomes text nodes, never HTML, so nothing that a model writes can run. Unknown marks stay as they are.

const FENCE = /^\s*```/;
const HEADING = /^#{1,6}\s+(.*)$/;
const ITEM = /^\s*(?:[-*•]|(\d{1,9})[.)])\s+(.*)$/;

/** The blocks of `text`, as elements. A fence that is still open, mid-stream, holds the rest. */
export function render(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  let open = null; // the list or paragraph that the next line may continue
  while (lines.length) {
    const line = lines.shift();
    const [, heading] = line.match(HEADING) ?? [];
    const item = line.match(ITEM);
    if (FENCE.test(line)) {
      const end = lines.findIndex((l) => FENCE.test(l));
      const code = lines.splice(0, end < 0 ? lines.length : end + 1);
      if (end >= 0) code.pop();
      blocks.push(element("pre", element("code", code.join("\n"))));
      open = null;
    } else if (!line.trim()) {
      if (open?.tagName === "P") open = null; // a list goes on after an empty line
    } else if (heading) {
      blocks.push(element("p", element("strong", ...inline(heading))));
      open = null;
    } else if (item) {
      const tag = item[1] ? "ol" : "ul";
      if (open?.tagName !== tag.toUpperCase()) {
        blocks.push((open = element(tag)));
        if (item[1] && item[1] !== "1") open.start = Number(item[1]);
      }
      open.append(element("li", ...inline(item[2])));
    } else if (open?.tagName === "P") {
      open.append("\n", ...inline(line));
    } else if (open && /^\s/.test(line)) {
      open.lastChild.append("\n", ...inline(line.trim()));
    } else {
      blocks.push((open = element("p", ...inline(line))));
    }
  }
  return blocks;
}

/** Bring `parent`'s children to `blocks`, leaving equal ones alone: text selected above stays selected. */
export function show(parent, blocks) {
  blocks.forEach((block, i) => {
    const old = parent.children[i];
    if (!old) parent.append(block);
    else if (!old.isEqualNode(block)) old.replaceWith(block);
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}

function inline(line) {
  return line.split(/(`[^`]+`|\*\*(?=\S).+?\*\*)/).map((part) => {
    if (/^`[^`]+`$/.test(part)) return element("code", part.slice(1, -1));
    if (/^\*\*.+\*\*$/.test(part)) return element("strong", ...inline(part.slice(2, -2)));
    return part;
  });
}

function element(tag, ...children) {
  const made = document.createElement(tag);
  made.append(...children);
  return made;
}
