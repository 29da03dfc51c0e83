"use strict";
{
  const tip = document.querySelector(".tip");
  const off = new Set();

  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, document.documentElement.clientWidth - width - 8))}px`;
    tip.style.top = `${y > height + 24 ? y - height - 14 : y + 18}px`;
  };
  const hush = () => { tip.hidden = true; };

  // The legend: what belongs to hidden runs alone is hidden, all over the page; a class r3 or n3 says that it belongs to run 3.
  const hidden = (classes) => {
    const runs = classes.split(" ").filter((name) => /^[rn]\d$/.test(name));
    return runs.length > 0 && runs.every((name) => off.has(name[1]));
  };
  const owned = [...document.querySelectorAll("header [class], main [class]")];
  for (const button of document.querySelectorAll("[data-run]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      off[shown ? "delete" : "add"](button.dataset.run);
      for (const thing of owned) thing.classList.toggle("off", hidden(thing.getAttribute("class")));
    });
  }

  // What was drafted wrongly, inside the texts.
  for (const button of document.querySelectorAll("[data-refusals]")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      button.closest("figure").classList.toggle("refusals", shown);
    });
  }

  // Tabs: one pane at a time; arrows move between them.
  for (const list of document.querySelectorAll("[role=tablist]")) {
    const tabs = [...list.querySelectorAll("[role=tab]")];
    const choose = (chosen) => {
      for (const tab of tabs) {
        tab.setAttribute("aria-selected", String(tab === chosen));
        tab.tabIndex = tab === chosen ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
      }
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => choose(tab));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (step) {
          const next = tabs[(place + step + tabs.length) % tabs.length];
          choose(next);
          next.focus();
        }
      });
    });
    choose(tabs[0]);
  }

  // Over a chart, the pointer or the arrow keys choose a place; each line says its value at the nearest of its points.
  for (const svg of document.querySelectorAll("svg[data-series]")) {
    const series = JSON.parse(svg.dataset.series);
    const cursor = svg.querySelector(".cursor");
    const { width, height } = svg.viewBox.baseVal;
    const shown = () => series.filter((one) => !hidden(one.class));
    const nearest = (points, x) => points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
    let place = null;
    const leave = () => { place = null; cursor.replaceChildren(); hush(); };
    const choose = (x, left, top) => {
      const seen = shown();
      const places = seen.flatMap(({ points }) => points);
      if (places.length === 0) { leave(); return; }
      const at = nearest(places, x);
      place = at[0];
      const line = document.createElementNS(svg.namespaceURI, "line");
      for (const [name, value] of Object.entries({ x1: place, x2: place, y1: 22, y2: height - 40 })) line.setAttribute(name, value);
      cursor.replaceChildren(line);
      const words = seen.map(({ name, level, points }) => {
        if (level) return `${name}: ${level}`;
        const point = nearest(points, place);
        return `${name}: ${point[3]}${point[2] === at[2] ? "" : ` (at ${point[2]})`}`;
      });
      say([`${svg.dataset.x} ${at[2]}`, ...words].join("\n"), left, top);
    };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("pointermove", (event) => {
      if (event.target.dataset.tip) { cursor.replaceChildren(); return; }
      const box = svg.getBoundingClientRect();
      choose((event.clientX - box.left) * width / box.width, event.clientX, event.clientY);
    });
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const places = [...new Set(shown().flatMap(({ points }) => points.map(([x]) => x)))].sort((a, b) => a - b);
      const now = place === null ? (step > 0 ? -1 : places.length) : places.indexOf(place);
      const x = places[Math.min(Math.max(now + step, 0), places.length - 1)];
      const box = svg.getBoundingClientRect();
      choose(x, box.left + x * box.width / width, box.top + box.height / 2);
    });
  }

  document.addEventListener("pointerover", (event) => {
    const thing = event.target.closest("[data-tip]");
    if (thing) say(thing.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest("svg[data-series]")) hush();
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hush(); });
}
