(() => {
  const drive = byId("drive"), slider = byId("at"), told = byId("told");

  let last = 1;  // the r that was asked for, which a schedule's epochs meet only nearly

  function ratio() {
    const value = Number(slider.value);
    return drive.value === "r" ? 1 - value / 100 : shown.schedules[drive.value][value];
  }

  const views = [...document.querySelectorAll("[data-view]")].map((figure) => {
    const places = shown.views[Number(figure.dataset.view)];
    const here = figure.querySelector(".here");
    const tell = (i) => { here.textContent = where(i) + spans(places[i]); };
    const cells = layCells(figure.querySelector(".places"), tell);
    return { places, cells, legend: figure.querySelector(".legend") };
  });

  function draw() {
    const r = ratio(), value = Number(slider.value);
    const epoch = drive.value === "r" ? "" : `epoch ${value + 1} of ${shown.epochs}, `;
    const agreement = shown.agreement[Math.round(100 * r)];
    slider.setAttribute("aria-valuetext", `${epoch}r = ${r.toFixed(2)}`);
    told.textContent =
      `${epoch}r = ${r.toFixed(2)}: ${percent(agreement)} of all places have the class of the larger picture.`;
    for (const { places, cells, legend } of views) paint(cells, places.map((place) => labelAt(place, r)), legend);
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
