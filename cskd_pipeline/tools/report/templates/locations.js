"use strict";
// Shared by the pages of caches and of runs, and run before their own scripts.
// shown.views[i]: for each location, row by row, [c0, q1, c1, q2, c2, ...]; class c1 takes over at r = (q1 + 0.5) / N.
const shown = JSON.parse(document.getElementById("data").textContent);
const N = 65535;
const [rows, columns] = shown.grid;
const byId = (id) => document.getElementById(id);
const name = (label) => shown.names[label] ?? `class ${label}`;
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const positionOf = (i) => `Row ${Math.floor(i / columns) + 1}, column ${(i % columns) + 1}: `;
const classesOf = (figure) => figure.dataset.classes.split(" ").map(Number);
const NAMED = 4;  // classes outlined and named on a view, its own included
const SMALLEST = 1 / 16;  // share of a view's locations from which another class is outlined

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function labelAt(location, r) {
  const t = Math.ceil(r * N - 0.5);
  let label = location[0];
  for (let i = 1; i < location.length && location[i] < t; i += 2) label = location[i + 1];
  return label;
}

function spans(location) {
  // In training order: from the local label at r = 1 to the global one at r = 0.
  const found = [];
  for (let i = 0; i < location.length; i += 2) {
    const from = i ? (location[i - 1] + 0.5) / N : 0;
    const to = i + 1 < location.length ? (location[i + 1] + 0.5) / N : 1;
    found.unshift(`${name(location[i])} (r ${from.toFixed(2)} to ${to.toFixed(2)})`);
  }
  return found.join(", then ");
}

function layCells(grid, read) {
  // One cell per location; arrow keys move, and `read` is called with the location pointed at or focused.
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
    cell.addEventListener("pointerenter", () => read(i));
    cell.addEventListener("click", () => cell.focus());
    cell.addEventListener("focus", () => {
      cells.forEach((other, j) => { other.tabIndex = j === i ? 0 : -1; });
      read(i);
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
  const outlines = element("div", "outlines");
  grid.before(outlines);
  return { cells, outlines };
}

function ranked(labels, [own, partner]) {
  // The classes among the labels, each with its kind and locations: the view's own, its partner's, then by size.
  const found = new Map();
  labels.forEach((label, i) => found.set(label, [...(found.get(label) ?? []), i]));
  const kindOf = (label) => (label === own ? "own" : label === partner ? "partner" : "other");
  const order = { own: 0, partner: 1, other: 2 };
  const classes = [...found].map(([label, at]) => ({ label, at, kind: kindOf(label) }))
    .sort((a, b) => order[a.kind] - order[b.kind] || b.at.length - a.at.length || a.label - b.label);
  classes.forEach((one, i) => {
    if (one.kind === "other" && (i >= NAMED || one.at.length < SMALLEST * labels.length)) one.kind = "rest";
  });
  return classes;
}

function outline(at) {
  // The border of a set of locations, slightly inset, with round corners: an SVG path, 100 units per location.
  const inside = new Set(at), inset = 5, round = 14;
  const has = (x, y) => x >= 0 && x < columns && inside.has(y * columns + x);
  const edges = new Set();  // a corner and a direction, with the inside on its right
  for (const i of at) {
    const x = i % columns, y = Math.floor(i / columns);
    if (!has(x, y - 1)) edges.add([x, y, 1, 0].join());
    if (!has(x + 1, y)) edges.add([x + 1, y, 0, 1].join());
    if (!has(x, y + 1)) edges.add([x + 1, y + 1, -1, 0].join());
    if (!has(x - 1, y)) edges.add([x, y + 1, 0, -1].join());
  }
  let path = "";
  for (const first of edges) {
    let edge = first, [x, y, dx, dy] = first.split(",").map(Number);
    const corners = [];
    do {
      x += dx; y += dy;
      const [ex, ey] = [[-dy, dx], [dx, dy], [dy, -dx]].find((way) => edges.has([x, y, ...way].join()));
      if (ex !== dx || ey !== dy) {
        const px = 100 * x - inset * (dy + ey), py = 100 * y + inset * (dx + ex);
        corners.push(`${px - round * dx} ${py - round * dy}Q${px} ${py} ${px + round * ex} ${py + round * ey}`);
      }
      if (edge !== first) edges.delete(edge);
      [dx, dy] = [ex, ey];
      edge = [x, y, dx, dy].join();
    } while (edge !== first);
    edges.delete(first);
    path += `M${corners.join("L")}Z`;
  }
  return path;
}

function anchors(at) {
  // Positions for a name: the locations of the largest connected part, from its centre outwards.
  const left = new Set(at);
  let part = [];
  for (const start of at) {
    if (!left.delete(start)) continue;
    const found = [start];
    for (const i of found) {
      const x = i % columns;
      for (const j of [x ? i - 1 : -1, x < columns - 1 ? i + 1 : -1, i - columns, i + columns]) {
        if (left.delete(j)) found.push(j);
      }
    }
    if (found.length > part.length) part = found;
  }
  const points = part.map((i) => [(i % columns) + 0.5, Math.floor(i / columns) + 0.5]);
  const mean = (k) => points.reduce((sum, point) => sum + point[k], 0) / points.length;
  const [mx, my] = [mean(0), mean(1)];
  const away = ([x, y]) => (x - mx) ** 2 + (y - my) ** 2;
  return points.sort((a, b) => away(a) - away(b)).map(([x, y]) => [x / columns, y / rows]);
}

function putNames(outlines) {
  // Place each name inside the view, clear of the names before it; one without room is only in the legend.
  const { width, height } = outlines.getBoundingClientRect(), taken = [];
  for (const tag of outlines.querySelectorAll(".name")) {
    const w = tag.offsetWidth / 2 + 2, h = tag.offsetHeight / 2 + 2;
    const within = (value, half, size) => Math.min(Math.max(value, half), size - half);
    const free = JSON.parse(tag.dataset.anchors)
      .map(([x, y]) => [within(x * width, w, width), within(y * height, h, height)])
      .find(([x, y]) => taken.every(([tx, ty, tw, th]) => Math.abs(x - tx) > w + tw || Math.abs(y - ty) > h + th));
    tag.hidden = !free;
    if (!free) continue;
    taken.push([...free, w, h]);
    tag.style.left = `${free[0]}px`;
    tag.style.top = `${free[1]}px`;
  }
}
const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => putNames(target)));

