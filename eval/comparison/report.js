"use strict";
// Without this script the page still has everything but the viewer: pictures are links.
document.documentElement.classList.add("scripted");
const byId = id => document.getElementById(id);

// Lines to copy.
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const line = button.parentElement.querySelector("pre");
    let copied = true;
    try {
      await navigator.clipboard.writeText(line.textContent);
    } catch {
      getSelection().selectAllChildren(line);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}

// How many columns of a table are hidden to the right.
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "hint note";
  box.before(hint);
  const update = () => {
    const end = box.getBoundingClientRect().left + box.clientWidth;
    const cells = [...box.querySelectorAll("thead th")];
    const hidden = cells.filter(cell => cell.getBoundingClientRect().right > end + 1).length;
    hint.textContent = hidden ? `${hidden} more column${hidden > 1 ? "s" : ""} to the right →` : "";
    box.classList.toggle("more", hidden > 0);
  };
  box.addEventListener("scroll", update, { passive: true });
  new ResizeObserver(update).observe(box);
}

// On paper nothing can be opened or scrolled to: verdicts are open, and all pictures there.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
document.querySelector("[data-print]").addEventListener("click", async event => {
  event.target.disabled = true;
  const pictures = [...document.querySelectorAll(".pictures img")];
  for (const image of pictures) image.loading = "eager";
  await Promise.allSettled(pictures.map(image => image.decode()));
  event.target.disabled = false;
  print();
});

// The viewer: two settings over each other, for any picture.
const table = document.querySelector("table.pictures");
const names = [...table.querySelectorAll("thead [data-name]")].map(cell => cell.dataset.name);
const pictures = [...table.tBodies[0].rows].map(row => ({
  name: row.dataset.name,
  links: [...row.querySelectorAll("td a")],
}));
const viewer = byId("viewer");
const stage = byId("stage");
const state = {
  row: 0,
  first: Number(table.dataset.first),
  second: Number(table.dataset.second),
  mode: "slide",
  flipped: false,
};

function load(image, link) {
  const small = link.querySelector("img");
  image.alt = small.alt;
  image.src = small.src;
  image.dataset.file = link.href;
  const full = new Image();
  full.onload = () => { if (image.dataset.file === link.href) image.src = link.href; };
  full.src = link.href;
}

function show() {
  const { name, links } = pictures[state.row];
  byId("shown").textContent = name;
  byId("count").textContent = `${state.row + 1} of ${pictures.length}`;
  for (const which of ["first", "second"]) {
    const column = state[which];
    load(byId(which), links[column]);
    byId(`choose-${which}`).selectedIndex = column;
    byId(`tag-${which}`).textContent = names[column];
    byId(`file-${which}`).href = links[column].href;
  }
  stage.dataset.mode = state.mode;
  stage.classList.toggle("flipped", state.flipped);
  byId("at").disabled = state.mode !== "slide";
  for (const button of document.querySelectorAll("[data-mode]:is(button)")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === state.mode));
  }
}

function open(row, column) {
  if (column !== state.first) state.second = column;
  state.row = row;
  show();
  viewer.showModal();
  stage.focus();
}

const around = (place, count) => (place + count) % count;

function move(rows, columns) {
  state.row = around(state.row + rows, pictures.length);
  if (columns) {
    state.second = around(state.second + columns, names.length);
    if (state.second === state.first) state.second = around(state.second + columns, names.length);
  }
  show();
}

function choose(mode) {
  state.flipped = mode === "flip" && state.mode === "flip" && !state.flipped;
  state.mode = mode;
  show();
}

function place(percent) {
  stage.style.setProperty("--at", `${percent}%`);
  byId("at").value = percent;
}

for (const which of ["first", "second"]) {
  const list = byId(`choose-${which}`);
  list.append(...names.map(name => new Option(name)));
  list.addEventListener("change", () => { state[which] = list.selectedIndex; show(); });
}
for (const button of document.querySelectorAll("[data-mode]:is(button)")) {
  button.addEventListener("click", () => choose(button.dataset.mode));
}
byId("previous").addEventListener("click", () => move(-1, 0));
byId("next").addEventListener("click", () => move(1, 0));
byId("close").addEventListener("click", () => viewer.close());
byId("at").addEventListener("input", event => place(event.target.value));

const follow = event => {
  const { left, width } = stage.getBoundingClientRect();
  place(Math.round(Math.min(1, Math.max(0, (event.clientX - left) / width)) * 100));
};
stage.addEventListener("pointerdown", event => {
  if (state.mode === "flip") choose("flip");
  if (state.mode !== "slide") return;
  stage.setPointerCapture(event.pointerId);
  follow(event);
});
stage.addEventListener("pointermove", event => {
  if (stage.hasPointerCapture(event.pointerId)) follow(event);
});

const arrows = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
viewer.addEventListener("keydown", event => {
  if (event.target.matches("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in arrows) move(...arrows[event.key]);
  else if (event.key === " " && !event.target.closest("button, a")) choose("flip");
  else return;
  event.preventDefault();
});

document.addEventListener("click", event => {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window: the file
  if (event.target.closest("[data-compare]")) open(0, state.second);
  const link = event.target.closest("table.pictures td a, .strip a");
  if (!link) return;
  event.preventDefault();
  const cell = link.closest("td");
  if (cell) open(cell.parentElement.sectionRowIndex, cell.cellIndex - 1);
  else open(Number(link.dataset.row), Number(link.dataset.column));
});
