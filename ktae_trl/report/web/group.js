// A group: its prompt, what to colour it by, and its rollouts.

const FIRST_TOKENS = 2000; // of each text; the button adds MORE_TOKENS
const MORE_TOKENS = 10000;
const PROMPT_PIECE = 20000; // characters
const MOST_STEPS = 6; // displayed side by side
const SIDES = [
  ["right", "Correct", true],
  ["wrong", "Wrong", false],
  ["unscored", "Not graded", null],
];
const PARTS = "leaves every correct rollout here: a place where they part, not a proof of an error";

let showing = 0;

const panelOf = (number, data) => {
  const panel = {
    number,
    data,
    group: index.groups[number],
    method: index.methods[index.groups[number].method],
    marked: -1,
  };
  return Object.assign(panel, { series: allSeries(panel) });
};

// Options: `jump` scrolls to the group, `marked` is a token to highlight (with `jump`, to scroll to), `focus` the id of a
// control.
async function show(number, { jump = false, marked = null, focus = null } = {}) {
  const turn = ++showing;
  current = number;
  delete $("group").dataset.complete;
  hideTip();
  const view = views(number).some(([name]) => name === look.view) ? look.view : "columns";
  const numbers = view === "steps" ? fewSteps(number) : [number];
  const panels = [];
  for (const other of numbers) panels.push(panelOf(other, await load(other)));
  const trees = look.rendered && index.rendered.includes(number) ? await unpack(`rendered-${number}`) : null;
  if (turn !== showing) return;
  shown = { number, view, panels, trees, texts: [], tables: [], marked: null };
  reveal(number);

  const [panel] = panels.filter((own) => own.number === number);
  const work = make("div", { className: `work by-${view}` }, ...LAYOUTS[view](panel));
  const notes = panel.data.notes.map((note) => make("p", { className: "warn", textContent: note }));
  const head = heading(panel);
  $("group").replaceChildren(head, ...notes, prompt(panel.group), controls(panel), work);
  $("group").dataset.group = key(panel.group);
  document.title = `${titled(panel.group)} · ${document.querySelector("h1").textContent}`;
  if (jump) head.scrollIntoView();
  if (focus) $(focus)?.focus();
  if (marked) mark(marked);
  for (const text of shown.texts) {
    fill(text, FIRST_TOKENS);
    await pause(); // display what is there and keep the page responsive
    if (turn !== showing) return;
  }
  if (jump && marked) hits()[0]?.scrollIntoView({ block: "center" });
  $("group").dataset.complete = "";
}

function heading({ number, group, data, method }) {
  const move = (by, text, title) => make("button", { type: "button", textContent: text, title, onclick: () => go(by) });
  const score = method.key_tokens && data.right && data.wrong ? ` · mean |K| ${decimal(data.score)}` : "";
  const steps = index.same.get(group.prompt).filter((other) => other !== number);
  const link = (other) => make("a", { href: `#${key(index.groups[other])}`, textContent: index.groups[other].step });
  return make(
    "div",
    { className: "head" },
    make("h2", { textContent: titled(group).replace(/^./, (first) => first.toUpperCase()) }),
    make("span", { className: "tally", textContent: tally(group) + score }),
    steps.length && index.steps > 1
      ? make(
          "span",
          { className: "same" },
          "same prompt at step ",
          ...steps.flatMap((other, i) => (i ? [", ", link(other)] : [link(other)])),
        )
      : null,
    make("span", { className: "steps" }, move(-1, "← Previous", "Shortcut: k"), move(1, "Next →", "Shortcut: j")),
  );
}

