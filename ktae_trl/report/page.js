"use strict";
// Prompts and tokens are untrusted: they are inserted as text (textContent), never as markup.
(() => {
  const FIRST_TOKENS = 2000; // of each rollout; the button adds MORE_TOKENS
  const MORE_TOKENS = 10000;
  const PROMPT_PIECE = 20000; // characters
  const LIST_PIECE = 100;
  const TABLE_PIECE = 100;
  const KEPT_GROUPS = 8;
  const OWN = { ArrowRight: 1, ArrowLeft: -1 };

  const $ = (id) => document.getElementById(id);
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children.filter((child) => child !== null));
    return element;
  };
  const pause = () => new Promise((resolve) => setTimeout(resolve));
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

  async function unpack(id) {
    const text = atob($(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  }

  // Numbers. Those that JSON lacks are strings: nan, inf.
  const minus = (text) => text.replace("-", "−");
  function decimal(x, signed = false, digits = 4) {
    if (x === null || x === undefined) return "–";
    if (typeof x === "string") return minus(x);
    const text = Math.abs(x) >= 1000 ? Math.round(x).toLocaleString("en") : x.toFixed(digits);
    return minus(signed && x > 0 ? `+${text}` : text);
  }
  const probability = (p) => (typeof p === "number" && p > 0 && p < 0.001 ? minus(p.toExponential(2)) : decimal(p));
  const asNumber = (x) => (typeof x === "number" ? x : 0);
  const largest = (numbers) => numbers.reduce((most, x) => Math.max(most, Math.abs(asNumber(x))), 0);

  let index; // groups, methods, panels, levels
  let found = []; // indices of the groups that pass the filters, in order
  let listed = LIST_PIECE;
  let filtering = 0;
  let showing = 0;
  let current = null; // index of the selected group, which may not be unpacked yet
  let shown = null; // the displayed group: {number, data, rollouts, modes, mode, marked, ...}
  const kept = new Map();
  const texts = [];

  async function load(number) {
    const data = kept.get(number) ?? (await unpack(`block-${number}`));
    kept.delete(number);
    kept.set(number, data); // most recently used last
    if (kept.size > KEPT_GROUPS) kept.delete(kept.keys().next().value);
    return data;
  }

  // The list of groups.

  const titled = (group) => (index.steps > 1 ? `step ${group.step} · group ${group.group}` : `group ${group.group}`);
  const key = (group) => `step-${group.step}-group-${group.group}`;
  const ORDERS = {
    run: () => 0,
    telling: (a, b) => asNumber(b.score) - asNumber(a.score),
    hard: (a, b) => share(a) - share(b),
    easy: (a, b) => share(b) - share(a),
  };
  const share = (group) => (group.right + group.wrong ? group.right / (group.right + group.wrong) : 0.5);
  const answers = (group) =>
    group.right && group.wrong ? "mixed" : group.right ? "right" : group.wrong ? "wrong" : "unscored";

  async function completions(number) {
    const data = await load(number);
    const text = data.tokens.text;
    return data.rollouts.map((r) => r.at.map((c) => text[r.cells.token[c]]).join("")).join("\0").toLowerCase();
  }

  async function filter() {
    const turn = ++filtering;
    const query = $("search").value.toLowerCase();
    const deep = $("deep").checked;
    const [wanted, step] = [$("answers").value, $("step").value];
    const left = [];
    for (const [number, group] of index.groups.entries()) {
      if ((wanted && answers(group) !== wanted) || (step && group.step !== Number(step))) continue;
      if (query && !group.lower.includes(query)) {
        if (!deep) continue;
        if (texts[number] === undefined) {
          $("count").textContent = `Searching: ${number} of ${index.groups.length} …`;
          texts[number] = await completions(number);
          if (turn !== filtering) return;
        }
        if (!texts[number].includes(query)) continue;
      }
      left.push(number);
    }
    left.sort((a, b) => ORDERS[$("order").value](index.groups[a], index.groups[b]) || a - b);
    found = left;
    listed = LIST_PIECE;
    $("list").scrollTop = 0;
    list();
  }

  function list() {
    const all = index.groups.length;
    $("count").textContent = found.length === all ? plural(all, "group") : `${found.length} of ${plural(all, "group")}`;
    $("list").replaceChildren(...found.slice(0, listed).map(entry));
    const rest = found.length - listed;
    $("list-more").hidden = rest <= 0;
    $("list-more").textContent = `Show ${Math.min(rest, LIST_PIECE)} more`;
  }

  function tally(group) {
    const parts = [`${group.right} correct`, `${group.wrong} wrong`];
    if (group.unscored) parts.push(`${group.unscored} not graded`);
    return parts.join(", ");
  }

  function entry(number) {
    const group = index.groups[number];
    const bar = make("div", { className: "share", ariaHidden: "true" });
    for (const [side, count] of [["r", group.right], ["w", group.wrong]]) {
      const part = make("i", { className: side });
      part.style.flexGrow = count;
      bar.append(part);
    }
    if (group.unscored) bar.append(make("i"));
    if (group.unscored) bar.lastChild.style.flexGrow = group.unscored;
    const link = make(
      "a",
      { href: `#${key(group)}` },
      make(
        "div",
        { className: "line" },
        make("span", { textContent: titled(group) }),
        make("span", { className: "tally", textContent: tally(group) }),
      ),
      bar,
      make("div", { className: "preview", textContent: group.preview.replace(/↵?\n/g, " ") }),
    );
    link.dataset.number = number;
    if (current === number) link.setAttribute("aria-current", "true");
    return make("li", {}, link);
  }

  const linkOf = (number) => $("list").querySelector(`a[data-number="${number}"]`);

  function go(by, focus = false) {
    const place = found.indexOf(current);
    const number = found[place < 0 ? 0 : place + by];
    if (number === undefined) return;
    while (found.indexOf(number) >= listed) {
      listed += LIST_PIECE;
      list();
    }
    show(number, true);
    if (focus) linkOf(number).focus();
    history.replaceState(null, "", `#${key(index.groups[number])}`);
  }

  // The browser's own handling of a link would take the focus from the list.
  $("list").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(Number(link.dataset.number), true);
    history.pushState(null, "", link.hash);
  });

  function fromHash() {
    const wanted = location.hash.slice(1);
    const number = index.groups.findIndex((group) => key(group) === wanted);
    return number >= 0 ? number : wanted ? null : (found[0] ?? null);
  }

  // A group.

  async function show(number, jump) {
    const turn = ++showing;
    current = number;
    hideTip();
    const data = await load(number);
    if (turn !== showing) return;
    const group = index.groups[number];
    const method = index.methods[group.method];
    shown = { number, data, group, method, rollouts: [], modes: modes(data, method), marked: null };
    shown.mode = shown.modes[0];
    for (const link of $("list").querySelectorAll("a[aria-current]")) link.removeAttribute("aria-current");
    linkOf(number)?.setAttribute("aria-current", "true");
    linkOf(number)?.scrollIntoView({ block: "nearest" });

    const head = heading(group, data);
    const columns = ["right", "wrong", "unscored"].map((side) => column(side, data)).filter(Boolean);
    const work = make("div", { className: `work ${["", "one", "", "three"][columns.length]}` }, ...columns, table());
    const parts = [head, ...data.notes.map((note) => make("p", { className: "warn", textContent: note }))];
    $("group").replaceChildren(...parts, prompt(group.prompt), legend(), work);
    $("group").dataset.group = key(group);
    delete $("group").dataset.complete;
    document.title = `${titled(group)} · ${document.querySelector("h1").textContent}`;
    if (jump) head.scrollIntoView();
    for (const rollout of shown.rollouts) {
      fill(rollout, FIRST_TOKENS);
      await pause(); // display what is there and keep the page responsive
      if (turn !== showing) return;
    }
    $("group").dataset.complete = "";
  }

  function heading(group, data) {
    const move = (by, text, title) => make("button", { type: "button", textContent: text, title, onclick: () => go(by) });
    const score = data.right && data.wrong ? ` · mean |K| ${decimal(data.score)}` : "";
    return make(
      "div",
      { className: "head" },
      make("h2", { textContent: titled(group).replace(/^./, (first) => first.toUpperCase()) }),
      make("span", { className: "tally", textContent: tally(group) + score }),
      make("span", { className: "steps" }, move(-1, "← Previous", "Shortcut: k"), move(1, "Next →", "Shortcut: j")),
    );
  }

  function prompt(text) {
    const box = make("div", { className: "prompt", tabIndex: 0, role: "region", ariaLabel: "Prompt" });
    let told = 0;
    const more = make("button", { type: "button", className: "more" });
    const tell = () => {
      more.before(text.slice(told, told + PROMPT_PIECE));
      told += PROMPT_PIECE;
      more.hidden = told >= text.length;
      more.textContent = `Show more (${(text.length - told).toLocaleString("en")} characters)`;
    };
    box.append(more);
    more.onclick = tell;
    tell();
    return box;
  }

  // Colour modes. Each maps a cell of a rollout to a number in [-1, 1].
  function modes(data, method) {
    const K = data.tokens.K;
    const all = [];
    const credit = (name, of, ends) => all.push({ name, of, ends });
    const { name, symbol } = method.value ?? {};
    if (method.how === "multiply" || method.how === "add") {
      credit(name, (r, c) => r.cells.value[c], method.key_tokens ? ["−1 wrong", "correct +1"] : ["−1", "+1"]);
    } else if (method.how === "scale") {
      credit(name, (r, c) => (r.cells.value[c] === null ? 0 : asNumber(r.cells.value[c]) - 1), [`${symbol} = 0`, "2 or more"]);
    } else if (method.how === "replace") {
      const most = largest(data.rollouts.flatMap((r) => r.cells.value)) || 1;
      const ends = [decimal(-most, true), decimal(most, true)];
      credit(name, (r, c) => asNumber(r.cells.value[c]) / most, ends);
    }
    if (!method.key_tokens) {
      const computed = "key-token value K (computed for this page, not used in training)";
      credit(computed, (r, c) => (r.cells.trained[c] || method.shares_tokens ? K[r.cells.token[c]] : 0), ["−1 wrong", "correct +1"]);
    }
    const most = largest(data.rollouts.flatMap((r) => r.cells.advantage)) || 1;
    const ends = [decimal(-most, true), decimal(most, true)];
    credit("token advantage A'", (r, c) => asNumber(r.cells.advantage[c]) / most, ends);
    return all;
  }

  const level = (x) => index.levels + Math.round(Math.max(-1, Math.min(1, asNumber(x))) * index.levels);

  function legend() {
    const choice = make("select", { id: "mode" });
    for (const mode of shown.modes) choice.append(make("option", { textContent: mode.name }));
    const ramp = make("span", { className: "ramp", ariaHidden: "true" });
    for (let i = 0; i <= 2 * index.levels; i++) ramp.append(make("i", { className: `v${i}` }));
    const ends = [make("span"), make("span")];
    const name = () => ends.forEach((end, i) => (end.textContent = shown.mode.ends[i]));
    choice.onchange = () => {
      shown.mode = shown.modes[choice.selectedIndex];
      name();
      shown.rollouts.forEach(recolour);
    };
    name();
    return make(
      "div",
      { className: "legend" },
      make("label", {}, "Colour: ", choice),
      make("span", { className: "scale" }, ends[0], ramp, ends[1]),
      shown.data.rollouts.some((r) => r.cells.trained.includes(0))
        ? make("span", {}, make("span", { className: "u", textContent: "dotted" }), ": not trained on")
        : null,
    );
  }

  const TITLES = { right: "Correct", wrong: "Wrong", unscored: "Not graded" };

  function column(side, data) {
    const correct = { right: true, wrong: false, unscored: null }[side];
    const own = data.rollouts.filter((rollout) => rollout.correct === correct);
    if (!own.length) return null;
    return make(
      "div",
      { className: `column ${side}` },
      make("h3", { textContent: `${TITLES[side]} (${own.length})` }),
      ...own.map(article),
    );
  }

  function article(data) {
    const text = make("div", { className: "text", tabIndex: 0, role: "group" });
    text.ariaLabel = `Tokens of rollout ${data.rollout} (use the arrow keys)`;
    const more = make("button", { type: "button", className: "more", hidden: true });
    const rollout = { data, text, more, spans: [], classes: [] };
    text.rollout = rollout;
    more.onclick = () => fill(rollout, MORE_TOKENS);
    shown.rollouts.push(rollout);
    const facts = [make("b", { textContent: `Rollout ${data.rollout}` }), `A ${decimal(data.advantage, true)}`];
    for (const [name, reward] of Object.entries(data.rewards)) facts.push(`${name} ${reward === null ? "–" : brief(reward)}`);
    facts.push(plural(data.at.length, "token"));
    const header = make("header", {}, ...facts.map((fact) => (typeof fact === "string" ? make("span", { textContent: fact }) : fact)));
    return make("article", { className: "rollout" }, header, text, more);
  }

  const brief = (x) => (typeof x === "string" ? minus(x) : minus(String(Number(x.toFixed(3)))));

  function shades({ data }) {
    return data.cells.token.map((_, c) => `t v${level(shown.mode.of(data, c))}${data.cells.trained[c] ? "" : " u"}`);
  }

  function fill(rollout, count) {
    const { data, spans, text, more } = rollout;
    if (!spans.length) rollout.classes = shades(rollout);
    const strings = shown.data.tokens.text;
    const end = Math.min(spans.length + count, data.at.length);
    const fragment = document.createDocumentFragment();
    for (let i = spans.length; i < end; i++) {
      const cell = data.at[i];
      const span = document.createElement("span");
      span.className = rollout.classes[cell];
      span.textContent = strings[data.cells.token[cell]];
      span.place = i;
      if (data.cells.token[cell] === shown.marked) span.classList.add("hit");
      spans.push(span);
      fragment.append(span);
    }
    text.append(fragment);
    if (!data.at.length) text.replaceChildren(make("span", { className: "note", textContent: "(empty)" }));
    const rest = data.at.length - end;
    more.hidden = rest <= 0;
    more.textContent = `Show ${Math.min(rest, MORE_TOKENS).toLocaleString("en")} more of ${plural(data.at.length, "token")}`;
  }

  function recolour(rollout) {
    rollout.classes = shades(rollout);
    paint(rollout);
  }

  function paint({ data, spans, classes }) {
    spans.forEach((span, i) => {
      const hit = shown.marked !== null && data.cells.token[data.at[i]] === shown.marked;
      const name = classes[data.at[i]] + (hit ? " hit" : "");
      if (span.className !== name) span.className = name;
    });
  }

  // The table of key tokens.

  const COLUMNS = [
    ["token", "token", (t, i) => t.text[i], String],
    ["correct", "a", (t, i) => t.a[i]],
    ["wrong", "b", (t, i) => t.b[i]],
    ["p", "p", (t, i) => t.p[i]],
    ["IG", "IG", (t, i) => t.IG[i]],
    ["D", "D", (t, i) => t.D[i]],
    ["K", "K", (t, i) => t.K[i]],
  ];
  const HINTS = {
    correct: "correct rollouts that contain it (a)", wrong: "wrong rollouts that contain it (b)",
    p: "two-sided p-value of Fisher’s exact test", IG: "information gain in bits", D: "direction", K: "key-token value",
  };
  const oneLine = (text) => text.replace(/[\n\t]/g, "").replaceAll(" ", "␣");

  function table() {
    const { data } = shown;
    const tokens = data.tokens;
    const rows = tokens.id.map((_, i) => i).filter((i) => tokens.p[i] !== null);
    const box = make("section", { className: "table" });
    box.ariaLabel = "Key tokens";
    if (!rows.length) {
      box.append(make("h3", { textContent: "Key tokens" }), make("p", { className: "note", textContent: "None: this group does not have both correct and wrong rollouts." }));
      return box;
    }
    let [by, down, told] = ["IG", true, TABLE_PIECE];
    const body = make("tbody");
    const more = make("button", { type: "button", className: "more" });
    const headers = COLUMNS.map(([name]) => {
      const button = make("button", { type: "button", textContent: name, title: HINTS[name] ?? "" });
      button.onclick = () => {
        [down, by] = [by === name ? !down : name !== "token" && name !== "p", name];
        draw();
      };
      const header = make("th", { scope: "col" }, button);
      header.dataset.column = name;
      return header;
    });
    const draw = () => {
      const value = COLUMNS.find(([name]) => name === by)[2];
      const sign = down ? -1 : 1;
      rows.sort((x, y) => {
        const [u, v] = [value(tokens, x), value(tokens, y)];
        const order = typeof u === "string" && typeof v === "string" ? u.localeCompare(v) : asNumber(u) - asNumber(v);
        return sign * order || Math.abs(asNumber(tokens.K[y])) - Math.abs(asNumber(tokens.K[x])) || x - y;
      });
      for (const header of headers) header.ariaSort = header.dataset.column === by ? (down ? "descending" : "ascending") : "none";
      body.replaceChildren(...rows.slice(0, told).map((i) => tableRow(i, tokens, data)));
      more.hidden = told >= rows.length;
      more.textContent = `Show ${Math.min(TABLE_PIECE, rows.length - told)} more of ${rows.length}`;
    };
    more.onclick = () => {
      told += TABLE_PIECE;
      draw();
    };
    draw();
    shown.redraw = draw;
    box.append(make("h3", { textContent: `Key tokens (${rows.length})` }), make("table", {}, make("thead", {}, make("tr", {}, ...headers)), body), more);
    if (shown.method.leave_one_out) box.append(make("p", { className: "note", textContent: "This table shows K of the whole group. The colours and tooltips show K computed without the token’s own rollout." }));
    return box;
  }

  function tableRow(i, tokens, data) {
    const name = make("button", { type: "button", className: `name`, textContent: oneLine(tokens.text[i]) });
    name.title = "Highlight all occurrences";
    name.onclick = () => mark(shown.marked === i ? null : i, true);
    const cell = (text) => make("td", { className: "number", textContent: text });
    const value = make("span", { className: `value v${level(tokens.K[i])}`, textContent: decimal(tokens.K[i], true, 3) });
    const row = make(
      "tr",
      {},
      make("td", {}, name),
      cell(`${tokens.a[i]} of ${data.right}`),
      cell(`${tokens.b[i]} of ${data.wrong}`),
      cell(probability(tokens.p[i])),
      cell(decimal(tokens.IG[i], false, 3)),
      cell(decimal(tokens.D[i], true, 2)),
      make("td", { className: "number" }, value),
    );
    row.dataset.token = i;
    if (shown.marked === i) row.ariaSelected = "true";
    return row;
  }

  function mark(token, jump = false) {
    shown.marked = token;
    shown.rollouts.forEach(paint);
    for (const row of document.querySelectorAll("tr[data-token]")) {
      if (Number(row.dataset.token) === token) row.ariaSelected = "true";
      else row.removeAttribute("aria-selected");
    }
    if (jump && token !== null) hits()[0]?.scrollIntoView({ block: "nearest" });
  }

  const hits = () => [...$("group").querySelectorAll(".hit")];

  function nextHit(by) {
    const all = hits();
    if (!all.length) return;
    const place = all.indexOf(document.activeElement);
    focusToken(all[place < 0 ? (by > 0 ? 0 : all.length - 1) : (place + by + all.length) % all.length]);
  }

  // A token: its numbers on hover and on focus.

  const tokenOf = (target) => (target instanceof Element && target.closest(".text") && target.classList.contains("t") ? target : null);

  function tip(span) {
    const { data } = span.parentElement.rollout;
    const cell = data.at[span.place];
    const token = data.cells.token[cell];
    const { tokens, right, wrong } = shown.data;
    const { value, how, key_tokens: keyTokens } = shown.method;
    const facts = make("dl");
    const fact = (name, text, wide = false) => {
      const number = make("dd", { textContent: text, className: wide ? "wide" : "" });
      number.dataset.fact = name;
      facts.append(make("dt", { textContent: name }), number);
    };
    const gap = () => facts.append(make("div", { className: "gap" }));
    const counted = tokens.p[token] !== null;
    if (value) fact(value.symbol, decimal(data.cells.value[cell], how !== "scale"));
    if (!keyTokens && counted) fact("K", decimal(tokens.K[token], true));
    fact("A'", decimal(data.cells.advantage[cell], true));
    fact("A", decimal(data.advantage, true));
    if (counted) {
      const [a, b] = [tokens.a[token], tokens.b[token]];
      gap();
      fact("a", `${a} of ${right} correct`);
      fact("b", `${b} of ${wrong} wrong`);
      fact("c", String(right - a));
      fact("d", String(wrong - b));
      gap();
      fact("p", probability(tokens.p[token]));
      fact("IG", decimal(tokens.IG[token]));
      fact("F", decimal(tokens.F[token]));
      fact("D", decimal(tokens.D[token], true));
    }
    const remarks = [];
    if (shown.method.leave_one_out && counted) remarks.push("K is computed without this rollout, the other numbers from the whole group.");
    if (!data.cells.trained[cell]) remarks.push("Not trained on in this rollout.");
    if (!counted) remarks.push(right && wrong ? "No statistics for this token." : "No statistics: the group does not have both correct and wrong rollouts.");
    $("tip").replaceChildren(
      make(
        "div",
        { className: "title" },
        make("b", { textContent: oneLine(tokens.text[token]) }),
        make("span", { textContent: `id ${tokens.id[token]} · position ${span.place + 1}` }),
      ),
      facts,
      ...remarks.map((text) => make("p", { textContent: text })),
    );
    $("tip").hidden = false;
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const own = $("tip").getBoundingClientRect();
    const below = at.bottom + 6 + own.height <= innerHeight;
    $("tip").style.top = `${Math.max(4, below ? at.bottom + 6 : at.top - own.height - 6)}px`;
    $("tip").style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
  }

  function hideTip() {
    $("tip").hidden = true;
  }

  function focusToken(span) {
    span.tabIndex = -1;
    span.setAttribute("role", "button");
    span.setAttribute("aria-describedby", "tip");
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
    tip(span);
  }

  function walk(event) {
    const text = event.target.closest(".text");
    const spans = text?.rollout?.spans;
    if (!spans?.length) return false;
    const place = tokenOf(event.target)?.place ?? (event.key === "ArrowLeft" ? spans.length : -1);
    const to = { Home: 0, End: spans.length - 1 }[event.key] ?? place + (OWN[event.key] ?? NaN);
    if (!(to in spans)) return event.key in OWN;
    focusToken(spans[to]);
    return true;
  }

  $("group").addEventListener("mouseover", (event) => {
    const span = tokenOf(event.target);
    if (span) tip(span);
    else hideTip();
  });
  $("group").addEventListener("mouseleave", hideTip);
  $("group").addEventListener("focusout", hideTip);
  $("group").addEventListener("click", (event) => {
    const span = tokenOf(event.target);
    if (!span) return;
    const { data } = span.parentElement.rollout;
    const token = data.cells.token[data.at[span.place]];
    focusToken(span);
    mark(shown.marked === token ? null : token);
  });
  addEventListener("scroll", hideTip, { passive: true });

  // Keys.

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const field = event.target.matches?.("input, select, textarea");
    if (event.key === "Escape") {
      if (field) event.target.blur(); // keeps the search results, to step through with j and k
      if (field) event.preventDefault();
      if (!$("tip").hidden) hideTip();
      else if (shown && shown.marked !== null) mark(null);
      return;
    }
    if (field) return;
    const link = event.target.closest?.("#list a");
    const keys = {
      j: () => go(1),
      k: () => go(-1),
      n: () => nextHit(1),
      N: () => nextHit(-1),
      "/": () => $("search").focus(),
      "?": () => $("help").showModal(),
    };
    if (link && (event.key === "ArrowDown" || event.key === "ArrowUp")) go(event.key === "ArrowDown" ? 1 : -1, true);
    else if (event.key === "Enter" && tokenOf(event.target)) event.target.click();
    else if (keys[event.key]) keys[event.key]();
    else if (!walk(event)) return;
    event.preventDefault();
  });

  // Theme and curves.

  const isDark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };

  $("theme").onclick = () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    plot();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plot);
  $("help-open").onclick = () => $("help").showModal();
  $("overview").addEventListener("toggle", plot);

  function resolved(name) {
    const probe = make("i");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
  }

  function caption(panel) {
    const names = [...new Set(panel.traces.map((trace) => trace.name))];
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

  function plot() {
    if (!index?.panels.length || !$("overview").open) return;
    const [text, line] = [resolved("--soft"), resolved("--line")];
    const colours = [0, 1, 2, 3, 4].map((i) => resolved(`--c${i}`));
    const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true, fixedrange: true };
    for (const [i, panel] of index.panels.entries()) {
      if (!$(`plot-${i}`)) {
        $("curves").append(make("figure", {}, caption(panel), make("div", { className: "plot", id: `plot-${i}` })));
      }
      const names = [...new Set(panel.traces.map((trace) => trace.name))];
      const traces = panel.traces.map(({ name, evaluated, line, ...trace }) => ({
        ...trace,
        name: evaluated ? `${name}, held-out` : name,
        line: { ...line, color: colours[names.indexOf(name) % colours.length] },
        marker: { size: 5 },
      }));
      Plotly.react(
        $(`plot-${i}`),
        traces,
        {
          margin: { l: 34, r: 6, t: 4, b: 22 },
          font: { size: 10.5, color: text, family: getComputedStyle(document.body).fontFamily },
          paper_bgcolor: "transparent",
          plot_bgcolor: "transparent",
          hovermode: "x unified",
          hoverlabel: { bgcolor: resolved("--bg"), bordercolor: line, font: { color: resolved("--text") } },
          showlegend: false, // the caption has one
          xaxis: { ...axis, nticks: 6 },
          yaxis: { ...axis, nticks: 5 },
        },
        { displayModeBar: false, responsive: true },
      );
    }
  }

  // Begin.

  async function begin() {
    index = await unpack("index");
    for (const group of index.groups) group.lower = group.prompt.toLowerCase();
    let timer;
    $("search").oninput = () => {
      clearTimeout(timer);
      timer = setTimeout(filter, 120);
    };
    for (const id of ["deep", "answers", "step", "order"]) $(id).onchange = filter;
    $("list-more").onclick = () => {
      listed += LIST_PIECE;
      list();
    };
    index.steps = new Set(index.groups.map((group) => group.step)).size;
    $("step").parentElement.hidden = index.steps < 2;
    await filter();
    addEventListener("popstate", () => open(true)); // also fires when the user edits the address
    await open(false);
    setTimeout(plot);
  }

  async function open(jump) {
    const number = fromHash();
    if (number !== null) return show(number, jump);
    $("group").replaceChildren(make("p", { className: "warn", textContent: "This page does not have the group named in the address. Choose one from the list." }));
  }

  if (typeof DecompressionStream === "undefined") {
    $("waiting").textContent = "This browser cannot unpack the page's data, because it lacks DecompressionStream. Use a browser from 2023 or later.";
  } else {
    begin();
  }
})();
