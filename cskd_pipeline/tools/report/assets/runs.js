(() => {
  // shown.students[s].views[i]: the class that student s says at each place of view i, row by row.
  const slider = byId("at"), told = byId("told");
  const views = [...document.querySelectorAll("[data-view]")].map((figure) => {
    const number = Number(figure.dataset.view);
    const places = shown.views[number], said = shown.students.map((student) => student.views[number]);
    const here = figure.querySelector(".here");
    const tell = (i) => {
      const students = said.map((labels, s) => `; ${shown.students[s].name}: ${name(labels[i])}`);
      here.textContent = `${where(i)}teacher: ${spans(places[i])}${students.join("")}`;
    };
    const panels = [...figure.querySelectorAll("[data-who]")].map((panel) => ({
      cells: layCells(panel.querySelector(".places"), tell),
      legend: panel.querySelector(".legend"),
      share: panel.querySelector(".share"),
    }));
    return { places, said, panels };
  });

  function draw() {
    const r = 1 - Number(slider.value) / 100;
    const agreed = shown.students.map(() => 0);
    let all = 0;
    for (const { places, said, panels: [teacher, ...students] } of views) {
      const labels = places.map((place) => labelAt(place, r));
      paint(teacher.cells, labels, teacher.legend, 5);
      students.forEach(({ cells, legend, share }, s) => {
        paint(cells, said[s], legend, 5);
        const same = labels.map((label, i) => label === said[s][i]);
        cells.forEach((cell, i) => cell.classList.toggle("same", same[i]));
        const count = same.filter(Boolean).length;
        share.textContent = `agrees at ${count} of ${labels.length}`;
        agreed[s] += count;
      });
      all += labels.length;
    }
    const students = shown.students.map(({ name }, s) => `${name} agrees at ${percent(agreed[s] / all)}`);
    slider.setAttribute("aria-valuetext", `r = ${r.toFixed(2)}`);
    told.textContent = `r = ${r.toFixed(2)}: ${students.join(", ")} of ${all} places.`;
  }

  slider.addEventListener("input", draw);
  draw();
})();
