// Answers as HTML. Models are no authors to be trusted: what looks like HTML is shown as text, the result is cleaned,
// and nothing is loaded from elsewhere.
import DOMPurify from "/web/vendor/dompurify/purify.es.mjs";
import { Marked } from "/web/vendor/marked/marked.esm.js";

// What CodeGeeX2 continues as code begins so: server/models/chatglm2/codegeex2.py says the same at greater length.
const TAG = /^(?:#|\/[/*]|--|<!--|\(\*|;|%|'|\{|!|\*|\.\.|>)[ \t]*language:[ \t]*[a-z]/i;
const FENCE = "`".repeat(12);
const escape = (text) => text.replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]);

const marked = new Marked({
  breaks: true, // ChatGLM ends lines with one line feed
  renderer: {
    html: (token) => escape(token.text),
    image(token) {
      return this.link({ ...token, tokens: [{ type: "text", raw: token.text, text: token.text || token.href }] });
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.target = "_blank";
    node.rel = "noopener noreferrer";
  }
});

export const isCode = (question) => TAG.test(question);

// Markdown that shows `source` as it is; it may have fences of its own.
export const fenced = (source) => source && `${FENCE}\n${source}\n${FENCE}`;

// Make `element` show `source`. Blocks that have not changed since the last time stay as they are: so a long answer
// costs no more while it grows, and what the reader has selected stays selected.
export function render(element, source) {
  try {
    renderBlocks(element, source);
  } catch { // such as a model gone round in circles: thousands of > are as many quotations in one another
    const plain = document.createElement("div");
    plain.className = "plain";
    plain.textContent = source;
    element.replaceChildren(plain);
  }
}

function renderBlocks(element, source) {
  const blocks = marked.lexer(source);
  const shown = [...element.children];
  blocks.forEach((block, index) => {
    const old = shown[index];
    if (old?.source === block.raw) {
      return;
    }
    const made = document.createElement("div");
    made.source = block.raw;
    const html = marked.parser(Object.assign([block], { links: blocks.links }));
    made.innerHTML = DOMPurify.sanitize(html, { FORBID_TAGS: ["style", "form"], FORBID_ATTR: ["style"] });
    if (old) {
      old.replaceWith(made);
    } else {
      element.append(made);
    }
  });
  shown.slice(blocks.length).forEach((left) => left.remove());
}
