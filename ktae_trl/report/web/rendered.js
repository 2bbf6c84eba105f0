// Markdown and formulas, rendered when the page was written: lists of a tag, perhaps attributes, and children.
// Only elements and attributes that the page allows are made, whatever the list contains.

function grown(trees) {
  return trees.flatMap((tree) => {
    if (typeof tree === "string") return [tree];
    const [tag, ...rest] = tree;
    const attributes = rest.length && typeof rest[0] === "object" && !Array.isArray(rest[0]) ? rest.shift() : {};
    const children = grown(rest);
    const { html, math, attributes: names } = index.allowed;
    if (!html.includes(tag) && !math.includes(tag)) return children;
    const space = math.includes(tag) ? "http://www.w3.org/1998/Math/MathML" : "http://www.w3.org/1999/xhtml";
    const element = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) if (names.includes(name)) element.setAttribute(name, value);
    element.append(...children);
    return [element];
  });
}
