
"use strict";
(() => {
  // shown.views[i]: for each place, row by row, [c0, q1, c1, q2, c2, ...]: class c1 takes over at r = (q1 + 0.5) / N.
  const shown = JSON.parse(document.getElementById("data").textContent);
  const N = 65535;
  const [rows, columns] = shown.grid;
  const byId = (id) => document.getElementById(id);
  const drive = byId("drive"), slider = byId("at"), told = byId("told");

  let last = 1;  // the r that was asked for, which a schedule's epochs meet only nearly

  const name = (label) => shown.names[label] ?? `class ${label}`;
  const colour = (label) => `hsl(${(label * 137.508) % 360} 75% 52%)`;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function labelAt(place, r) {
    const t = Math.ceil(r * N - 0.5);
    let label = place[0];
    for (let i = 1; i < place.length && place[i] < t; i += 2) label = place[i + 1];
    return label;
  }

  function spans(place) {
    // In the order of training: from the local label, r = 1, to the global one, r = 0.
    const found = [];
    for (let i = 0; i < place.length; i += 2) {
      const from = i ? (place[i - 1] + 0.5) / N : 0;
      const to = i + 1 < place.length ? (place[i + 1] + 0.5) / N : 1;
      found.unshift(`${name(place[i])} (r ${from.toFixed(2)} to ${to.toFixed(2)})`);
    }
    return found.join(", then ");
  }

  function ratio() {
    const value = Number(slider.value);
    return drive.value === "r" ? 1 - value / 100 : shown.schedules[drive.value][value];
  }

  const views = [...document.querySelectorAll("[data-view]")].map((figure) => {
    const places = shown.views[Number(figure.dataset.view)];
    const grid = figure.querySelector(".places");
    const here = figure.querySelector(".here");
    grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    const cells = places.map(() => document.createElement("span"));
    for (let row = 0; row < rows; row++) {
      const line = document.createElement("div");
      line.setAttribute("role", "row");
      line.append(...cells.slice(row * columns, (row + 1) * columns));
      grid.append(line);
    }
    const tell = (i) => {
      const at = `Row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}: `;
      here.textContent = at + spans(places[i]);
    };
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
    return { places, cells, legend: figure.querySelector(".legend") };
  });

  function entry(label, count, all) {
    const item = document.createElement("li"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = colour(label);
    item.append(swatch, `${name(label)}: ${count} of ${all}`);
    return item;
  }

  function draw() {
    const r = ratio(), value = Number(slider.value);
    const epoch = drive.value === "r" ? "" : `epoch ${value + 1} of ${shown.epochs}, `;
    const agreement = shown.agreement[Math.round(100 * r)];
    slider.setAttribute("aria-valuetext", `${epoch}r = ${r.toFixed(2)}`);
    told.textContent =
      `${epoch}r = ${r.toFixed(2)}: ${percent(agreement)} of all places have the class of the larger picture.`;
    for (const { places, cells, legend } of views) {
      const counts = new Map();
      places.forEach((place, i) => {
        const label = labelAt(place, r);
        counts.set(label, (counts.get(label) ?? 0) + 1);
        cells[i].style.background = colour(label);
        cells[i].dataset.label = label;
        cells[i].setAttribute("aria-label", name(label));
        cells[i].title = name(label);
      });
      const sorted = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
      legend.replaceChildren(...sorted.map(([label, count]) => entry(label, count, places.length)));
    }
  }

  drive.addEventListener("change", () => {
    const r = last;
    const steps = drive.value === "r" ? null : shown.schedules[drive.value];
    slider.max = steps ? steps.length - 1 : 100;
    const nearest = steps
      ? steps.reduce((best, value, i) => (Math.abs(value - r) < Math.abs(steps[best] - r) ? i : best), 0)
      : Math.round(100 * (1 - r));
    slider.value = nearest;
    draw();
  });
  slider.addEventListener("input", () => { last = ratio(); draw(); });
  byId("labels").addEventListener("change", (event) => {
    byId("gallery").classList.toggle("plain", !event.target.checked);
  });
  byId("strength").addEventListener("input", (event) => {
    document.documentElement.style.setProperty("--strength", event.target.value / 100);
  });
  for (const swatch of document.querySelectorAll("[data-class]")) {
    swatch.style.background = colour(Number(swatch.dataset.class));
  }
  draw();
})();