// The prompt, without the beginning and end that all prompts share, which a button shows.
function prompt({ prompt: text, own: [begin, end] }) {
  const box = make("div", { className: "prompt", tabIndex: 0, role: "region", ariaLabel: "Prompt" });
  const template = (part, name) => {
    if (!part) return null;
    const button = make("button", {
      type: "button",
      className: "template",
      textContent: "…",
      title: `Show the ${name} that all prompts share: ${plural(part.length, "character")}`,
    });
    button.ariaLabel = button.title;
    button.onclick = () => button.replaceWith(part);
    return button;
  };
  const own = text.slice(begin, end);
  let told = 0;
  const more = make("button", { type: "button", className: "more" });
  const tell = () => {
    more.before(own.slice(told, told + PROMPT_PIECE));
    told += PROMPT_PIECE;
    more.hidden = told >= own.length;
    more.textContent = `Show more (${(own.length - told).toLocaleString("en")} characters)`;
  };
  box.append(...[template(text.slice(0, begin), "beginning"), more, template(text.slice(end), "end")].filter(Boolean));
  more.onclick = tell;
  tell();
  return box;
}

// What the rollouts are laid out by, for this group.
function views(number) {
  const group = index.groups[number];
  const found = [["columns", "correct and wrong"]];
  if (methodsOf({ method: index.methods[group.method] }).length > 1) found.push(["side", "methods side by side"]);
  else if (look.minus) found.push(["side", "both side by side"]);
  if (new Set(index.same.get(group.prompt).map((other) => index.groups[other].step)).size > 1)
    found.push(["steps", "steps side by side"]);
  return found;
}

// Some of the groups with the same prompt: the first, the last, this one, and others evenly between them.
function fewSteps(number) {
  const all = index.same.get(index.groups[number].prompt);
  if (all.length <= MOST_STEPS) return all;
  const some = new Set([number]);
  for (let i = 0; some.size < MOST_STEPS; i++)
    some.add(all[[0, all.length - 1][i] ?? Math.round(((i - 1) * (all.length - 1)) / (MOST_STEPS - 1))]);
  return all.filter((other) => some.has(other));
}

function select(id, options, value, onchange) {
  const choice = make("select", { id });
  for (const [name, text] of options)
    choice.append(make("option", { value: name, textContent: text, selected: name === value }));
  choice.onchange = () => onchange(choice.value);
  return choice;
}

function controls(panel) {
  const names = panel.series.map(({ name }) => [name, name]);
  const one = chosen(panel).both?.[0] ?? chosen(panel);
  const choose = (id, name) => (value) => {
    look[name] = value;
    recolour(panel, id);
  };
  const rendered = make("input", { type: "checkbox", id: "rendered", checked: look.rendered });
  rendered.onchange = () => {
    look.rendered = rendered.checked;
    show(shown.number, { marked: shown.marked, focus: "rendered" });
  };
  return make(
    "div",
    { className: "controls" },
    make("label", {}, "Colour ", select("mode", names, one.name, choose("mode", "series"))),
    names.length > 1
      ? make("label", {}, "minus ", select("minus", [["", "nothing"], ...names], look.minus, choose("minus", "minus")))
      : null,
    scaleOf(chosen(panel), "scale"),
    fading(panel),
    layouts(panel),
    index.rendered.includes(panel.number)
      ? make("label", { title: "Markdown and LaTeX next to the tokens" }, rendered, " rendered")
      : null,
    ...marks(panel),
  );
}

function layouts(panel) {
  const all = views(panel.number);
  const choice = select("view", all, shown.view, (value) => {
    look.view = value;
    show(shown.number, { marked: shown.marked, focus: "view" });
  });
  return make("label", { id: "layouts", hidden: all.length < 2 }, "Rollouts ", choice);
}

// Colour by another series. `focus` is the id of the control that chose it.
function recolour(panel, focus) {
  if (shown.view === "side") return show(shown.number, { marked: shown.marked, focus });
  for (const text of shown.texts) text.series = chosen(text.panel);
  $("scale").replaceWith(scaleOf(chosen(panel), "scale"));
  $("layouts").replaceWith(layouts(panel));
  $("tables")?.replaceWith(tables(panel));
  shown.texts.forEach(paint);
}

function scaleOf({ scale }, id = "") {
  const ramp = make("span", { className: "ramp", ariaHidden: "true" });
  for (let i = 0; i <= (scale.kind === "v" ? 2 : 1) * index.levels; i++)
    ramp.append(make("i", { className: `${scale.kind}${i}` }));
  return make(
    "span",
    { className: "scale", id, hidden: id !== "" && shown.view === "side" },
    make("span", { textContent: scale.ends[0] }),
    ramp,
    make("span", { textContent: scale.ends[1] }),
  );
}

