"use strict";
const content = JSON.parse(document.getElementById("content").textContent);
const image = document.getElementById("image").src;
const readouts = [...new Set(content.panels.map((panel) => panel.readout))];

function make(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const spelt = (words) => words.map(([word, score]) => `${word} ${score.toFixed(2)}`).join("   ");

function drawn(panel) {
  const figure = make("section", "panel");
  figure.append(make("h2", "", panel.projector));
  const grid = make("div", "grid");
  grid.style.backgroundImage = `url(${image})`;
  grid.style.gridTemplate = `repeat(${content.side}, 1fr) / repeat(${content.side}, 1fr)`;
  grid.style.setProperty("--size", `clamp(9px, ${26 / content.side}cqi, 22px)`);
  const rest = panel.classWords.length ? `${content.classToken} ${spelt(panel.classWords)}` : "";
  const more = make("p", "more", rest);
  panel.words.forEach((words, k) => {
    const patch = make("div", content.plain[k] ? "patch plain" : "patch", words[0][0]);
    patch.tabIndex = 0;
    patch.title = spelt(words);
    const where = `${Math.floor(k / content.side) + 1}, ${(k % content.side) + 1}: `; // row, column
    for (const event of ["mouseenter", "focus"]) patch.addEventListener(event, () => (more.textContent = where + spelt(words)));
    for (const event of ["mouseleave", "blur"]) patch.addEventListener(event, () => (more.textContent = rest));
    grid.append(patch);
  });
  figure.append(grid, more);
  return figure;
}

function show(readout) {
  document.getElementById("panels").replaceChildren(...content.panels.filter((panel) => panel.readout === readout).map(drawn));
  for (const button of document.querySelectorAll("#readouts button")) {
    button.setAttribute("aria-pressed", String(button.textContent === readout));
  }
}

for (const readout of readouts) {
  const button = make("button", "", readout);
  button.addEventListener("click", () => show(readout));
  document.getElementById("readouts").append(button);
}
for (const [text, loss, other] of content.pieces) {
  const share = Math.min(1, Math.max(0, (other - loss) / content.most));
  const piece = make("span", share > 0.5 ? "piece strong" : "piece", text || content.end);
  piece.style.backgroundColor = `rgba(var(--gain), ${share})`;
  piece.title = `${(other - loss).toFixed(2)} = ${other.toFixed(2)} − ${loss.toFixed(2)}`;
  piece.tabIndex = 0;
  for (const event of ["mouseenter", "focus"]) {
    piece.addEventListener(event, () => (document.getElementById("piece").textContent = `${text || content.end}: ${piece.title}`));
  }
  document.getElementById("pieces").append(piece);
}
for (let nats = 0; nats <= content.most; nats += 1) {
  const step = make("span", "step", nats < content.most ? String(nats) : `≥ ${nats}`);
  step.style.backgroundColor = `rgba(var(--gain), ${nats / content.most})`;
  if (nats > content.most / 2) step.classList.add("strong");
  document.getElementById("scale").append(step);
}
show(readouts[0]);