function drawOutlines(outlines, classes) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${100 * columns} ${100 * rows}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const outlined = classes.filter(({ kind }) => kind !== "rest");
  for (const { at, kind } of [...outlined].reverse()) {
    const d = outline(at);
    for (const look of ["casing ", ""]) {
      const path = document.createElementNS(svg.namespaceURI, "path");
      path.setAttribute("class", look + kind);
      path.setAttribute("d", d);
      svg.append(path);
    }
  }
  const tags = outlined.map(({ label, at, kind }) => {
    const tag = element("span", `name ${kind}`, name(label));
    tag.dataset.anchors = JSON.stringify(anchors(at));
    return tag;
  });
  outlines.replaceChildren(svg, ...tags);
  resized.unobserve(outlines);
  resized.observe(outlines);  // places the names once they have a size
}

function counted(classes) {
  // Lines of the legend, "tench 20", ..., "other 14", with their kinds and counts of locations.
  const lines = classes.filter(({ kind }) => kind !== "rest")
    .map(({ label, at, kind }) => ({ kind, text: `${name(label)} ${at.length}`, count: at.length }));
  const count = classes.reduce((sum, { kind, at }) => sum + (kind === "rest" ? at.length : 0), 0);
  return count ? [...lines, { kind: "rest", text: `other ${count}`, count }] : lines;
}

function paint({ cells, outlines }, labels, contents, legend, shares) {
  // Draw outlines and names on the view, and the number of locations of each class below it.
  if (outlines.dataset.drawn === labels.join()) return;
  outlines.dataset.drawn = labels.join();
  const classes = ranked(labels, contents);
  drawOutlines(outlines, classes);
  labels.forEach((label, i) => {
    if (cells[i].dataset.label === String(label)) return;
    cells[i].dataset.label = label;
    cells[i].setAttribute("aria-label", name(label));
    cells[i].title = name(label);
  });
  const lines = counted(classes);
  legend.replaceChildren(...lines.map(({ kind, text }) => {
    const item = element("li", "");
    item.append(element("span", `swatch ${kind}`), text);
    return item;
  }), element("li", "of", `of ${labels.length} locations`));
  shares?.replaceChildren(...lines.map(({ kind, count }) => {
    const part = element("span", `part ${kind}`);
    part.style.flex = count;
    return part;
  }));
}

byId("labels").addEventListener("change", (event) => {
  document.body.classList.toggle("plain", !event.target.checked);
});

{
  // From local to global in eight seconds; with reduced motion in ten steps of one second.
  const slider = byId("at"), button = byId("play"), reduced = matchMedia("(prefers-reduced-motion: reduce)");
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    button.firstElementChild.textContent = "▶";
    button.setAttribute("aria-label", "play from local to global");
  };
  const step = (share) => {
    slider.value = Math.min(Number(slider.max), Number(slider.value) + Math.max(1, share * slider.max));
    slider.dispatchEvent(new Event("input"));
    if (Number(slider.value) >= Number(slider.max)) stop();
  };
  button.addEventListener("click", () => {
    if (timer) { stop(); return; }
    if (Number(slider.value) >= Number(slider.max)) slider.value = 0;
    button.firstElementChild.textContent = "❚❚";
    button.setAttribute("aria-label", "pause");
    timer = reduced.matches ? setInterval(step, 1000, 0.1) : setInterval(step, 80, 0.01);
  });
  slider.addEventListener("pointerdown", stop);
  slider.addEventListener("keydown", stop);
}
