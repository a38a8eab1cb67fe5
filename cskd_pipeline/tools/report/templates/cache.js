(() => {
  const drive = byId("drive"), slider = byId("at"), status = byId("status");

  let last = 1;  // the r chosen last; a schedule's epochs only come near it

  function ratio() {
    const value = Number(slider.value);
    return drive.value === "r" ? 1 - value / 100 : shown.schedules[drive.value][value];
  }

  const views = [...document.querySelectorAll("[data-view]")].map((figure) => {
    const locations = shown.views[Number(figure.dataset.view)];
    const here = figure.querySelector(".here");
    const tell = (i) => { here.textContent = where(i) + spans(locations[i]); };
    const cells = layCells(figure.querySelector(".locations"), tell);
    return { locations, cells, legend: figure.querySelector(".legend") };
  });

  function draw() {
    const r = ratio(), value = Number(slider.value);
    const epoch = drive.value === "r" ? "" : `epoch ${value + 1} of ${shown.epochs}, `;
    const agreement = shown.agreement[Math.round(100 * r)];
    slider.setAttribute("aria-valuetext", `${epoch}r = ${r.toFixed(2)}`);
    status.textContent =
      `${epoch}r = ${r.toFixed(2)}: ${percent(agreement)} of all locations have the class of the larger image.`;
    for (const { locations, cells, legend } of views) paint(cells, locations.map((location) => labelAt(location, r)), legend);
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
