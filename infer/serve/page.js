"use strict";

const at = (id) => document.getElementById(id);
const picked = store(() => localStorage), kept = store(() => sessionStorage);
let language = picked.get("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let chat = kept.get("chat") || blank(null); // turns: {role, content, note?}
let editing = null; // index of the question that the next one replaces
let model = null, first = "", running = null; // first: the default question; running: AbortController of the answer that comes

// Storage may be switched off or full; the page then forgets when it is reloaded.
function store(where) {
  return {
    get(name) { try { return JSON.parse(where().getItem(name)); } catch { return null; } },
    set(name, value) { try { where().setItem(name, JSON.stringify(value)); return true; } catch { return false; } },
  };
}

function blank(image) {
  return { id: `${Date.now()}-${Math.random()}`, image, turns: [] };
}

const say = (name) => WORDS[language][name];

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) element.setAttribute("aria-label", say(element.dataset.label));
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = say(element.dataset.hint);
  at("language").textContent = language === "zh" ? "English" : "中文";
  at("language").lang = language === "zh" ? "en" : "zh-CN";
  draw();
  drawHistory();
}

function draw() {
  at("shown").hidden = !chat.image;
  at("invitation").hidden = Boolean(chat.image);
  at("choose").classList.toggle("full", Boolean(chat.image));
  if (chat.image) at("shown").src = chat.image;
  at("shown").alt = say("picture");
  at("choose").setAttribute("aria-label", say(chat.image ? "another" : "choose"));
  at("small").hidden = !chat.small;
  at("turns").replaceChildren(...chat.turns.map(drawTurn));
  drawSamples();
  at("stop").hidden = !running;
  at("send").hidden = Boolean(running);
  at("turns").setAttribute("aria-busy", String(Boolean(running))); // read out once it is whole
  keep();
}

const keep = () => kept.set("chat", chat);

// Questions to press, while nothing has been asked about a picture; the first is that of the checkpoint's training.
function drawSamples() {
  at("samples").hidden = !chat.image || Boolean(chat.turns.length);
  at("samples").replaceChildren(...[...new Set([first, ...say("questions")])].filter(Boolean).map((question) => {
    const item = document.createElement("li");
    item.append(button(question, () => send(question)));
    return item;
  }));
}

function drawTurn(turn, index) {
  const item = document.createElement("li"), words = document.createElement("div");
  item.className = turn.role;
  words.className = "words";
  words.textContent = turn.content;
  item.append(words);
  const last = index === chat.turns.length - 1;
  item.classList.toggle("running", Boolean(running) && last);
  if (turn.role === "assistant" && !(running && last)) {
    const under = document.createElement("div"), note = document.createElement("span");
    under.className = "under";
    note.textContent = noteOf(turn);
    under.append(button(say("copy"), (self) => copy(turn.content, self)));
    if (chat.image) under.append(button(say("lens"), (self) => toggleLens(under, self)));
    under.append(note);
    item.append(under);
  }
  return item;
}

function noteOf({ note }) {
  const tokens = note.tokens ? say("tokens")(note.tokens) : "";
  return [note.end && say(note.end), tokens, `${note.seconds} s`].filter(Boolean).join(" · ");
}

function button(text, pressed) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", () => pressed(made));
  return made;
}

async function copy(text, self) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https, but for localhost
    const area = document.body.appendChild(Object.assign(document.createElement("textarea"), { value: text }));
    area.select();
    document.execCommand("copy");
    area.remove();
    self.focus();
  }
  const name = self.dataset.text || "copy";
  self.textContent = say("copied");
  setTimeout(() => { self.textContent = say(name); }, 1500);
}

// A picture belongs to the whole dialogue, so another one begins a new dialogue.
async function show(file) {
  try {
    const image = await toDataUrl(file);
    begin(image);
    at("question").value ||= first;
    grow();
    at("question").focus();
    if (at("question").value === first) at("question").select(); // what is typed takes its place
  } catch {
    complain(say("unread"));
  }
}

function begin(image) {
  if (running) leave();
  if (editing !== null) edit(null);
  chat = blank(image);
  complain("");
  draw();
}

// The answer that is coming is as long as it has become.
function leave() {
  running.abort();
  running = null;
  if (chat.turns.at(-1).content) chat.turns.at(-1).note.end = "stopped";
  else chat.turns.splice(-2);
  remember(chat);
}

// What the server is sent: the picture goes with the first question.
function messages(turns) {
  return turns.map(({ role, content }, index) => {
    if (index || !chat.image) return { role, content };
    return { role, content: [{ type: "image_url", image_url: { url: chat.image } }, { type: "text", text: content }] };
  });
}