// Explains the marks that are in this group.
function marks({ data }) {
  const found = [];
  if (data.rollouts.some((r) => r.cells.trained.includes(0)))
    found.push(
      make("span", { className: "key" }, make("span", { className: "u", textContent: "dotted" }), ": not trained on"),
    );
  if (data.rollouts.some((r) => r.parts !== null))
    found.push(
      make("span", { className: "key" }, make("span", { className: "flag", textContent: "parts" }), `: ${PARTS}`),
    );
  return found;
}

function fading(panel) {
  const most = panel.data.right + panel.data.wrong;
  const slider = (name, text, properties, written) => {
    const input = make("input", { type: "range", id: `fade-${name}`, ...properties });
    input.value = look[name]; // after its range
    const told = make("output", { textContent: written(Number(input.value)) });
    input.oninput = () => {
      look[name] = Number(input.value);
      told.textContent = written(look[name]);
      box.classList.toggle("active", thresholds());
      repaint();
    };
    return make("label", {}, `${text} `, input, told);
  };
  const box = make(
    "details",
    { className: "fade", open: look.fading ?? !narrow() },
    make("summary", { textContent: "Fade", title: "Fade tokens that may have their value by chance" }),
    slider("p", "p above", { min: 0, max: 1, step: 0.01 }, (x) => x.toFixed(2)),
    most > 1 ? slider("support", "in fewer than", { min: 1, max: most, step: 1 }, (x) => plural(x, "rollout")) : null,
    panel.method.key_tokens ? slider("size", "|K| below", { min: 0, max: 1, step: 0.05 }, (x) => x.toFixed(2)) : null,
  );
  box.ontoggle = () => {
    look.fading = box.open;
  };
  box.classList.toggle("active", thresholds());
  return box;
}

function repaint() {
  shown.texts.forEach(paint);
  shown.tables.forEach(({ draw }) => draw());
}

// Layouts of the rollouts.

const LAYOUTS = {
  columns: (panel) => {
    const columns = SIDES.map(([side, title, correct]) => {
      const own = panel.data.rollouts.filter((rollout) => rollout.correct === correct);
      if (!own.length) return null;
      return make(
        "div",
        { className: `column ${side}` },
        make("h3", { textContent: `${title} (${own.length})` }),
        ...own.map((r) => article(panel, r, [chosen(panel)])),
      );
    }).filter(Boolean);
    return [make("div", { className: "columns" }, ...columns), tables(panel)];
  },
  side: (panel) => {
    const both = chosen(panel).both ?? panel.series.filter((series) => series.method);
    const heads = both.map((series) => make("div", {}, make("b", { textContent: series.name }), scaleOf(series)));
    return [
      make(
        "div",
        {},
        make("div", { className: "texts which" }, ...heads),
        ...ordered(panel).map((rollout) => article(panel, rollout, both, true)),
      ),
      tables(panel),
    ];
  },
  steps: () => [
    make(
      "div",
      { className: "columns" },
      ...shown.panels.map((panel) =>
        make(
          "div",
          { className: "column" },
          make(
            "h3",
            {},
            make("a", { href: `#${key(panel.group)}`, textContent: titled(panel.group) }),
            ` · ${tally(panel.group)}`,
          ),
          ...ordered(panel).map((rollout) => article(panel, rollout, [chosen(panel)], true)),
        ),
      ),
    ),
  ],
};

const ordered = ({ data }) =>
  SIDES.flatMap(([, , correct]) => data.rollouts.filter((rollout) => rollout.correct === correct));
const sideOf = ({ correct }) => SIDES.find(([, , own]) => own === correct);

