// The list of groups: search, filters, order.

const LIST_PIECE = 100;
const KEPT_GROUPS = 8;

let found = []; // indices of the groups that pass the filters, in order
let listed = LIST_PIECE;
let filtering = 0;
let current = null; // index of the selected group, which may not be unpacked yet
const kept = new Map();
const searched = []; // texts of completions, in lower case

async function load(number) {
  const data = kept.get(number) ?? (await unpack(`block-${number}`));
  kept.delete(number);
  kept.set(number, data); // most recently used last
  if (kept.size > KEPT_GROUPS) kept.delete(kept.keys().next().value);
  return data;
}

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
  return data.rollouts
    .map((r) => r.at.map((c) => text[r.cells.token[c]]).join(""))
    .join("\0")
    .toLowerCase();
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
      if (searched[number] === undefined) {
        $("count").textContent = `Searching: ${number} of ${index.groups.length} …`;
        searched[number] = await completions(number);
        if (turn !== filtering) return;
      }
      if (!searched[number].includes(query)) continue;
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
  for (const [side, count] of [
    ["r", group.right],
    ["w", group.wrong],
  ]) {
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

function reveal(number) {
  const place = found.indexOf(number);
  if (place >= listed) {
    listed = Math.ceil((place + 1) / LIST_PIECE) * LIST_PIECE;
    list();
  }
  for (const link of $("list").querySelectorAll("a[aria-current]")) link.removeAttribute("aria-current");
  const link = linkOf(number);
  if (!link) return;
  link.setAttribute("aria-current", "true");
  const [own, all] = [link.getBoundingClientRect(), $("list").getBoundingClientRect()]; // the window does not scroll
  if (own.top < all.top || own.bottom > Math.min(all.bottom, innerHeight))
    $("list").scrollTop += own.top - all.top - all.height / 3;
}

function go(by, focus = false) {
  const place = found.indexOf(current);
  const number = found[place < 0 ? 0 : place + by];
  if (number === undefined) return;
  show(number, { jump: true });
  if (focus) linkOf(number).focus();
  history.replaceState(null, "", `#${key(index.groups[number])}`);
}

// The browser's own handling of a link would take the focus from the list.
$("list").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  visit(Number(link.dataset.number));
});

// Show a group as if its link was followed.
function visit(number, marked = null) {
  $("groups-open").ariaExpanded = "false"; // on a narrow screen the list covers the group
  history.pushState(null, "", `#${key(index.groups[number])}`);
  return show(number, { jump: true, marked });
}

$("groups-open").onclick = () => {
  $("groups-open").ariaExpanded = String($("groups-open").ariaExpanded !== "true");
};

// Without a group in the address, the most telling one is shown: the largest mean |K| of the most balanced groups.
function fromHash() {
  const wanted = location.hash.slice(1);
  if (!wanted) return mostTelling();
  const number = index.groups.findIndex((group) => key(group) === wanted);
  return number < 0 ? null : number;
}

function mostTelling() {
  const balance = (group) => {
    const fewer = Math.min(group.right, group.wrong);
    return fewer === 0 ? 0 : 4 * fewer < group.right + group.wrong ? 1 : 2; // as `_most_telling` in page.py
  };
  const better = (one, other) =>
    balance(one) === balance(other) ? asNumber(one.score) > asNumber(other.score) : balance(one) > balance(other);
  return found.reduce(
    (best, number) => (best === null || better(index.groups[number], index.groups[best]) ? number : best),
    null,
  );
}
