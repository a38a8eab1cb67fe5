"use strict";
// Shared by the pages of caches and of runs, which run it before their own script.
// shown.views[i]: for each location, row by row, [c0, q1, c1, q2, c2, ...]: class c1 takes over at r = (q1 + 0.5) / N.
const shown = JSON.parse(document.getElementById("data").textContent);
const N = 65535;
const [rows, columns] = shown.grid;
const byId = (id) => document.getElementById(id);
const name = (label) => shown.names[label] ?? `class ${label}`;
const colour = (label) => `hsl(${(label * 137.508) % 360} 75% 52%)`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const where = (i) => `Row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}: `;

function labelAt(location, r) {
  const t = Math.ceil(r * N - 0.5);
  let label = location[0];
  for (let i = 1; i < location.length && location[i] < t; i += 2) label = location[i + 1];
  return label;
}

function spans(location) {
  // In the order of training: from the local label, r = 1, to the global one, r = 0.
  const found = [];
  for (let i = 0; i < location.length; i += 2) {
    const from = i ? (location[i - 1] + 0.5) / N : 0;
    const to = i + 1 < location.length ? (location[i + 1] + 0.5) / N : 1;
    found.unshift(`${name(location[i])} (r ${from.toFixed(2)} to ${to.toFixed(2)})`);
  }
  return found.join(", then ");
}

function layCells(grid, tell) {
  // One cell a location; arrow keys move, and `tell` is called with the location that is pointed at.
  grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
  const cells = Array.from({ length: rows * columns }, () => document.createElement("span"));
  for (let row = 0; row < rows; row++) {
    const line = document.createElement("div");
    line.setAttribute("role", "row");
    line.append(...cells.slice(row * columns, (row + 1) * columns));
    grid.append(line);
  }
  cells.forEach((cell, i) => {
    cell.setAttribute("role", "gridcell");
    cell.tabIndex = i ? -1 : 0;
    cell.addEventListener("pointerenter", () => tell(i));
    cell.addEventListener("click", () => cell.focus());
    cell.addEventListener("focus", () => {
      cells.forEach((other, j) => { other.tabIndex = j === i ? 0 : -1; });
      tell(i);
    });
    cell.addEventListener("keydown", (event) => {
      const row = Math.floor(i / columns), column = i % columns;
      const to = {
        ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
        ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      }[event.key];
      if (!to) return;
      event.preventDefault();
      if (to[0] >= 0 && to[0] < rows && to[1] >= 0 && to[1] < columns) cells[to[0] * columns + to[1]].focus();
    });
  });
  return cells;
}

function paint(cells, labels, legend, most = Infinity) {
  // Colours, and below them which classes there are, the most frequent first, and not more than `most`.
  const counts = new Map();
  labels.forEach((label, i) => {
    counts.set(label, (counts.get(label) ?? 0) + 1);
    cells[i].style.backgroundColor = colour(label);
    cells[i].dataset.label = label;
    cells[i].setAttribute("aria-label", name(label));
    cells[i].title = name(label);
  });
  const sorted = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const entries = sorted.slice(0, most).map(([label, count]) => {
    const item = document.createElement("li"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = colour(label);
    item.append(swatch, `${name(label)}: ${count} of ${labels.length}`);
    return item;
  });
  if (sorted.length > most) {
    const rest = document.createElement("li");
    rest.textContent = `and ${sorted.length - most} more`;
    entries.push(rest);
  }
  legend.replaceChildren(...entries);
}

byId("labels").addEventListener("change", (event) => {
  byId("gallery").classList.toggle("plain", !event.target.checked);
});
byId("strength").addEventListener("input", (event) => {
  document.documentElement.style.setProperty("--strength", event.target.value / 100);
});
for (const swatch of document.querySelectorAll("[data-class]")) {
  swatch.style.background = colour(Number(swatch.dataset.class));
}
