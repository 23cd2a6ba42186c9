(() => {
  "use strict";
  const root = document.documentElement, tip = document.getElementById("tip");
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("headway-theme", root.dataset.theme); } catch { /* a file opened without storage */ }
  });

  const scaled = (value, base, names) => {
    let i = 0;
    while (Math.abs(value) >= base && i < names.length - 1) { value /= base; i += 1; }
    return `${+value.toPrecision(4)}${names[i]}`;
  };
  const show = (value, kind) => {
    if (kind === "bytes") return scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
    if (kind === "si") return scaled(value, 1000, ["", "k", "M", "G", "T"]);
    if (kind === "seconds") return value < 120 ? `${+value.toPrecision(4)} s` : `${+(value / 60).toPrecision(4)} min`;
    return String(+value.toPrecision(5));
  };
  const nearest = (list, value) => {
    let low = 0, high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle; else high = middle;
    }
    return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
  };
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  for (const chart of document.querySelectorAll(".chart")) {
    const data = JSON.parse(chart.querySelector("script").textContent), off = new Set();
    for (const key of chart.querySelectorAll("button.key")) {
      key.addEventListener("click", () => {
        const index = +key.dataset.s, name = data.s[index].n, hide = key.classList.toggle("off");
        data.s.forEach((series, i) => {  // a faint series is the unsmoothed form of the one that bears its name
          if (i !== index && !(series.f && series.n === name)) return;
          if (hide) off.add(i); else off.delete(i);
          for (const mark of chart.querySelectorAll(`.mark[data-s="${i}"]`)) mark.classList.toggle("off", hide);
        });
      });
    }
    for (const svg of chart.querySelectorAll("svg.plot")) {
      const [left, top, right, bottom] = svg.dataset.plot.split(",").map(Number);
      const [x0, x1, logX, y0, y1, logY] = svg.dataset.ends.split(",").map(Number);
      const hover = svg.querySelector(".hover");
      const share = (v, a, b, log) => log ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a);
      const px = x => left + share(x, x0, x1, logX) * (right - left);
      const py = y => bottom - share(y, y0, y1, logY) * (bottom - top);
      const leave = () => { hover.replaceChildren(); tip.style.visibility = "hidden"; };
      svg.addEventListener("pointerleave", leave);
      svg.addEventListener("pointermove", event => {
        const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
        const part = (at - left) / (right - left);
        if (part < -0.02 || part > 1.02) return leave();
        const wanted = logX ? x0 * Math.pow(x1 / x0, part) : x0 + part * (x1 - x0);
        const rows = [];
        let x = null;
        data.s.forEach((series, i) => {
          if (off.has(i) || series.f || !series.x.length) return;
          const j = nearest(series.x, wanted);
          rows.push([series, series.x[j], series.y[j]]);
          if (x === null || Math.abs(series.x[j] - wanted) < Math.abs(x - wanted)) x = series.x[j];
        });
        if (x === null) return leave();
        const marks = [make("line", { x1: px(x), x2: px(x), y1: top, y2: bottom })];
        const text = document.createElement("div");
        text.append(data.names.length ? data.names[Math.round(x)] ?? "" : `${show(x, data.xf)} ${data.xl}`);
        for (const [series, sx, sy] of rows) {
          if (Math.abs(px(sx) - px(x)) > 12) continue;
          const circle = make("circle", { cx: px(sx), cy: Math.min(Math.max(py(sy), top), bottom), r: 4 });
          circle.style.setProperty("--c", `var(--s${series.c})`);
          marks.push(circle);
          const row = document.createElement("div"), dot = document.createElement("i"), value = document.createElement("b");
          dot.className = "dot";
          dot.style.setProperty("--c", `var(--s${series.c})`);
          value.textContent = show(sy, data.yf);
          row.append(value, dot, series.n);
          text.append(row);
        }
        hover.replaceChildren(...marks);
        tip.replaceChildren(...text.childNodes);
        tip.style.visibility = "visible";
        const space = tip.getBoundingClientRect(), flip = event.clientX + space.width + 24 > innerWidth;
        tip.style.left = `${Math.max(4, flip ? event.clientX - space.width - 14 : event.clientX + 14)}px`;
        tip.style.top = `${Math.max(4, Math.min(event.clientY - space.height / 2, innerHeight - space.height - 4))}px`;
      });
    }
  }
})();
