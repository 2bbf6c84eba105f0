// Theme, help, and the beginning.

const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};

$("theme").onclick = () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
};
$("help-open").onclick = () => $("help").showModal();

async function begin() {
  index = await unpack("index");
  index.same = new Map(); // prompt -> its groups, by step
  for (const [number, group] of index.groups.entries()) {
    group.lower = group.prompt.toLowerCase();
    if (!index.same.has(group.prompt)) index.same.set(group.prompt, []);
    index.same.get(group.prompt).push(number);
  }
  for (const numbers of index.same.values())
    numbers.sort((x, y) => index.groups[x].step - index.groups[y].step || x - y);
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
  folding("about");
  if (index.panels.length) drawCurves();
  if (index.run) {
    let drawn = false;
    folding("run", () => {
      if (!drawn) drawRun();
      drawn = true;
    });
  }
  await open(false);
}

async function open(jump) {
  const number = fromHash();
  if (number !== null) return show(number, { jump });
  $("group").replaceChildren(
    make("p", {
      className: "warn",
      textContent: "This page does not have the group named in the address. Choose one from the list.",
    }),
  );
}

if (typeof DecompressionStream === "undefined") {
  $("waiting").textContent =
    "This browser cannot unpack the page's data, because it lacks DecompressionStream. Use a browser from 2023 or later.";
} else {
  begin();
}
