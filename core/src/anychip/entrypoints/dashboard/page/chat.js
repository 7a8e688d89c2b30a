// The chat: one conversation, streamed as Markdown, stopped, told again; its tokens show how likely they were.

import { streamEvents } from "./api.js";
import { renderMarkdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const list = $("messages");
const tip = $("tip");
let conversation = [];
let running = null;

export function startChat() {
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("again").addEventListener("click", regenerate);
  $("clear").addEventListener("click", clear);
  for (const [shows, hides] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
    list.addEventListener(shows, (event) => event.target.dataset?.tip && showTip(event.target));
    list.addEventListener(hides, () => { tip.hidden = true; });
  }
}

function send() {
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  conversation.push({ role: "user", content: text });
  addMessage("user").append(text);
  answer();
}

function regenerate() {
  if (running || !conversation.length) return;
  while (conversation.length && conversation.at(-1).role === "assistant") conversation.pop();
  while (list.lastElementChild && !list.lastElementChild.classList.contains("user")) list.lastElementChild.remove();
  answer();
}

function clear() {
  running?.abort();
  conversation = [];
  list.replaceChildren();
  $("empty").hidden = false;
  $("again").disabled = true;
  $("text").focus();
}

function request() {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...conversation] : conversation,
    stream: true, stream_options: { include_usage: true },
  };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    if ($(name).value !== "") body[name] = Number($(name).value);
  }
  if ($("probabilities").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  return body;
}

async function answer() {
  const item = addMessage("assistant");
  const controller = running = new AbortController();
  setBusy(true);
  const began = performance.now();
  let first = null, usage = null, reason = null, text = "";
  try {
    for await (const chunk of streamEvents("v1/chat/completions", request(), controller.signal)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const choice = chunk.choices[0];
      if (!choice) continue;
      first ??= performance.now();
      reason = choice.finish_reason ?? reason;
      text += choice.delta.content ?? "";
      write(item, choice, text);
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else { item.classList.add("failed"); item.append(error.message); }
  }
  if (text) {
    conversation.push({ role: "assistant", content: text });
    renderMarkdown(part(item, "text"), text);
  }
  addMeta(item, { began, first, usage, reason });
  running = null;
  setBusy(false);
}

/** A chunk, of an answer that is now `text`; with log-probabilities, its tokens too, which wait behind a button. */
function write(item, choice, text) {
  const { delta, logprobs } = choice;
  const near = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
  if (delta.reasoning_content) part(item, "thought").append(delta.reasoning_content);
  for (const call of delta.tool_calls ?? []) {
    if (call.function.name) { const made = document.createElement("span"); made.className = "call"; item.append(made); }
    item.querySelector(".call:last-of-type").append((call.function.name ?? "") + (call.function.arguments ?? ""));
  }
  if (delta.content) renderSoon(part(item, "text"), text);
  for (const token of logprobs?.content ?? []) part(item, "tokens").append(tokenSpan(token));
  if (near) list.scrollTop = list.scrollHeight;
}

let due = null;

/** Once a frame: a long answer is read as a whole each time. */
function renderSoon(element, text) {
  if (due === null) requestAnimationFrame(() => { renderMarkdown(...due); due = null; });
  due = [element, text];
}

function tokenSpan(token) {
  const span = document.createElement("span");
  span.className = "token";
  span.tabIndex = 0;
  span.textContent = token.token;
  const others = token.top_logprobs.filter((other) => other.token !== token.token);
  span.dataset.tip = [token, ...others].map((one) => `${percent(one.logprob)}  ${JSON.stringify(one.token)}`).join("\n");
  span.setAttribute("aria-description", span.dataset.tip);
  return span;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`.padStart(7);

/** The part of a message that holds its thoughts, its text or its tokens. */
function part(item, kind) {
  const there = item.querySelector(`:scope > .${kind}`);
  if (there) return there;
  const made = document.createElement("div");
  made.className = kind;
  made.hidden = kind === "tokens";
  item.append(made);
  return made;
}

function tokensButton(item) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Tokens";
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    part(item, "tokens").hidden = !shown;
    part(item, "text").hidden = shown;
  });
  return button;
}

function addMessage(role) {
  $("empty").hidden = true;
  const item = document.createElement("li");
  item.className = role;
  list.append(item);
  list.scrollTop = list.scrollHeight;
  return item;
}

function addMeta(item, { began, first, usage, reason }) {
  const meta = document.createElement("span");
  meta.className = "meta";
  const parts = [];
  if (first !== null) parts.push(`first token after ${((first - began) / 1000).toFixed(2)} s`);
  if (usage && first !== null) {
    const seconds = Math.max(1e-3, (performance.now() - first) / 1000);
    parts.push(`${usage.completion_tokens} tokens, ${(usage.completion_tokens / seconds).toFixed(0)} a second`);
  }
  if (reason && reason !== "stop") parts.push(reason === "length" ? "cut at max tokens" : reason);
  meta.textContent = parts.join(" · ");
  if (item.querySelector(":scope > .tokens")) meta.append(" ", tokensButton(item));
  item.append(meta);
}

function setBusy(busy) {
  $("send").disabled = busy;
  $("stop").disabled = !busy;
  $("again").disabled = busy || !conversation.length;
}

function showTip(token) {
  tip.textContent = token.dataset.tip;
  tip.hidden = false;
  const at = token.getBoundingClientRect();
  tip.style.left = `${Math.min(at.left, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${at.top > tip.offsetHeight + 12 ? at.top - tip.offsetHeight - 6 : at.bottom + 6}px`;
}
