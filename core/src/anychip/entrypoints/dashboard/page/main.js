// Tabs, and the start of both views.

import { startBoard } from "./board.js";
import { startChat } from "./chat.js";
import { startTry } from "./try.js";

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}

for (const tab of tabs) {
  tab.addEventListener("click", () => select(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const shown = tabs.filter((other) => !other.hidden);
    const next = shown[(shown.indexOf(tab) + step + shown.length) % shown.length];
    select(next);
    next.focus();
  });
}

// On a phone the parameters would leave no room for the conversation.
document.getElementById("settings").open = matchMedia("(min-width: 48rem)").matches;
startChat();
startBoard();
startTry(select).catch(() => {});  // a server that does not answer: the dashboard says so
