// Markdown of an answer as elements that can neither run nor load anything: marked reads it, DOMPurify sifts it.

import { Marked } from "./marked.esm.js";

const escaped = (text) => text.replace(/[&<>"]/g, (one) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[one]);

// HTML that a model writes stays text, and an image is named: to show it would tell its server who reads.
const reader = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ text, href }) => `[${escaped(text || "image")}: ${escaped(href)}]`,
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote",
    "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td",
  ],
  ALLOWED_ATTR: ["href", "title", "start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

/** Replaces an element's content by `text` as Markdown. */
export function renderMarkdown(element, text) {
  const fragment = window.DOMPurify.sanitize(reader.parse(text), ALLOWED);
  for (const link of fragment.querySelectorAll("a")) Object.assign(link, { target: "_blank", rel: "noopener noreferrer nofollow" });
  element.replaceChildren(fragment);
}
