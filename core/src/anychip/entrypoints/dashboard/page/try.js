// Instead of the chat, for models that give vectors, scores or labels: texts in, a table out.

import { getJson, postJson } from "./api.js";

const $ = (id) => document.getElementById(id);
const shown = (number) => number.toFixed(4);

/** By task: what the form asks for, and rows of the answer, the first of them the heads. */
const TASKS = {
  embed: {
    query: "Text", texts: "Texts to compare it with, one a line",
    async rows(query, texts) {
      const { data } = await postJson("v1/embeddings", { input: [query, ...texts] });
      const [first, ...others] = data.map((entry) => entry.embedding);
      const found = others.map((vector, at) => [texts[at], shown(cosine(first, vector))]);
      return [["text", "similarity"], ...found.sort((a, b) => b[1] - a[1]), [`${first.length} numbers: ${first.slice(0, 4).map(shown).join(", ")}, …`, ""]];
    },
  },
  score: {
    query: "Question", texts: "Documents, one a line",
    async rows(query, documents) {
      const { results } = await postJson("rerank", { query, documents });
      return [["document", "score"], ...results.map((each) => [documents[each.index], shown(each.relevance_score)])];
    },
  },
  classify: {
    texts: "Texts, one a line",
    async rows(_, input) {
      const { data } = await postJson("classify", { input });
      return [["text", "label", "scores"], ...data.map((each) => [input[each.index], each.label, each.probs.map(shown).join(", ")])];
    },
  },
};
TASKS.reward = TASKS.classify;

function cosine(a, b) {
  const dot = (x, y) => x.reduce((sum, value, at) => sum + value * y[at], 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

/** Shows the form where the model draws no text; `open` makes its tab the chosen one. */
export async function startTry(open) {
  const { task } = await getJson("debug/state");
  const form = TASKS[task];
  if (!form) return;
  $("tab-chat").hidden = true;
  $("tab-try").hidden = false;
  $("try-query-label").hidden = $("try-query").hidden = !form.query;
  $("try-query-label").textContent = form.query ?? "";
  $("try-query").required = Boolean(form.query);
  $("try-texts-label").textContent = form.texts;
  open($("tab-try"));
  $("try-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const texts = $("try-texts").value.split("\n").map((line) => line.trim()).filter(Boolean);
    try {
      show(await form.rows($("try-query").value.trim(), texts));
      $("try-note").textContent = "";
    } catch (error) {
      $("try-note").textContent = error.message;
    }
  });
}

function show(rows) {
  $("try-table").replaceChildren(...rows.map((cells, at) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text) => {
      const cell = document.createElement(at ? "td" : "th");
      cell.textContent = text;
      return cell;
    }));
    return row;
  }));
}
