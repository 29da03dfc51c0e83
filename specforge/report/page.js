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

  // The legend: a run and everything of its class, all over the page.
  for (const button of document.querySelectorAll("[data-run]")) {
    const name = button.dataset.run;
    const things = document.querySelectorAll(`main .${name}, main .n${name.slice(1)}`);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      off[shown ? "delete" : "add"](name);
      for (const thing of things) thing.classList.toggle("off", !shown);
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

  // The pointer over a chart finds the nearest place of its lines, and says their values there.
  for (const svg of document.querySelectorAll("svg[data-series]")) {
    const series = JSON.parse(svg.dataset.series);
    const cursor = svg.querySelector(".cursor");
    const leave = () => { cursor.replaceChildren(); hush(); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      if (event.target.dataset.tip) { cursor.replaceChildren(); return; }
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      const seen = series.filter((one) => !off.has(one.class));
      let nearest = null;
      for (const { points } of seen) {
        for (const point of points) {
          if (nearest === null || Math.abs(point[0] - x) < Math.abs(nearest[0] - x)) nearest = point;
        }
      }
      if (nearest === null) { leave(); return; }
      const line = document.createElementNS(svg.namespaceURI, "line");
      for (const [name, value] of Object.entries({ x1: nearest[0], x2: nearest[0], y1: 22, y2: svg.viewBox.baseVal.height - 40 })) line.setAttribute(name, value);
      cursor.replaceChildren(line);
      const words = seen.map(({ name, class: kind, points }) => {
        const level = kind === "ngram" ? points[0] : points.find((point) => point[2] === nearest[2]);
        return level ? `${name}: ${level[3]}` : null;
      });
      say([nearest[2], ...words.filter((word) => word !== null)].join("\n"), event.clientX, event.clientY);
    });
  }

  document.addEventListener("pointerover", (event) => {
    const thing = event.target.closest("[data-tip]");
    if (thing) say(thing.dataset.tip, event.clientX, event.clientY);
    else if (!event.target.closest("svg[data-series]")) hush();
  });
}
