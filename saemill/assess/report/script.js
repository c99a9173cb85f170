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

function unfold() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (target && target.tagName === "DETAILS") {
    target.hidden = false;
    target.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", unfold);
unfold();

const latents = [...document.querySelectorAll(".latent")];
for (const link of document.querySelectorAll("a.n")) {
  if (!document.querySelector(link.hash)) link.replaceWith(link.textContent);
}
const form = document.getElementById("search");
if (latents.length) {
  const [input, output] = [form.querySelector("input"), form.querySelector("output")];
  let words;
  form.hidden = false;
  form.onsubmit = (event) => event.preventDefault();
  input.oninput = () => {
    words ??= latents.map((latent) =>
      [...latent.querySelectorAll(".peak, .tokens code, .whole")].map((token) => token.textContent.toLowerCase()).join("\n"));
    const query = input.value.trim().toLowerCase();
    const isNumber = /^\d+$/.test(query);
    let n = 0;
    latents.forEach((latent, i) => {
      const isFound = !query || (isNumber && latent.id === "latent-" + query) || (!isNumber && words[i].includes(query));
      latent.hidden = !isFound;
      n += isFound;
      if (isFound && isNumber) latent.open = true;
    });
    output.value = !query ? "" : n || !isNumber ? n + " found" : "not on this page: saemill latent RUN/SAE " + query;
    if (query && n) document.getElementById("latents").scrollIntoView();
  };
}
