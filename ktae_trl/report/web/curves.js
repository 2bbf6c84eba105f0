// Curves: a strip of small ones above the groups, which unfolds into charts.

const CHART = { width: 320, height: 166, left: 38, right: 14, top: 6, bottom: 34 };
const SPARK = { width: 84, height: 22, left: 1, right: 1, top: 2, bottom: 2 };

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// About `most` round numbers from low to high. Steps of an optimizer are whole numbers.
function ticks(low, high, most, whole = false) {
  const rough = Math.max((high - low) / most, whole ? 1 : 1e-12);
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => power * factor >= rough * (1 - 1e-9));
  const digits = Math.max(0, -Math.floor(Math.log10(size) + 1e-9));
  const found = [];
  for (let i = Math.ceil(low / size - 1e-9); i * size <= high + size * 1e-9; i++)
    found.push({ at: i * size, text: minus((i * size).toFixed(digits)) });
  return found;
}

// The ranges of a panel's steps and values, and the functions that place them in a box.
function placed(panel, box) {
  const [xs, ys] = ["x", "y"].map((axis) => panel.traces.flatMap((trace) => trace[axis]));
  const [first, last] = [Math.min(...xs), Math.max(...xs)];
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  const margin = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  [low, high] = [low - margin, high + margin];
  const x = (step) => box.left + ((step - first) / (last - first || 1)) * (box.width - box.left - box.right);
  const y = (value) => box.height - box.bottom - ((value - low) / (high - low)) * (box.height - box.top - box.bottom);
  return { first, last, low, high, x, y };
}

const namesOf = (panel) => [...new Set(panel.traces.map((trace) => trace.name))];

function lines(panel, { x, y }, markers) {
  const names = namesOf(panel);
  return panel.traces.flatMap((trace) => {
    const points = trace.x.map((step, i) => [x(step).toFixed(1), y(trace.y[i]).toFixed(1)]);
    const style = `--curve: var(--c${names.indexOf(trace.name) % 5})`;
    const line = svg("polyline", {
      class: `curve${trace.evaluated ? " dotted" : ""}`,
      points: points.join(" "),
      style,
    });
    const dots =
      markers && points.length < 20
        ? points.map(([cx, cy]) => svg("circle", { class: "dot", cx, cy, r: 2, style }))
        : [];
    return [line, ...dots];
  });
}

function spark(panel) {
  const { width, height } = SPARK;
  const main = panel.traces.find((trace) => !trace.evaluated) ?? panel.traces[0];
  const last = panel.traces.length > 1 && namesOf(panel).length > 1 ? "" : ` ${brief(main.y.at(-1), 3)}`;
  return make(
    "span",
    { className: "spark" },
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" },
      ...lines(panel, placed(panel, SPARK), false),
    ),
    make("span", {}, panel.title, make("b", { textContent: last })),
  );
}

function caption(panel) {
  const names = namesOf(panel);
  const keys = names.map((name, i) => {
    const line = make("i");
    line.style.borderColor = `var(--c${i % 5})`;
    return make("span", {}, line, name);
  });
  const heldOut = panel.traces.some((trace) => trace.evaluated);
  return make(
    "figcaption",
    {},
    make("b", { textContent: panel.title }),
    ...(names.length > 1 ? keys : []),
    heldOut ? make("span", {}, make("i", { className: "dotted" }), "held-out") : null,
  );
}

function chart(panel) {
  const { width, height, left, right, top, bottom } = CHART;
  const place = placed(panel, CHART);
  const { first, last, low, high, x, y } = place;
  const text = (className, atX, atY, content) => {
    const element = svg("text", { class: className, x: atX, y: atY });
    element.textContent = content;
    return element;
  };
  const grid = ticks(low, high, 5).flatMap(({ at, text: value }) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }),
    text("value", left - 5, y(at) + 3.5, value),
  ]);
  const steps = ticks(first, last, 5, true).map(({ at, text: step }) =>
    text("step", x(at), height - bottom + 14, step),
  );
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const ends = panel.traces.map(
    (trace) =>
      `${trace.name}${trace.evaluated ? ", held-out" : ""}: ${brief(trace.y[0])} at step ${trace.x[0]}, ` +
      `${brief(trace.y.at(-1))} at step ${trace.x.at(-1)}`,
  );
  const drawing = svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${panel.title}. ${ends.join("; ")}` },
    ...grid,
    ...steps,
    text("axis", (left + width - right) / 2, height - 4, "optimizer step"),
    ...lines(panel, place, true),
    cursor,
  );
  const told = make("p", { className: "told", textContent: "\u00a0" });
  const all = [...new Set(panel.traces.flatMap((trace) => trace.x))];
  drawing.addEventListener("pointermove", (event) => {
    const own = drawing.getBoundingClientRect();
    const at = ((event.clientX - own.left) / own.width) * width;
    const step = all.reduce((best, next) => (Math.abs(x(next) - at) < Math.abs(x(best) - at) ? next : best));
    const values = panel.traces.flatMap((trace) => {
      const i = trace.x.indexOf(step);
      return i < 0
        ? []
        : [
            `${namesOf(panel).length > 1 ? `${trace.name} ` : ""}${trace.evaluated ? "held-out " : ""}${brief(trace.y[i])}`,
          ];
    });
    told.textContent = `step ${step}: ${values.join(", ")}`;
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    cursor.setAttribute("visibility", "visible");
  });
  drawing.addEventListener("pointerleave", () => {
    told.textContent = "\u00a0";
    cursor.setAttribute("visibility", "hidden");
  });
  return make("figure", {}, caption(panel), drawing, told);
}

function drawCurves() {
  $("sparks").append(...index.panels.map(spark));
  let drawn = false;
  folding("curves", () => {
    if (!drawn) $("curves").append(...index.panels.map(chart));
    drawn = true;
  });
}

// A button of the strip unfolds the box of the same name. `opened` runs each time.
function folding(name, opened = () => {}) {
  const button = $(`${name}-open`);
  button.hidden = false;
  button.onclick = () => {
    const open = button.ariaExpanded !== "true";
    button.ariaExpanded = String(open);
    $(name).hidden = !open;
    if (open) opened();
  };
}
