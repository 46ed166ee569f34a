"use strict";
const large = document.getElementById("large");
let shown = null;

function show(button) {
  shown = button;
  const image = large.querySelector("img");
  image.src = button.querySelector("img").src;
  image.alt = button.dataset.title;
  large.querySelector("p").textContent = button.dataset.title;
  if (!large.open) large.showModal();
}

for (const button of document.querySelectorAll(".picture")) {
  button.addEventListener("click", () => show(button));
}
large.addEventListener("click", (event) => {
  if (event.target === large) large.close();
});
large.addEventListener("close", () => shown.focus());
large.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const row = [...document.querySelectorAll(`.picture[data-row="${shown.dataset.row}"]`)];
  const next = row[row.indexOf(shown) + step];
  if (next) show(next);
});

function sortBy(header, column) {
  const table = header.closest("table");
  const down = header.getAttribute("aria-sort") === "ascending";
  const value = (row) => row.cells[column].dataset.value;
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return down ? -order : order;
  });
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  table.tBodies[0].append(...rows);
}

document.querySelectorAll(".cells thead th").forEach((header, column) => {
  header.querySelector("button").addEventListener("click", () => sortBy(header, column));
});
