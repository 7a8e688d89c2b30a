// The dashboard: what /metrics counts, as rates and percentiles of the last seconds.

import { getJson, withKey } from "./api.js";

const EVERY_MS = 1000;
const KEPT = 120;
const WINDOW = 30;
const history = [];
const $ = (id) => document.getElementById(id);

export function startBoard() {
  let timer = null;
  const tick = async () => {
    try { await refresh(); } catch { showAlive(false, "no answer"); }
    timer = setTimeout(tick, EVERY_MS);
  };
  tick();
  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    if (!document.hidden) tick();
  });
  getJson("debug/kernels").then((found) => fill("kernels", Object.entries(found.ops))).catch(() => {});
}

async function refresh() {
  const [text, state] = await Promise.all([
    withKey((headers) => fetch("metrics", { headers })).then((response) => response.text()), getJson("debug/state"),
  ]);
  history.push({ at: performance.now(), samples: parse(text) });
  if (history.length > KEPT) history.shift();
  $("model").textContent = `${state.model} on ${state.device}`;
  showAlive(state.alive, state.alive ? "ready" : "engine down");
  if (!$("board").hidden) draw(state);
}

/** Samples of the exposition format, by name with labels. */
function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const at = line.lastIndexOf(" ");
    if (at > 0 && line[0] !== "#") samples.set(line.slice(0, at), Number(line.slice(at + 1)));
  }
  return samples;
}

/** The sum over labels. */
function value(samples, name) {
  let sum = 0;
  for (const [key, number] of samples) if (key === name || key.startsWith(`${name}{`)) sum += number;
  return sum;
}

function rate(name, seconds) {
  const newest = history.at(-1);
  const oldest = history.find((entry) => entry.at >= newest.at - seconds * 1000) ?? history[0];
  const passed = (newest.at - oldest.at) / 1000;
  return passed > 0 ? (value(newest.samples, name) - value(oldest.samples, name)) / passed : 0;
}

/** A percentile of what a histogram counted within the window, between its bounds. */
function percentile(name, share) {
  const newest = history.at(-1), oldest = history[Math.max(0, history.length - 1 - WINDOW)];
  const counts = buckets(newest.samples, name), before = buckets(oldest.samples, name);
  const grown = counts.map(([bound, count], at) => [bound, count - (oldest === newest ? 0 : before[at]?.[1] ?? 0)]);
  const total = grown.at(-1)?.[1] ?? 0;
  if (!total) return null;
  let lower = 0, under = 0;
  for (const [bound, count] of grown) {
    if (count >= share * total) {
      return bound === Infinity ? lower : lower + (bound - lower) * (share * total - under) / Math.max(1, count - under);
    }
    [lower, under] = [bound, count];
  }
  return lower;
}

function buckets(samples, name) {
  const found = [];
  for (const [key, count] of samples) {
    if (!key.startsWith(`${name}_bucket{`)) continue;
    const bound = key.match(/le="([^"]+)"/)[1];
    found.push([bound === "+Inf" ? Infinity : Number(bound), count]);
  }
  return found.sort((a, b) => a[0] - b[0]);
}

// Only where something drafts tokens.
function drafts(now) {
  const drafted = value(now, "anychip_spec_decode_num_draft_tokens_total");
  const accepted = value(now, "anychip_spec_decode_num_accepted_tokens_per_pos_total");
  return drafted ? [["Drafts accepted", `${(100 * accepted / drafted).toFixed(0)} %`]] : [];
}

// The pool of states, of models that have one.
function states(now) {
  const used = value(now, "anychip_state_cache_usage_ratio");
  return value(now, "anychip_state_cache_blocks") ? [["States used", `${(100 * used).toFixed(1)} %`]] : [];
}

// What a token takes in the cache, and a sequence, by what layers keep.
function kept(memory) {
  const rows = [["A token's keys and values", memory.kv_token], ["A token's latent rows", memory.latent_token],
    ["A sequence's states", memory.state_sequence]];
  const blocks = memory.num_states ? [["States", (memory.num_states - 1).toLocaleString()]] : [];
  return [...blocks, ...rows.filter(([, size]) => size).map(([label, size]) => [label, bytes(size)])];
}