// A rollout, with its text once for each series.
function article(panel, rollout, some, verdict = false) {
  const facts = [make("b", { textContent: `Rollout ${rollout.rollout}` })];
  const [side, title] = sideOf(rollout);
  if (verdict) facts.push(make("span", { className: `verdict ${side}`, textContent: title.toLowerCase() }));
  facts.push(`A ${decimal(rollout.advantage, true)}`);
  for (const [name, reward] of Object.entries(rollout.rewards)) facts.push(`${name} ${brief(reward)}`);
  facts.push(plural(rollout.at.length, "token"));
  const texts = some.map((series) => textOf(panel, rollout, series));
  if (rollout.parts !== null) {
    const go = make("button", {
      type: "button",
      className: "more",
      title: `The rollout ${PARTS}`,
      textContent: `parts at token ${rollout.parts + 1}`,
    });
    go.onclick = () => focusToken(spanAt(texts[0], rollout.parts));
    facts.push(go);
  }
  const header = make(
    "header",
    {},
    ...facts.map((fact) => (typeof fact === "string" ? make("span", { textContent: fact }) : fact)),
  );
  const tree = shown.trees?.[panel.data.rollouts.indexOf(rollout)];
  const boxes = texts.map(({ box, more, series }) =>
    make(
      "div",
      {},
      some.length > 1 ? make("div", { className: "short", textContent: series.short ?? series.name }) : null,
      box,
      more,
    ),
  );
  if (tree && panel.number === shown.number) boxes.push(make("div", { className: "rendered" }, ...grown(tree)));
  return make(
    "article",
    { className: `rollout ${side}` },
    header,
    make("div", { className: `texts n${boxes.length}` }, ...boxes),
  );
}

function textOf(panel, rollout, series) {
  const box = make("div", { className: "text", tabIndex: 0, role: "group" });
  box.ariaLabel = `Tokens of rollout ${rollout.rollout} (use the arrow keys)`;
  const more = make("button", { type: "button", className: "more", hidden: true });
  const turns =
    rollout.segments.length > 1 || rollout.segments.some(({ role }) => role !== "assistant") ? rollout.segments : [];
  const roles = new Map(turns.map(({ begin, role }) => [begin, role]));
  const text = { panel, rollout, series, box, more, roles, spans: [] };
  box.shows = text;
  more.onclick = () => fill(text, MORE_TOKENS);
  shown.texts.push(text);
  return text;
}

function classOf({ panel, rollout, series }, i) {
  const cell = rollout.at[i];
  const shade = faded(panel, rollout, cell) ? "faded" : shadeClass(series.scale, series.of(rollout, i));
  const trained = rollout.cells.trained[cell] ? "" : " u";
  const hit = rollout.cells.token[cell] === panel.marked ? " hit" : "";
  return `t ${shade}${trained}${hit}${rollout.parts === i ? " parts" : ""}`;
}

function fill(text, count) {
  const { panel, rollout, roles, spans, box, more } = text;
  const strings = panel.data.tokens.text;
  const end = Math.min(spans.length + count, rollout.at.length);
  const fragment = document.createDocumentFragment();
  for (let i = spans.length; i < end; i++) {
    if (roles.has(i)) fragment.append(make("span", { className: "role", textContent: roles.get(i) }));
    if (rollout.parts === i)
      fragment.append(make("span", { className: "flag", textContent: "parts", title: `The rollout ${PARTS}` }));
    const span = document.createElement("span");
    span.className = classOf(text, i);
    span.textContent = strings[rollout.cells.token[rollout.at[i]]];
    span.place = i;
    spans.push(span);
    fragment.append(span);
  }
  box.append(fragment);
  if (!rollout.at.length) box.replaceChildren(make("span", { className: "note", textContent: "(empty)" }));
  const rest = rollout.at.length - end;
  more.hidden = rest <= 0;
  more.textContent = `Show ${Math.min(rest, MORE_TOKENS).toLocaleString("en")} more of ${plural(rollout.at.length, "token")}`;
}

function paint(text) {
  text.spans.forEach((span, i) => {
    const name = classOf(text, i);
    if (span.className !== name) span.className = name;
  });
}

function spanAt(text, place) {
  if (place >= text.spans.length) fill(text, place + 1 - text.spans.length);
  return text.spans[place];
}
