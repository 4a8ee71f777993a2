"use strict";

// The words nearest to each patch of the dialogue's picture, under an answer. Of one picture they are asked for once.
let seen = { image: null, found: null };

async function toggleLens(under, self) {
  const open = under.parentElement.querySelector(".lens");
  self.setAttribute("aria-expanded", String(!open));
  if (open) return open.remove();
  complain("");
  self.disabled = true;
  try {
    const image = chat.image, input = { type: "image_url", image_url: { url: image } };
    if (seen.image !== image) {
      const response = await ask("v1/lens", { method: "POST", body: JSON.stringify({ model, input }) });
      seen = { image, found: await response.json() };
    }
    if (!under.isConnected) return;
    const figure = drawLens(seen.found);
    under.after(figure);
    figure.scrollIntoView({ block: "nearest" });
  } catch (error) {
    self.setAttribute("aria-expanded", "false");
    complain(error.message);
  } finally {
    self.disabled = false;
  }
}

function drawLens({ side, image, words }) {
  const figure = document.createElement("figure"), grid = document.createElement("div"), more = document.createElement("figcaption");
  figure.className = "lens";
  grid.className = "grid";
  grid.setAttribute("role", "group");
  grid.setAttribute("aria-label", say("lens"));
  more.setAttribute("aria-live", "polite");
  grid.style.backgroundImage = `url("${image}")`;
  grid.style.gridTemplate = `repeat(${side}, 1fr) / repeat(${side}, 1fr)`;
  grid.style.setProperty("--patch", `clamp(7px, ${10 / side}rem, 15px)`);
  more.textContent = say("lensHow");
  const patches = words.map((near, place) => {
    const patch = document.createElement("span");
    patch.textContent = near[0][0];
    patch.tabIndex = place ? -1 : 0; // one stop of the Tab key; arrows go on from there
    const spelt = near.map(([word, score]) => `${word} ${score.toFixed(2)}`).join("  ");
    const where = say("patch")(Math.floor(place / side) + 1, (place % side) + 1);
    for (const event of ["mouseenter", "focus"]) patch.addEventListener(event, () => { more.textContent = `${where}: ${spelt}`; });
    return patch;
  });
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side };
  grid.addEventListener("keydown", (event) => {
    const next = patches[patches.indexOf(document.activeElement) + steps[event.key]];
    if (!next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  grid.append(...patches);
  figure.append(grid, more);
  return figure;
}
