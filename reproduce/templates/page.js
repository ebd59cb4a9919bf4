"use strict";
// Headers become buttons here, and not in the markup: without scripts there is nothing to press in vain.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  if (original.length < 2) continue;

  const compare = (column, isNumber, sign) => (one, other) => {
    const [a, b] = [one, other].map((row) => row.cells[column].dataset.sort);
    if (a === "" || b === "") return (a === "") - (b === ""); // what has no value stays last in either direction
    if (!isNumber) return sign * a.localeCompare(b, undefined, { numeric: true });
    const [x, y] = [a, b].map((text) => Number(text.replace("inf", "Infinity")));
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return x === y ? 0 : sign * (x < y ? -1 : 1);
  };

  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const before = header.getAttribute("aria-sort");
      const isNumber = header.classList.contains("number");
      const order = { null: "ascending", ascending: "descending", descending: null }[before];
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      if (order) header.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      body.append(...(order ? [...original].sort(compare(column, isNumber, sign)) : original));
    });
  });
}

// On paper nothing can be pressed: what is folded is open while the page is printed.
const opened = [];
addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details:not([open])")) {
    folded.open = true;
    opened.push(folded);
  }
});
addEventListener("afterprint", () => opened.splice(0).forEach((folded) => { folded.open = false; }));
