// What the page asks of its own server, and of nobody else.

const dialog = document.querySelector("#key-dialog");
const field = document.querySelector("#key");

const keptKey = () => sessionStorage.getItem("anychip-key");

/** Asks for a key until the server takes it: `send` is tried again with each. */
export async function withKey(send) {
  for (;;) {
    const key = keptKey();
    const response = await send(key ? { Authorization: `Bearer ${key}` } : {});
    if (response.status !== 401) return response;
    // One that is refused after another has been given a key went out without it: it is tried again, nobody is asked.
    if (key === keptKey()) await askForKey();
  }
}

let asking = null;
function askForKey() {
  asking ??= new Promise((resolve) => {
    field.value = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      sessionStorage.setItem("anychip-key", field.value);
      asking = null;
      resolve();
    }, { once: true });
  });
  return asking;
}

export async function getJson(path) {
  const response = await withKey((given) => fetch(path, { headers: given }));
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

/** The answer of a POST. Throws with the server's own words. */
export async function postJson(path, body) {
  const response = await withKey((given) => fetch(path, {
    method: "POST", body: JSON.stringify(body), headers: { ...given, "Content-Type": "application/json" },
  }));
  const told = await response.json().catch(() => null);
  if (!response.ok) throw new Error(told?.error?.message ?? `the server answered ${response.status}`);
  return told;
}

/** Server-sent events of a POST, as objects; ends at [DONE]. Throws with the server's own words. */
export async function* streamEvents(path, body, signal) {
  const response = await withKey((given) => fetch(path, {
    method: "POST", body: JSON.stringify(body), signal, headers: { ...given, "Content-Type": "application/json" },
  }));
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered ${response.status}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6));
      text = text.slice(end + 2);
      if (data[0] === "[DONE]") return;
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}
