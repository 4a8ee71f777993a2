"use strict";

// Earlier dialogues, kept in this browser: the newest first, [{id, image, turns, small?}].
const MOST_CHATS = 30;
const KEPT_BYTES = 150_000; // of a picture's data URL; a larger one is kept as a smaller copy
const KEPT_SIDE = 448; // pixels of that copy

const past = () => (picked.get("history") || []).filter((one) => Array.isArray(one?.turns) && one.turns.length);

// The dialogue as it stands after an answer. What the browser's storage cannot hold drops the oldest ones.
async function remember(one) {
  if (!one.turns.length) return;
  const large = one.image && one.image.length > KEPT_BYTES;
  const image = large ? await smaller(one.image, KEPT_SIDE) : one.image;
  const entry = { ...one, image, small: one.small || Boolean(large) };
  const list = [entry, ...past().filter(({ id }) => id !== one.id)].slice(0, MOST_CHATS);
  while (list.length && !picked.set("history", list)) list.pop();
  if (!list.length) complain(say("unkept"));
  drawHistory();
}

function forget(id) {
  picked.set("history", past().filter((one) => one.id !== id));
  drawHistory();
  (at("past").querySelector("button") || at("history")).focus();
}

function drawHistory() {
  const list = past();
  at("history").hidden = !list.length;
  if (!list.length) openHistory(false);
  at("past").replaceChildren(...list.map((one) => {
    const item = document.createElement("li"), title = one.turns[0].content, open = button(title, () => reopen(one));
    open.className = "title";
    if (one.id === chat.id) open.setAttribute("aria-current", "true");
    const gone = button(say("remove"), () => forget(one.id));
    gone.setAttribute("aria-label", `${say("remove")}: ${title}`);
    item.append(open, gone);
    return item;
  }));
}

function reopen(one) {
  begin(one.image);
  chat = structuredClone(one);
  openHistory(false);
  draw();
  scroll(true);
  at("question").focus();
}

function openHistory(shown) {
  if (shown) drawHistory();
  at("drawer").hidden = !shown;
  at("history").setAttribute("aria-expanded", String(shown));
}