// An answer to the last question. Those turns that this question replaces come back if there is none.
async function answer(replaced) {
  const mine = running = new AbortController(), began = performance.now();
  const body = { model, stream: true, stream_options: { include_usage: true }, messages: messages(chat.turns) };
  const turn = { role: "assistant", content: "", note: { tokens: 0, seconds: 0, end: "" } };
  chat.turns.push(turn);
  complain("");
  draw();
  scroll(true);
  try {
    const response = await ask("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: mine.signal });
    let finish = null;
    for await (const event of events(response.body)) {
      const choice = event.choices[0];
      if (event.usage) turn.note.tokens = event.usage.completion_tokens;
      if (choice?.finish_reason) finish = choice.finish_reason;
      if (choice?.delta.content && mine === running) {
        turn.content += choice.delta.content;
        at("turns").lastElementChild.firstElementChild.textContent = turn.content;
        scroll(false);
      }
    }
    if (!finish) throw new Error(say("broken"));
    if (finish === "length") turn.note.end = "cut";
  } catch (error) {
    if (mine !== running) return; // another dialogue has begun
    if (mine.signal.aborted) turn.note.end = "stopped";
    else complain(error.message);
  }
  if (mine !== running) return;
  running = null;
  turn.note.seconds = ((performance.now() - began) / 1000).toFixed(1);
  if (!turn.content) {
    forgetQuestion();
    chat.turns.push(...replaced);
  }
  remember(chat);
  draw();
  scroll(false);
  if (at("key-row").hidden) at("question").focus();
}

// A question that got no answer goes back to where it was typed.
function forgetQuestion() {
  chat.turns.pop();
  const { content } = chat.turns.pop();
  at("question").value ||= content;
  grow();
}

function send(content = at("question").value.trim()) {
  if (running || !content) return;
  const replaced = editing === null ? [] : chat.turns.splice(editing);
  edit(null);
  chat.turns.push({ role: "user", content });
  answer(replaced);
}

// The last question comes back into the box; it and its answer stay until another is sent.
function edit(index) {
  editing = index;
  at("question").value = index === null ? "" : chat.turns[index].content;
  complain(index === null ? "" : say("editing"));
  grow();
}

const complain = (words) => { at("status").textContent = words; };

// Follows the answer, unless the reader has scrolled up.
function scroll(always) {
  const page = document.scrollingElement;
  if (always || page.scrollHeight - page.scrollTop - page.clientHeight < 160) page.scrollTop = page.scrollHeight;
}

function grow() {
  at("question").style.height = "auto";
  at("question").style.height = `${at("question").scrollHeight + 2}px`;
}

at("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  picked.set("language", language);
  translate();
});
at("anew").addEventListener("click", () => { begin(null); at("choose").focus(); });
at("choose").addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  if (at("file").files[0]) show(at("file").files[0]);
  at("file").value = ""; // the same file may be chosen again
});
at("key").addEventListener("change", () => kept.set("key", at("key").value.trim()));
at("stop").addEventListener("click", () => running?.abort());
at("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("question").addEventListener("input", grow);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { // Enter also ends the choice of a Chinese word
    event.preventDefault();
    send();
  }
  if (event.key === "ArrowUp" && !at("question").value && !running && chat.turns.length) {
    event.preventDefault();
    edit(chat.turns.findLastIndex(({ role }) => role === "user"));
  }
});
at("history").addEventListener("click", () => openHistory(at("drawer").hidden));
at("clear").addEventListener("click", () => { picked.set("history", []); drawHistory(); at("anew").focus(); });
for (const [name, code] of [["curl", asCurl], ["python", asPython]]) {
  at(name).addEventListener("click", () => copy(code(), at(name)));
}
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else if (editing !== null) edit(null);
  else if (!at("drawer").hidden) { openHistory(false); at("history").focus(); }
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) { event.preventDefault(); show(file); }
});
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  if (event.dataTransfer.files[0]) show(event.dataTransfer.files[0]);
});

addEventListener("pagehide", keep);
chat.id ||= blank(null).id; // of an earlier page

// An answer that was coming when the page was left is as long as it had become.
if (chat.turns.at(-1)?.role === "assistant" && !chat.turns.at(-1).content) chat.turns.splice(-2);
translate();
fetch("health").then((response) => response.json()).then((health) => {
  ({ model, question: first } = health);
  at("model").textContent = document.title = model;
  drawSamples();
}).catch(() => complain(say("offline")));
