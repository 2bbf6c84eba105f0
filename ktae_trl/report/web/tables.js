// Tables of tokens that can be sorted: key tokens, tokens by the chosen series, and those on which methods disagree.

const TABLE_PIECE = 100;

// columns: {name, hint, value(row), cell(row), up}; `up` sorts ascending first; `head` is shown instead of the name.
// The rows are sorted by the column `by`, or if `bySize` by its size, without the sign. `folded(row)` hides rows behind a
// button, which says `why`.
function sortable({ columns, rows, by, bySize = false, folded = () => false, why = "", note = null, id = String }) {
  let [column, order, told, unfolded] = [
    columns.find(({ name }) => name === by),
    bySize ? "other" : "descending",
    TABLE_PIECE,
    false,
  ];
  const body = make("tbody");
  const [more, unfold] = [0, 1].map(() => make("button", { type: "button", className: "more" }));
  const headers = columns.map((own) => {
    if (own.head) return make("th", { scope: "col", ariaLabel: own.name }, own.head);
    const button = make("button", { type: "button", textContent: own.name, title: own.hint ?? "" });
    button.onclick = () => {
      order = (column === own && order !== "other" ? order === "descending" : own.up) ? "ascending" : "descending";
      column = own;
      draw();
    };
    return make("th", { scope: "col" }, button);
  });
  const compare = (x, y) => {
    const [u, v] = [column.value(x), column.value(y)];
    if (typeof u === "string" && typeof v === "string") return u.localeCompare(v);
    return order === "other" ? Math.abs(asNumber(u)) - Math.abs(asNumber(v)) : asNumber(u) - asNumber(v);
  };
  const draw = () => {
    const sorted = [...rows].sort((x, y) => (order === "ascending" ? 1 : -1) * compare(x, y)); // stable
    const open = sorted.filter((row) => !folded(row));
    const all = unfolded ? sorted : open;
    for (const [i, header] of headers.entries()) header.ariaSort = columns[i] === column ? order : "none";
    body.replaceChildren(
      ...all.slice(0, told).map((row) => {
        const line = make("tr", {}, ...columns.map((own) => own.cell(row)));
        line.dataset.token = id(row);
        return line;
      }),
    );
    more.hidden = told >= all.length;
    more.textContent = `Show ${Math.min(TABLE_PIECE, all.length - told)} more of ${all.length}`;
    unfold.hidden = open.length === rows.length;
    unfold.textContent = unfolded ? "Fold" : `Show ${rows.length - open.length} ${why}`;
    select();
  };
  const select = () => {
    for (const line of body.rows) {
      if (shown && line.dataset.token === shown.marked) line.ariaSelected = "true";
      else line.removeAttribute("aria-selected");
    }
  };
  more.onclick = () => {
    told += TABLE_PIECE;
    draw();
  };
  unfold.onclick = () => {
    unfolded = !unfolded;
    draw();
  };
  draw();
  const element = make(
    "div",
    {},
    make("table", {}, make("thead", {}, make("tr", {}, ...headers)), body),
    more,
    unfold,
    note && make("p", { className: "note", textContent: note }),
  );
  return { element, draw, select };
}

const numberCell = (text, title = "") => make("td", { className: "number", textContent: text, title });
const shadedCell = (scale, x, text, title = "") =>
  make(
    "td",
    { className: "number", title },
    make("span", { className: `value ${shadeClass(scale, x)}`, textContent: text }),
  );

// A token is marked by its id and text, by which it is found in other groups too.
const identity = (tokens, i) => `${tokens.id[i]} ${tokens.text[i]}`;

function nameCell(tokens, i) {
  const name = make("button", {
    type: "button",
    className: "name",
    textContent: oneLine(tokens.text[i]),
    title: "Highlight all occurrences",
  });
  name.onclick = () => mark(shown.marked === identity(tokens, i) ? null : identity(tokens, i), true);
  return make("td", {}, name);
}

const K_SCALE = diverging((x) => x, "−1 wrong", "correct +1");

// D is huge if a token occurs on one side only. Then only its sign matters, because K is saturated.
const direction = (D) => (Math.abs(asNumber(D)) >= 10 ? (D > 0 ? "≫ 0" : "≪ 0") : decimal(D, true, 2));

