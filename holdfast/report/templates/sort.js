"use strict";
// Heads of tables become buttons that sort by their column: once from the top, once more upwards.
const known = text => /^[+\u2212-]?\d/.test(text);
const number = text => parseFloat(text.replace(/\u202f/g, "").replace("\u2212", "-"));
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2) continue;
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rows = [...body.rows].map(row => [row.cells[column].textContent.trim(), row]);
      const numbers = column > 0 && rows.some(([text]) => known(text));
      const first = numbers ? "descending" : "ascending";
      const second = numbers ? "ascending" : "descending";
      const way = head.getAttribute("aria-sort") === first ? second : first;
      const sign = way === "ascending" ? 1 : -1;
      rows.sort(([a], [b]) => numbers
        ? known(b) - known(a) || sign * (number(a) - number(b)) || 0
        : sign * a.localeCompare(b, "en", { numeric: true }));
      for (const each of heads) each.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way);
      body.append(...rows.map(([, row]) => row));
    });
  });
}
