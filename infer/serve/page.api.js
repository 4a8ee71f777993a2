"use strict";

// The server's HTTP interface: requests with the key, and streamed events.
async function ask(path, options = {}) {
  const headers = { "Content-Type": "application/json" }, key = kept.get("key");
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(say("offline"));
  }
  if (response.ok) {
    at("key-row").hidden = true;
    return response;
  }
  if (response.status === 401) {
    at("key-row").hidden = false;
    at("key").focus();
    throw new Error(say("askKey"));
  }
  const failure = await response.json().catch(() => null);
  throw new Error(failure?.error?.message || `HTTP ${response.status}`);
}

// Server-sent events as objects, up to [DONE]. Throws what the server says went wrong.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
