// A token: its numbers on hover and on focus, marks on all its occurrences, and the keys.

const OWN = { ArrowRight: 1, ArrowLeft: -1 };
const tokenOf = (target) =>
  target instanceof Element && target.closest(".text") && target.classList.contains("t") ? target : null;

function tip(span) {
  const { panel, rollout } = span.parentElement.shows;
  const {
    method,
    series,
    data: { tokens, right, wrong },
  } = panel;
  const cell = rollout.at[span.place];
  const token = rollout.cells.token[cell];
  const facts = make("dl");
  const fact = (name, text, wide = false) => {
    const number = make("dd", { textContent: text, className: wide ? "wide" : "" });
    number.dataset.fact = name;
    facts.append(make("dt", { textContent: name, className: wide ? "wide" : "" }), number);
  };
  const gap = () => facts.append(make("div", { className: "gap" }));
  const counted = tokens.p[token] !== null;
  const values = series.filter((own) => own.method);
  for (const own of values)
    fact(own.short, decimal(own.of(rollout, span.place), own.method.how !== "scale"), values.length > 1);
  if (!method.key_tokens && counted) fact("K", decimal(tokens.K[token], true));
  fact("A'", decimal(rollout.cells.advantage[cell], true));
  fact("A", decimal(rollout.advantage, true));
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
    const D = tokens.D[token];
    fact("D", Math.abs(asNumber(D)) >= 10 ? `${direction(D)} (${decimal(D, true)})` : decimal(D, true));
  }
  const arrays = series.filter((own) => own.array);
  if (arrays.length) gap();
  for (const own of arrays) fact(own.name, brief(own.of(rollout, span.place)), true);
  const difference = chosen(panel);
  if (difference.both) fact(difference.name, brief(difference.of(rollout, span.place)), true);
  const remarks = [];
  if (rollout.parts === span.place) remarks.push(`The rollout ${PARTS}.`);
  if (method.leave_one_out && counted)
    remarks.push("K is computed without this rollout, the other numbers from the whole group.");
  if (!rollout.cells.trained[cell]) remarks.push("Not trained on in this rollout.");
  if (!counted)
    remarks.push(
      right && wrong
        ? "No statistics for this token."
        : "No statistics: the group does not have both correct and wrong rollouts.",
    );
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

// Marks.

function mark(token, jump = false) {
  shown.marked = token;
  for (const panel of shown.panels) {
    const { tokens } = panel.data;
    panel.marked = token === null ? -1 : tokens.id.findIndex((_, i) => identity(tokens, i) === token);
  }
  shown.texts.forEach(paint);
  shown.tables.forEach(({ select }) => select());
  if (jump && token !== null) hits()[0]?.scrollIntoView({ block: "nearest" });
}

const hits = () => [...$("group").querySelectorAll(".hit")];

function nextHit(by) {
  const all = hits();
  if (!all.length) return;
  const place = all.indexOf(document.activeElement);
  focusToken(all[place < 0 ? (by > 0 ? 0 : all.length - 1) : (place + by + all.length) % all.length]);
}

function focusToken(span) {
  span.tabIndex = -1;
  span.setAttribute("role", "button");
  span.setAttribute("aria-describedby", "tip");
  span.focus({ preventScroll: true });
  span.scrollIntoView({ block: "nearest" });
  shown.last = span;
  tip(span);
}

// Arrow keys move from the focused token. Without one they begin where they were, or with the first rollout.
function walk(event) {
  const free = event.target === document.body;
  const box =
    event.target.closest(".text") ?? (free ? (shown?.last?.parentElement ?? $("group").querySelector(".text")) : null);
  const spans = box?.shows?.spans;
  if (!spans?.length) return false;
  if (free && !(event.key in OWN)) return false; // the page scrolls
  if (free && shown.last) {
    focusToken(shown.last);
    return true;
  }
  const place = tokenOf(event.target)?.place ?? (event.key === "ArrowLeft" && !free ? spans.length : -1);
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
  const { panel, rollout } = span.parentElement.shows;
  const token = identity(panel.data.tokens, rollout.cells.token[rollout.at[span.place]]);
  focusToken(span);
  mark(shown.marked === token ? null : token);
});
addEventListener("scroll", hideTip, { passive: true });

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
