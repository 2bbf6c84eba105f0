// Elements, numbers, packed data. All files in this folder form one script.
// Prompts and tokens are untrusted: they are inserted as text (textContent), never as markup.
const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
};
const pause = () => new Promise((resolve) => setTimeout(resolve));
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
const narrow = (width = 860) => matchMedia(`(max-width: ${width}px)`).matches;

// The script runs before the whole page is parsed, to show the first group early. Data is complete if something follows.
const parsed = new Promise((resolve) => document.addEventListener("DOMContentLoaded", resolve));

async function unpack(id) {
  if (!$(id)?.nextSibling) await parsed;
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
const brief = (x, digits = 4) =>
  x === null ? "–" : typeof x === "string" ? minus(x) : minus(String(Number(x.toPrecision(digits))));
const isNumber = (x) => typeof x === "number";
const asNumber = (x) => (isNumber(x) ? x : 0);
const mean = (numbers) => numbers.reduce((sum, x) => sum + x, 0) / numbers.length;
const oneLine = (text) => text.replace(/[\n\t]/g, "").replaceAll(" ", "␣");

let index; // groups, methods, panels of curves, levels
let shown = null; // what is displayed of groups: {panels, view, marked, ...}
