"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = sign === 1 ? "ascending" : "descending";
      for (const body of table.tBodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("label"));
        body.append(...rows.sort((a, b) => sign * compare(a.cells[column], b.cells[column], sign)));
      }
    };
  });
}

function compare(a, b, sign) {
  const [x, y] = [a.dataset.v, b.dataset.v];
  if (x !== undefined && y !== undefined) return x - y;
  if (x !== undefined || y !== undefined) return sign * (x === undefined ? 1 : -1);
  return a.textContent.localeCompare(b.textContent, undefined, { numeric: true });
}