function draw(state) {
  const now = history.at(-1).samples;
  const queries = value(now, "anychip_prefix_cache_queries_total");
  const hits = value(now, "anychip_prefix_cache_hits_total");
  cards([
    ["Tokens out / s", rate("anychip_generation_tokens_total", 5).toFixed(0)],
    ["Tokens in / s", rate("anychip_prompt_tokens_total", 5).toFixed(0)],
    ["Running", value(now, "anychip_num_requests_running")],
    ["Waiting", value(now, "anychip_num_requests_waiting")],
    ["KV blocks used", `${(100 * value(now, "anychip_kv_cache_usage_ratio")).toFixed(1)} %`],
    ...states(now),
    ["Prefix hits", queries ? `${(100 * hits / queries).toFixed(0)} %` : "–"],
    ...drafts(now),
    ["Preemptions", value(now, "anychip_num_preemptions_total")],
    ["Engine restarts", value(now, "anychip_engine_restarts_total")],
  ]);
  plot();
  const rows = [["First token", "time_to_first_token_seconds"], ["Between tokens", "inter_token_latency_seconds"],
    ["Queue", "request_queue_time_seconds"], ["Whole request", "e2e_request_latency_seconds"]];
  fill("latency", [["last 30 s", "p50", "p90", "p99"], ...rows.map(([label, name]) =>
    [label, ...[0.5, 0.9, 0.99].map((share) => seconds(percentile(`anychip_${name}`, share)))])]);
  const { memory } = state;
  fill("memory", [["Weights", bytes(memory.weights)], ["KV cache", bytes(memory.kv_cache)],
    ["Activations", bytes(memory.activations)], ["Graphs", bytes(memory.graphs)],
    ["KV tokens", memory.kv_tokens.toLocaleString()], ["Context", `${state.max_model_len.toLocaleString()} tokens`],
    ...kept(memory),
    ["Version", state.version], ["Tool parser", state.tool_parser ?? "json"], ["Reasoning", state.reasoning_parser ?? "none"]]);
  fill("capabilities", Object.entries(state.capabilities));
}

function cards(entries) {
  const made = entries.map(([label, number]) => {
    const card = document.createElement("div"), title = document.createElement("h2"), text = document.createElement("div");
    card.className = "card";
    title.textContent = label;
    text.className = "number";
    text.textContent = number;
    card.append(title, text);
    return card;
  });
  $("cards").replaceChildren(...made);
}

function plot() {
  const name = "anychip_generation_tokens_total";
  const rates = history.slice(1).map((entry, at) => {
    const before = history[at];
    return Math.max(0, (value(entry.samples, name) - value(before.samples, name)) / ((entry.at - before.at) / 1000));
  });
  const top = Math.max(1, ...rates);
  const points = rates.map((y, at) => `${(600 * (at + KEPT - rates.length) / KEPT).toFixed(1)},${(116 - 110 * y / top).toFixed(1)}`);
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  if (points.length) path.setAttribute("d", `M${points.join("L")}`);
  $("plot").replaceChildren(path);
  $("plot-note").textContent = `peak ${top.toFixed(0)} a second`;
}

/** Rows of text; nothing that comes from the server is read as HTML. */
function fill(id, rows) {
  $(id).replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell, at) => {
      const made = document.createElement(at ? "td" : "th");
      made.textContent = cell;
      return made;
    }));
    return row;
  }));
}

function showAlive(alive, text) {
  $("alive").textContent = text;
  $("alive").classList.toggle("dead", !alive);
}

const seconds = (number) => number === null ? "–" : number < 1 ? `${(1000 * number).toFixed(number < 0.01 ? 1 : 0)} ms` : `${number.toFixed(2)} s`;

function bytes(number) {
  for (const unit of ["B", "KiB", "MiB"]) {
    if (number < 1024) return `${number.toFixed(0)} ${unit}`;
    number /= 1024;
  }
  return `${number.toFixed(2)} GiB`;
}