function tables(panel) {
  const { method } = panel;
  const [keys, means, apart] = [method.key_tokens ? keyTokens(panel) : null, ofSeries(panel), disagreement(panel)];
  const found = (shown.view === "side" ? [apart, means, keys] : [means, keys, apart]).filter(Boolean);
  shown.tables = found.map(({ sorted }) => sorted).filter(Boolean);
  return make("aside", { id: "tables" }, ...found.map(({ box }) => box));
}

const boxed = (name, title, sorted, empty = "") => ({
  sorted,
  box: make(
    "details",
    {
      className: `table ${name}`,
      open: look[name] ?? !narrow(1350),
      ontoggle: ({ target }) => {
        look[name] = target.open;
      },
    },
    make("summary", { textContent: title }),
    sorted ? sorted.element : make("p", { className: "note", textContent: empty }),
  ),
});

function keyTokens(panel) {
  const {
    data: { tokens, right, wrong },
  } = panel;
  const rows = tokens.id.map((_, i) => i).filter((i) => tokens.p[i] !== null);
  if (!rows.length)
    return boxed("keys", "Key tokens", null, "None: this group does not have both correct and wrong rollouts.");
  const size = (i) => Math.abs(asNumber(tokens.K[i]));
  const exact = (i) => `D = ${decimal(tokens.D[i], true)}`;
  const sorted = sortable({
    id: (i) => identity(tokens, i),
    rows: rows.sort((x, y) => asNumber(tokens.IG[y]) - asNumber(tokens.IG[x])), // decides between equal ones
    by: "K",
    bySize: true,
    folded: (i) => !size(i) || (thresholds() && tooWeak(panel, i)),
    why: thresholds() ? "with K = 0 or faded" : "with K = 0",
    note: panel.method.leave_one_out
      ? "This table shows K of the whole group. The colours and tooltips show K computed without the token’s own rollout."
      : null,
    columns: [
      { name: "token", up: true, value: (i) => tokens.text[i], cell: (i) => nameCell(tokens, i) },
      {
        name: "correct",
        hint: "correct rollouts that contain it (a)",
        value: (i) => tokens.a[i],
        cell: (i) => numberCell(`${tokens.a[i]} of ${right}`),
      },
      {
        name: "wrong",
        hint: "wrong rollouts that contain it (b)",
        value: (i) => tokens.b[i],
        cell: (i) => numberCell(`${tokens.b[i]} of ${wrong}`),
      },
      {
        name: "p",
        up: true,
        hint: "two-sided p-value of Fisher’s exact test",
        value: (i) => tokens.p[i],
        cell: (i) => numberCell(probability(tokens.p[i])),
      },
      {
        name: "IG",
        hint: "information gain in bits",
        value: (i) => tokens.IG[i],
        cell: (i) => numberCell(decimal(tokens.IG[i], false, 3)),
      },
      {
        name: "D",
        hint: "direction",
        value: (i) => tokens.D[i],
        cell: (i) => numberCell(direction(tokens.D[i]), exact(i)),
      },
      {
        name: "K",
        hint: "key-token value",
        value: (i) => tokens.K[i],
        cell: (i) => shadedCell(K_SCALE, tokens.K[i], decimal(tokens.K[i], true, 3)),
      },
    ],
  });
  return boxed("keys", `Key tokens (${rows.length})`, sorted);
}

