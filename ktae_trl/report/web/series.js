// What tokens are coloured by: the method's value, A', the values of compared methods, arrays, and differences of two.
//
// A series has a number for each token, `of(rollout, i)`, or null. Its scale turns numbers into shades: those of kind
// "v" run from orange (-1) through no colour (0) to blue (1), those of kind "s" from no colour (0) to green (1).

// Other arrays keep their names.
const ARRAYS = new Map(Object.entries({ log_probability: "log-probability", ratio: "importance ratio" }));

// What the user chose, for all groups.
const look = { series: null, minus: "", p: 1, support: 1, size: 0, view: "columns", rendered: false };

const diverging = (shade, low, high) => ({ kind: "v", shade, ends: [low, high] });
const sequential = (shade, low, high) => ({ kind: "s", shade, ends: [low, high] });

function shadeClass(scale, x) {
  const shade = isNumber(x) ? Math.max(-1, Math.min(1, scale.shade(x))) : 0;
  return scale.kind === "v"
    ? `v${index.levels + Math.round(shade * index.levels)}`
    : `s${Math.round(Math.max(0, shade) * index.levels)}`;
}

// The value below which 99% of the numbers are: a few extreme ones do not make all others pale.
function nearlyLargest(numbers) {
  const sorted = numbers.toSorted((x, y) => x - y);
  return sorted[Math.floor((sorted.length - 1) * 0.99)] || sorted[sorted.length - 1] || 1;
}

function around0(numbers) {
  const end = nearlyLargest(numbers.map(Math.abs));
  return diverging((x) => x / end, `${brief(-end)} or less`, `${brief(end)} or more`);
}

function arrayScale(name, numbers) {
  if (numbers.every((x) => x === 0 || x === 1)) return sequential((x) => x, "0", "1");
  if (/ratio/i.test(name)) {
    const log = (x) => Math.log(Math.max(x, 1e-9));
    const end = Math.max(0.01, nearlyLargest(numbers.map((x) => Math.abs(log(x)))));
    return diverging((x) => log(x) / end, `${brief(Math.exp(-end))} or less`, `${brief(Math.exp(end))} or more`);
  }
  const logs = /log.?prob/i.test(name);
  if (!logs && numbers.some((x) => x < 0) && numbers.some((x) => x > 0)) return around0(numbers);
  const most = logs ? 5 : /entropy/i.test(name) ? 3 : Infinity;
  const end = Math.min(most, nearlyLargest(numbers.map(Math.abs)));
  const below = logs || numbers.some((x) => x < 0);
  return sequential((x) => (below ? -x : x) / end, "0", below ? `${brief(-end)} or less` : `${brief(end)} or more`);
}

function valueScale(method, numbers) {
  if (method.how === "scale") return diverging((w) => w - 1, `${method.value.symbol} = 0`, "2 or more");
  if (method.how === "replace") return largestScale(numbers);
  return method.key_tokens ? diverging((x) => x, "−1 wrong", "correct +1") : diverging((x) => x, "−1", "+1");
}

function largestScale(numbers) {
  const most = numbers.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
  return diverging((x) => x / most, decimal(-most, true), decimal(most, true));
}

function allSeries({ data, method }) {
  const all = [];
  const add = (name, of, scaleOf, more = {}) => {
    let scale = null; // computed when it is first needed
    const numbers = () => data.rollouts.flatMap((r) => r.at.map((_, i) => of(r, i))).filter(isNumber);
    all.push({
      name,
      of,
      ...more,
      get scale() {
        return (scale ??= scaleOf(numbers()));
      },
    });
  };
  const methods = methodsOf({ method });
  const beginning = ({ title }) => title.split(" (")[0];
  const short = (own) => {
    if (methods.length === 1) return own.value.symbol;
    return methods.some((other) => other !== own && beginning(other) === beginning(own)) ? own.title : beginning(own);
  };
  const titled = (own) => (methods.length > 1 ? `${own.title}: ${own.value.name}` : own.value.name);
  for (const own of methods) {
    const of =
      own === method
        ? (r, i) => r.cells.value[r.at[i]]
        : (r, i) => r.compared[method.compared.indexOf(own)]?.[i] ?? null;
    add(titled(own), of, (numbers) => valueScale(own, numbers), { method: own, short: short(own) });
  }
  if (!method.key_tokens) {
    const K = (r, i) =>
      r.cells.trained[r.at[i]] || method.shares_tokens ? data.tokens.K[r.cells.token[r.at[i]]] : null;
    add("key-token value K (computed for this page, not used in training)", K, () =>
      diverging((x) => x, "−1 wrong", "correct +1"),
    );
  }
  add("token advantage A'", (r, i) => r.cells.advantage[r.at[i]], largestScale);
  const names = new Set(data.rollouts.flatMap((r) => Object.keys(r.arrays)));
  for (const name of names) {
    add(
      ARRAYS.get(name) ?? name,
      (r, i) => r.arrays[name]?.[i] ?? null,
      (numbers) => arrayScale(name, numbers),
      { array: true },
    );
  }
  return all;
}

// The method that the run was trained with and those that it is compared with, if they have values.
const methodsOf = ({ method }) => [method, ...method.compared].filter((own) => own.value);

function difference(panel, name, one, other) {
  const of = (r, i) => {
    const [x, y] = [one.of(r, i), other.of(r, i)];
    return isNumber(x) && isNumber(y) ? x - y : null;
  };
  const numbers = panel.data.rollouts.flatMap((r) => r.at.map((_, i) => of(r, i))).filter(isNumber);
  return { name, of, scale: around0(numbers), both: [one, other] };
}

// The series that a group is coloured by.
function chosen(panel) {
  const one = panel.series.find((series) => series.name === look.series) ?? panel.series[0];
  const other = panel.series.find((series) => series.name === look.minus && series !== one);
  if (!other) return one;
  const name = `${one.name} − ${other.name}`;
  if (panel.difference?.name !== name) panel.difference = difference(panel, name, one, other);
  return panel.difference;
}

// The thresholds fade tokens that fewer rollouts contain, whose p is larger, or whose |K| is smaller.
const thresholds = () => look.p < 1 || look.support > 1 || look.size > 0;

function tooWeak({ data: { tokens }, method }, token) {
  if (tokens.p[token] === null) return true;
  if (tokens.a[token] + tokens.b[token] < look.support || asNumber(tokens.p[token]) > look.p) return true;
  return method.key_tokens && Math.abs(asNumber(tokens.K[token])) < look.size;
}

const faded = (panel, rollout, cell) => thresholds() && tooWeak(panel, rollout.cells.token[cell]);
