(() => {
  // shown.students[s].views[i]: the class that student s predicts at each location of view i, row by row.
  const slider = byId("at"), status = byId("status");
  const views = [...document.querySelectorAll("[data-view]")].map((figure) => {
    const number = Number(figure.dataset.view);
    const locations = shown.views[number], predicted = shown.students.map((student) => student.views[number]);
    const readout = figure.querySelector(".readout");
    const read = (i) => {
      const students = predicted.map((labels, s) => `; ${shown.students[s].name}: ${name(labels[i])}`);
      readout.textContent = `${positionOf(i)}teacher: ${spans(locations[i])}${students.join("")}`;
    };
    const panels = [...figure.querySelectorAll("[data-panel]")].map((panel) => ({
      stage: layCells(panel.querySelector(".locations"), read),
      legend: panel.querySelector(".legend"),
      share: panel.querySelector(".share"),
    }));
    return { locations, predicted, panels, contents: classesOf(figure) };
  });

  function draw() {
    const r = 1 - Number(slider.value) / 100;
    const agreed = shown.students.map(() => 0);
    let all = 0;
    for (const { locations, predicted, contents, panels: [teacher, ...students] } of views) {
      const labels = locations.map((location) => labelAt(location, r));
      paint(teacher.stage, labels, contents, teacher.legend);
      students.forEach(({ stage, legend, share }, s) => {
        paint(stage, predicted[s], contents, legend);
        const same = labels.map((label, i) => label === predicted[s][i]);
        stage.cells.forEach((cell, i) => cell.classList.toggle("same", same[i]));
        const count = same.filter(Boolean).length;
        share.textContent = `agrees at ${count} of ${labels.length}`;
        agreed[s] += count;
      });
      all += labels.length;
    }
    const students = shown.students.map(({ name }, s) => `${name} agrees at ${percent(agreed[s] / all)}`);
    slider.setAttribute("aria-valuetext", `r = ${r.toFixed(2)}`);
    status.textContent = `r = ${r.toFixed(2)}: ${students.join(", ")} of ${all} locations.`;
  }

  slider.addEventListener("input", draw);
  draw();
})();
