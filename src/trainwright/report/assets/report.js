// Draws the charts of a page with uPlot. Without it the page shows the drawings that are in it (`svg.py`).
(function () {
  "use strict";
  const root = document.documentElement;
  const panels = JSON.parse(document.getElementById("data").textContent);
  const figures = Array.from(document.querySelectorAll("figure[data-panel]"));
  const tools = document.querySelector(".tools");
  const control = { smoothing: document.getElementById("smoothing"), log: document.getElementById("log") };
  let charts = [];

  const css = name => getComputedStyle(root).getPropertyValue("--" + name).trim();

  // -- numbers ---------------------------------------------------------------------------------------------------------

  function text(value) {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(3).replace(/\.?0+e/, "e");
    return Number(value.toPrecision(5)).toLocaleString("en-US", { maximumSignificantDigits: 5 });
  }

  // The exponential mean of the values so far, without the pull of its first value towards zero.
  function smoothed(values, weight) {
    let mean = 0, share = 1;
    return values.map(value => {
      mean = weight * mean + (1 - weight) * value;
      share *= weight;
      return mean / (1 - share);
    });
  }

  // -- one chart -------------------------------------------------------------------------------------------------------

  // Curves are measured at different steps: each shows its value nearest to the pointer.
  function nearest(u, series, index) {
    const values = u.data[series];
    for (let far = 0; far < values.length; far++) {
      if (values[index - far] != null) return index - far;
      if (values[index + far] != null) return index + far;
    }
    return index;
  }

  function last(values) {
    let index = values.length - 1;
    while (index > 0 && values[index] == null) index--;
    return index;
  }

  function widthOfNumbers(u, values, index, cycle) {
    const axis = u.axes[index];
    if (cycle > 1) return axis._size;
    u.ctx.font = axis.font[0];
    const widest = Math.max(0, ...(values || []).map(one => u.ctx.measureText(one || "").width));
    return Math.ceil(axis.ticks.size + axis.gap + widest / devicePixelRatio) + 2;
  }

  function ring(best) {
    return u => {
      const { left, top, width, height } = u.bbox;
      const x = u.valToPos(best.step, "x", true), y = u.valToPos(best.value, "y", true);
      if (!(x >= left - 1 && x <= left + width + 1 && y >= top - 1 && y <= top + height + 1)) return;
      const unit = devicePixelRatio, context = u.ctx;
      context.save();
      context.strokeStyle = context.fillStyle = css("c" + best.color);
      context.lineWidth = 2 * unit;
      context.beginPath();
      context.arc(x, y, 6 * unit, 0, 2 * Math.PI);
      context.stroke();
      context.font = `600 ${12 * unit}px system-ui, sans-serif`;
      // Beyond the curve: above a highest value, below a lowest one if there is room; with a rim, where another curve is.
      const words = `best ${text(best.value)}`, isLow = y > top + height * 0.5 && y + 26 * unit < top + height;
      const half = context.measureText(words).width / 2;
      const at = Math.min(Math.max(x, left + half), left + width - half), down = y + (isLow ? 9 : -9) * unit;
      context.textAlign = "center";
      context.textBaseline = isLow ? "top" : "bottom";
      context.lineWidth = 4 * unit;
      context.strokeStyle = css("card");
      context.strokeText(words, at, down);
      context.fillText(words, at, down);
      context.restore();
    };
  }

  function draw(figure) {
    const panel = panels[Number(figure.dataset.panel)];
    const holder = figure.querySelector(".chart");
    const weight = Number(control.smoothing.value);
    const isPositive = panel.curves.every(curve => curve.values.every(value => value > 0));
    const isLog = control.log.checked && isPositive;
    const tables = panel.curves.map(curve => [curve.steps, weight ? smoothed(curve.values, weight) : curve.values]);
    const measured = weight ? panel.curves.map(curve => [curve.steps, curve.values]) : [];
    const data = uPlot.join([...tables, ...measured]);
    const num = panel.curves.length;
    const isSparse = curve => curve.steps.length <= 40;

    const series = [{ label: panel.x, value: (u, value) => (value == null ? "–" : text(value)) }];
    for (const curve of panel.curves) {
      const index = series.length;
      series.push({
        label: curve.name,
        stroke: () => css("c" + curve.color),
        width: 2,
        spanGaps: true,
        points: { show: isSparse(curve), size: 6, fill: css("c" + curve.color) },
        value: (u, value, _, at) => {
          if (at == null || value == null) return "–";
          const given = weight ? `${text(u.data[num + index][at])} (smoothed ${text(value)})` : text(value);
          const step = u.data[0][at], pointed = u.cursor.idx == null ? u.data[0].length - 1 : u.cursor.idx;
          return step === u.data[0][pointed] ? given : `${given} at ${text(step)}`;
        },
      });
    }
    for (const curve of weight ? panel.curves : []) {
      series.push({
        class: "measured", stroke: () => css("c" + curve.color) + "55", width: 1, spanGaps: true, points: { show: false },
      });
    }
    const axis = { stroke: () => css("soft"), grid: { stroke: () => css("line"), width: 1 }, ticks: { show: false } };
    const label = { labelSize: 20, labelGap: 2, labelFont: "12px system-ui, sans-serif", font: "12px system-ui, sans-serif" };
    const whole = num === 0 ? 1 : Math.max(...panel.curves.map(curve => curve.steps[curve.steps.length - 1]));
    const options = {
      width: holder.clientWidth || figure.clientWidth - 20,
      height: 250,
      padding: [panel.best ? 20 : 10, 12, 0, 0],
      series,
      scales: {
        x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: isLog ? { distr: 3 } : {},
      },
      axes: [
        {
          ...axis, ...label, label: panel.x, size: 24,
          incrs: whole > 1 ? [1, 2, 5].flatMap(one => [...Array(13)].map((_, ten) => one * 10 ** ten)).sort((a, b) => a - b) : undefined,
          values: (u, values) => values.map(text),
        },
        {
          ...axis, ...label, label: panel.y, size: widthOfNumbers,
          values: (u, values) => values.map(value => (value == null ? "" : text(value))),
        },
      ],
      cursor: { sync: { key: "steps" }, dataIdx: nearest, drag: { x: true, y: false }, points: { size: 9 } },
      legend: { live: true, markers: { width: 0, fill: (u, index) => css("c" + (panel.curves[(index - 1) % num] || { color: 0 }).color) } },
      hooks: {
        draw: panel.best ? [ring(panel.best)] : [],
        setCursor: [u => { if (u.cursor.idx == null) idle(u); }],
        ready: [idle],
      },
    };
    const chart = new uPlot(options, data, holder);
    // A finger shows values as a pointer does.
    const point = event => {
      const place = chart.over.getBoundingClientRect(), finger = event.touches[0];
      chart.setCursor({ left: finger.clientX - place.left, top: finger.clientY - place.top });
    };
    chart.over.addEventListener("touchstart", point, { passive: true });
    chart.over.addEventListener("touchmove", point, { passive: true });
    return chart;
  }

  // Without a pointer the legend shows the last value of each curve.
  function idle(u) {
    u.setLegend({ idxs: u.data.map(last) }, false);
  }

  // -- the page --------------------------------------------------------------------------------------------------------

  function drawAll() {
    charts.forEach(chart => chart.destroy());
    charts = figures.map(draw);
    figures.forEach(figure => figure.classList.add("drawn"));
    remember();
  }

  function remember() {
    try {
      sessionStorage.setItem("tools", JSON.stringify([control.smoothing.value, control.log.checked]));
    } catch (error) { /* a page that was opened from a file may have no storage */ }
  }

  try {
    const [weight, isLog] = JSON.parse(sessionStorage.getItem("tools") || "[0, false]");
    control.smoothing.value = weight;
    control.log.checked = isLog;
  } catch (error) { /* the same */ }

  if (figures.length) {
    tools.hidden = false;
    drawAll();
    control.smoothing.addEventListener("input", drawAll);
    control.log.addEventListener("change", drawAll);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    let width = root.clientWidth;
    addEventListener("resize", () => {
      if (root.clientWidth !== width) {
        width = root.clientWidth;
        drawAll();
      }
    });
  }

  // `trainwright watch` serves the page: it is loaded again when there is more to show.
  if (root.dataset.watch) {
    let shown = null;
    setInterval(async () => {
      try {
        const state = await (await fetch("state", { cache: "no-store" })).text();
        if (shown !== null && shown !== state) location.reload();
        shown = state;
      } catch (error) { /* it ended */ }
    }, 2000);
  }
})();
