(() => {
  const drive = byId("drive"), slider = byId("at"), status = byId("status");

  let last = 1;  // the r chosen last; the epochs of a schedule only approximate it

  function ratio() {
    const value = Number(slider.value);
    return drive.value === "r" ? 1 - value / 100 : shown.schedules[drive.value][value];
  }

  const views = [...document.querySelectorAll("[data-view]")].map((figure) => {
    const locations = shown.views[Number(figure.dataset.view)];
    const readout = figure.querySelector(".readout");
    const read = (i) => { readout.textContent = positionOf(i) + spans(locations[i]); };
    return {
      locations,
      contents: classesOf(figure),
      stage: layCells(figure.querySelector(".locations"), read),
      legend: figure.querySelector(".legend"),
      shares: figure.querySelector(".shares"),
      image: figure.querySelector("img"),
    };
  });

  for (const row of document.querySelectorAll("[data-moments]")) {
    const { locations, contents, image } = views[Number(row.dataset.moments)];
    for (const figure of row.querySelectorAll("[data-r]")) {
      const classes = ranked(locations.map((location) => labelAt(location, Number(figure.dataset.r))), contents);
      const copy = figure.querySelector("img");
      copy.src = image.src;
      copy.alt = image.alt;
      drawOutlines(figure.querySelector(".outlines"), classes);
      figure.querySelector(".summary").textContent = counted(classes).map(({ text }) => text).join(", ");
    }
  }

  function draw() {
    const r = ratio(), value = Number(slider.value);
    const epoch = drive.value === "r" ? "" : `epoch ${value + 1} of ${shown.epochs}, `;
    const agreement = shown.agreement[Math.round(100 * r)];
    slider.setAttribute("aria-valuetext", `${epoch}r = ${r.toFixed(2)}`);
    status.textContent =
      `${epoch}r = ${r.toFixed(2)}: ${percent(agreement)} of locations agree with the larger image's class.`;
    for (const { locations, contents, stage, legend, shares } of views) {
      paint(stage, locations.map((location) => labelAt(location, r)), contents, legend, shares);
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
  draw();
})();
