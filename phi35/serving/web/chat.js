"use strict";
// A conversation with the server that this page came from. Texts are only ever set as text, never as markup.

const at = (id) => document.getElementById(id);
const messages = [];
let pictures = [];
let readsImages = false;
let modelName = null;
let running = null;

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function show(error) {
  at("error").textContent = error || "";
  at("error").hidden = !error;
}

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers with status ${response.status}`;
  }
}

async function describeModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
      show(await failure(response));
      if (response.status === 401) at("settings").open = true;
      return;
    }
    const model = (await response.json()).data[0];
    modelName = model.id;
    readsImages = model.reads_images;
    at("model").textContent = model.id;
    at("attach").hidden = !readsImages;
    show("");
  } catch {
    show("the server cannot be reached");
  }
}

function picture(url) {
  const image = document.createElement("img");
  image.src = url;
  image.alt = "picture";
  return image;
}

function showPictures() {
  at("pictures").replaceChildren(
    ...pictures.map((url, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Take this picture out";
      button.append(picture(url));
      button.onclick = () => {
        pictures.splice(place, 1);
        showPictures();
      };
      return button;
    }),
  );
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function addPictures(files) {
  const chosen = [...files].filter((file) => file.type.startsWith("image/"));
  if (!chosen.length) return;
  if (!readsImages) return show("this model reads text only");
  try {
    pictures.push(...(await Promise.all(chosen.map(read))));
    showPictures();
  } catch {
    show("a picture could not be read");
  }
}

function addTurn(role, text, urls) {
  const turn = document.createElement("article");
  turn.className = `turn ${role}`;
  const body = document.createElement("div");
  body.className = "text";
  body.textContent = text;
  const note = document.createElement("div");
  note.className = "note";
  turn.append(...urls.map(picture), body, note);
  at("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return { turn, body, note };
}

function request() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  const system = at("system").value.trim();
  return {
    model: modelName,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_completion_tokens: number("max_tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The values of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function answer(shown) {
  const began = performance.now();
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(request()),
    signal: running.signal,
  });
  if (!response.ok) throw new Error(await failure(response));
  let reason = null;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      const near = at("turns").scrollHeight - at("turns").scrollTop - at("turns").clientHeight < 80;
      shown.body.textContent += choice.delta.content ?? "";
      if (near) shown.turn.scrollIntoView({ block: "end" });
      reason = choice.finish_reason ?? reason;
    }
    if (event.usage) {
      const seconds = (performance.now() - began) / 1000;
      at("status").textContent =
        `${event.usage.prompt_tokens} + ${event.usage.completion_tokens} tokens, ${seconds.toFixed(2)} s`;
    }
  }
  if (reason === "length") shown.note.textContent = "ended at the limit of tokens";
}

function setRunning(controller) {
  running = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
}

async function send() {
  const text = at("prompt").value.trim();
  if (running || (!text && !pictures.length)) return;
  if (modelName === null) await describeModel();
  if (modelName === null) return;
  show("");
  const urls = pictures;
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  const question = { role: "user", content: urls.length ? [...parts, { type: "text", text }] : text };
  messages.push(question);
  const asked = addTurn("user", text, urls);
  const shown = addTurn("assistant", "", []);
  shown.turn.classList.add("running");
  at("prompt").value = "";
  pictures = [];
  showPictures();
  const controller = new AbortController();
  setRunning(controller);
  let kept = true;
  try {
    await answer(shown);
  } catch (error) {
    if (error.name === "AbortError") {
      shown.note.textContent = "stopped";
    } else {
      show(error.message);
      kept = shown.body.textContent !== "";
      shown.note.textContent = "interrupted";
    }
  }
  shown.turn.classList.remove("running");
  if (running === controller) setRunning(null);
  if (!messages.includes(question)) return; // a new chat has begun meanwhile
  if (kept) {
    messages.push({ role: "assistant", content: shown.body.textContent });
  } else {
    // The question can be sent again.
    messages.pop();
    asked.turn.remove();
    shown.turn.remove();
    at("prompt").value = text;
    pictures = urls;
    showPictures();
  }
}

function startAnew() {
  running?.abort();
  messages.length = 0;
  pictures = [];
  at("turns").replaceChildren();
  at("status").textContent = "";
  showPictures();
  show("");
  at("prompt").focus();
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("options").addEventListener("submit", (event) => event.preventDefault());
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", startAnew);
at("key").addEventListener("change", describeModel);
at("files").addEventListener("change", (event) => {
  addPictures(event.target.files);
  event.target.value = "";
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("paste", (event) => addPictures(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  addPictures(event.dataTransfer.files);
});
describeModel();
