// The whole run: the tokens that are key in most groups, step by step. A click on a cell goes to an example.

async function drawRun() {
  const { tokens, found } = await unpack("run-data");
  const steps = [...new Set(index.groups.map(({ step }) => step))].sort((x, y) => x - y);
  const rows = tokens.id.map((_, i) => ({ i, all: [] }));
  for (const [i, group, K] of found) rows[i].all.push({ group, K, step: index.groups[group].step });
  for (const row of rows) {
    row.correct = row.all.filter(({ K }) => K > 0).length;
    row.wrong = row.all.length - row.correct;
    row.all.sort((x, y) => Math.abs(y.K) - Math.abs(x.K) || x.group - y.group);
  }
  // A click goes to the strongest example, further clicks to the next ones.
  const example = (row, step = null) => {
    const some = row.all.filter((own) => step === null || own.step === step);
    const place = some.findIndex((own) => own.group === current);
    const next = shown?.marked === identity(tokens, row.i) && place >= 0 ? some[(place + 1) % some.length] : some[0];
    visit(next.group, identity(tokens, row.i));
  };
  const name = (row) => {
    const button = make("button", {
      type: "button",
      className: "name",
      textContent: oneLine(tokens.text[row.i]),
      title: "Go to the strongest example; again: to the next",
    });
    button.onclick = () => example(row);
    return make("td", {}, button);
  };
  const strip = (row) =>
    make(
      "td",
      {},
      make(
        "div",
        { className: "heat" },
        ...steps.map((step) => {
          const some = row.all.filter((own) => own.step === step);
          if (!some.length) return make("i");
          const K = mean(some.map((own) => own.K));
          const told = `step ${step}: key in ${plural(some.length, "group")}, mean K ${decimal(K, true, 2)}`;
          const cell = make("button", {
            type: "button",
            className: shadeClass(K_SCALE, K),
            textContent: some.length,
            title: told,
            ariaLabel: told,
          });
          cell.onclick = () => example(row, step);
          return cell;
        }),
      ),
    );
  const sorted = sortable({
    id: ({ i }) => identity(tokens, i),
    rows,
    by: "groups",
    columns: [
      { name: "token", up: true, value: ({ i }) => tokens.text[i], cell: name },
      {
        name: "groups",
        hint: "groups in which the token is key",
        value: ({ all }) => all.length,
        cell: ({ all }) => numberCell(String(all.length)),
      },
      {
        name: "correct",
        hint: "of these, those in which it is associated with correct rollouts (K > 0)",
        value: ({ correct }) => correct,
        cell: ({ correct }) => numberCell(String(correct)),
      },
      {
        name: "wrong",
        hint: "of these, those in which it is associated with wrong rollouts (K < 0)",
        value: ({ wrong }) => wrong,
        cell: ({ wrong }) => numberCell(String(wrong)),
      },
      { name: "steps", head: stepNumbers(steps), cell: strip },
    ],
  });
  $("run").append(sorted.element);
}

// The heads of the strips: the steps, or if there are many, every few.
function stepNumbers(steps) {
  const every = Math.ceil(steps.length / 12);
  return make(
    "div",
    { className: "heat heads" },
    ...steps.map((step, i) => make("i", { textContent: i % every ? "" : step })),
  );
}
