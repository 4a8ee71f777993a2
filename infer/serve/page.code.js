"use strict";

// The request as it would be sent now: what is typed, or else the last question that was asked.
function currentMessages() {
  const typed = at("question").value.trim();
  const asked = chat.turns.slice(0, editing ?? undefined);
  if (!typed && asked.length) return messages(asked.slice(0, asked.findLastIndex(({ role }) => role === "user") + 1));
  return messages([...asked, { role: "user", content: typed || first }]);
}

const base = () => new URL("v1", location.href).href;

// By standard input, since an argument takes no more than 128 KiB, and a picture has more.
function asCurl() {
  const key = kept.get("key") ? ` -H "Authorization: Bearer $LLAVA_API_KEY"` : "";
  const body = JSON.stringify({ model, messages: currentMessages() });
  return `curl ${base()}/chat/completions -H "Content-Type: application/json"${key} -d @- <<'JSON'\n${body}\nJSON\n`;
}

// JSON of texts, lists and objects is Python, too.
function asPython() {
  return `import os

from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base())}, api_key=os.environ.get("LLAVA_API_KEY", "none"))
messages = ${JSON.stringify(currentMessages())}
answer = client.chat.completions.create(model=${JSON.stringify(model)}, messages=messages)
print(answer.choices[0].message.content)
`;
}
