const form = document.querySelector("form"), rows = [...document.querySelectorAll(".gallery li")];
function show() {
  const words = form.text.value.trim().toLowerCase(), outcome = form.outcome.value;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(words) || (outcome && row.dataset.outcome !== outcome);
  }
  form.shown.value = rows.filter((row) => !row.hidden).length + " / " + rows.length;
}
form.addEventListener("input", show);
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
form.text.value = decodeURIComponent(location.hash.slice(1)); // page.html#words opens it filtered
show();