// Means of a series over the positions of each token that are trained on. K has its own table, and A' follows from it.
function ofSeries(panel) {
  const series = chosen(panel);
  if (series.method?.key_tokens || !(series.method || series.array || series.both)) return null;
  const { tokens } = panel.data;
  const found = tokens.id.map(() => []);
  for (const r of panel.data.rollouts) {
    r.at.forEach((cell, i) => {
      const x = series.of(r, i);
      if (r.cells.trained[cell] && isNumber(x)) found[r.cells.token[cell]].push(x);
    });
  }
  const rows = found.flatMap((numbers, i) =>
    numbers.length
      ? [
          {
            i,
            times: numbers.length,
            mean: mean(numbers),
            size: mean(numbers.map((x) => Math.abs(series.both ? x : series.scale.shade(x)))),
          },
        ]
      : [],
  );
  if (!rows.length) return null;
  const sizeColumn = {
    name: "mean size",
    hint: "mean of the absolute differences",
    value: (row) => row.size,
    cell: (row) => numberCell(brief(row.size)),
  };
  const sorted = sortable({
    id: ({ i }) => identity(tokens, i),
    rows: rows.sort((x, y) => y.size - x.size),
    by: series.both ? "mean size" : "mean",
    bySize: true,
    folded: ({ i }) => thresholds() && tooWeak(panel, i),
    why: "faded",
    note: series.both
      ? "Means over the token’s occurrences that are trained on. Size: without the sign."
      : "Means over the token’s occurrences that are trained on.",
    columns: [
      { name: "token", up: true, value: ({ i }) => tokens.text[i], cell: ({ i }) => nameCell(tokens, i) },
      { name: "times", value: ({ times }) => times, cell: ({ times }) => numberCell(String(times)) },
      { name: "mean", value: (row) => row.mean, cell: (row) => shadedCell(series.scale, row.mean, brief(row.mean)) },
      ...(series.both ? [sizeColumn] : []),
    ],
  });
  return boxed("means", `Tokens by ${series.name}`, sorted);
}

const RANKED =
  "Each method ranks the tokens of the group that are trained on by what it does to their advantage, from 0 (lowers it " +
  "most, or raises it least) to 100; equal values share the mean of their ranks. The table has means over a token’s " +
  "occurrences; “apart” is the largest minus the smallest rank at each occurrence.";

// What a method does to a token's advantage A, up to a factor that is the same for all of its tokens.
function pull({ how }, value, A) {
  if (!isNumber(value)) return null;
  return { scale: Math.sign(A) * (value - 1), replace: value - A }[how] ?? value;
}

// Ranks from 0 (smallest) to 1; equal numbers share the mean of their ranks.
function ranks(numbers) {
  const order = numbers.map((x, i) => [x, i]).sort(([x], [y]) => x - y);
  const found = new Array(numbers.length);
  for (let i = 0, j; i < order.length; i = j) {
    for (j = i; j < order.length && order[j][0] === order[i][0]; j++);
    for (let k = i; k < j; k++) found[order[k][1]] = order.length > 1 ? (i + j - 1) / 2 / (order.length - 1) : 0.5;
  }
  return found;
}

function disagreement(panel) {
  const some = panel.series.filter((series) => series.method);
  if (some.length < 2) return null;
  const { tokens } = panel.data;
  const places = [];
  for (const r of panel.data.rollouts) {
    r.at.forEach((cell, i) => {
      const pulls = some.map((series) => pull(series.method, series.of(r, i), asNumber(r.advantage)));
      if (r.cells.trained[cell] && pulls.every(isNumber)) places.push({ token: r.cells.token[cell], pulls });
    });
  }
  const ranked = some.map((_, m) => ranks(places.map(({ pulls }) => pulls[m])));
  const found = new Map();
  places.forEach(({ token }, at) => {
    if (!found.has(token)) found.set(token, []);
    found.get(token).push(ranked.map((own) => own[at]));
  });
  const rows = [...found].map(([i, all]) => ({
    i,
    times: all.length,
    apart: mean(all.map((own) => Math.max(...own) - Math.min(...own))),
    ranks: some.map((_, m) => mean(all.map((own) => own[m]))),
  }));
  const percent = (x) => (100 * x).toFixed(0);
  const scale = diverging((x) => 2 * x - 1);
  const sorted = sortable({
    id: ({ i }) => identity(tokens, i),
    rows: rows.sort((x, y) => y.times - x.times),
    by: "apart",
    folded: ({ i }) => thresholds() && tooWeak(panel, i),
    why: "faded",
    note: RANKED,
    columns: [
      { name: "token", up: true, value: ({ i }) => tokens.text[i], cell: ({ i }) => nameCell(tokens, i) },
      { name: "times", value: ({ times }) => times, cell: ({ times }) => numberCell(String(times)) },
      { name: "apart", value: ({ apart }) => apart, cell: ({ apart }) => numberCell(percent(apart)) },
      ...some.map((series, m) => ({
        name: series.short,
        hint: series.name,
        value: (row) => row.ranks[m],
        cell: (row) => shadedCell(scale, row.ranks[m], percent(row.ranks[m])),
      })),
    ],
  });
  return boxed("apart", "Where the methods disagree", sorted);
}
