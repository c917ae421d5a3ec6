/* Draws the figures: resolves colour names from the style sheet, follows light and dark, dims all but one domain. */
(() => {
  "use strict";
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null; // a theme the reader asked for; null follows the system
  let focus = null; // the colour name of the domain that stands out; null shows all alike

  let paper = false; // on paper the width is that of the page, which cannot be measured before printing
  const WIDTH_PX = 640, PANEL_PX = 310;

  const MARK = "\u0001";
  let sheet = new Map();
  function rgb(name) {
    if (!sheet.has(name)) {
      const hex = getComputedStyle(root).getPropertyValue("--" + name).trim();
      sheet.set(name, [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(","));
    }
    return sheet.get(name);
  }
  function resolve(value) {
    if (typeof value === "string" && value.startsWith(MARK)) {
      const [name, opacity] = value.slice(1).split("/");
      const dim = focus !== null && /^d\d+$/.test(name) && name !== focus ? 0.14 : 1;
      return `rgba(${rgb(name)},${(opacity === undefined ? 1 : Number(opacity)) * dim})`;
    }
    if (Array.isArray(value)) return value.map(resolve);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v)]));
    }
    return value;
  }
  function merge(base, more) {
    const out = { ...base };
    for (const [k, v] of Object.entries(more)) {
      const both = v && typeof v === "object" && !Array.isArray(v) && out[k] && typeof out[k] === "object";
      out[k] = both ? merge(out[k], v) : v;
    }
    return out;
  }
  const axis = {
    gridcolor: MARK + "grid", linecolor: MARK + "line", tickcolor: MARK + "line", zeroline: false, automargin: true,
    tickfont: { color: MARK + "quiet", size: 11.5 }, title: { font: { color: MARK + "quiet", size: 12.5 }, standoff: 10 },
  };
  const base = {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: MARK + "ink" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 62, r: 44, t: 24, b: 44 },
    hoverlabel: { bgcolor: MARK + "paper", bordercolor: MARK + "line", font: { color: MARK + "ink", size: 12.5 } },
    xaxis: { ...axis, showgrid: false, showline: true, ticks: "outside", ticklen: 4 }, yaxis: axis, dragmode: "zoom",
  };
  const config = { responsive: true, displayModeBar: false };

  function draw() {
    const asked = chosen ?? (dark.matches ? "dark" : "light");
    if (root.dataset.theme !== asked) root.dataset.theme = asked;
    sheet = new Map();
    for (const figure of figures) {
      const box = document.getElementById("plot-" + figure.id);
      const defaults = figure.layout.yaxis2 ? { ...base, yaxis2: axis } : base;
      const width = paper ? (box.closest(".panels") ? PANEL_PX : WIDTH_PX) : undefined;
      const size = { height: figure.height, width, autosize: !paper };
      const layout = resolve(merge(defaults, { ...figure.layout, ...size }));
      Plotly.react(box, resolve(figure.data), layout, config);
    }
  }
  document.getElementById("theme").addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    draw();
  });
  for (const button of document.querySelectorAll(".key button")) {
    button.addEventListener("click", () => {
      focus = focus === button.dataset.colour ? null : button.dataset.colour;
      for (const b of document.querySelectorAll(".key button")) b.setAttribute("aria-pressed", String(b.dataset.colour === focus));
      draw();
    });
  }
  dark.addEventListener("change", draw);
  let kept = null; // what the reader had chosen before printing, which is always light
  window.addEventListener("beforeprint", () => { kept = chosen; chosen = "light"; paper = true; draw(); });
  window.addEventListener("afterprint", () => { chosen = kept; paper = false; draw(); });
  draw();
})();
