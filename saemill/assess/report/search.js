// Finding latents: those on the page, and those that `source` has.
const AT_ONCE = 20;
const PAUSE_MS = 250;
const section = document.getElementById("latents");
const form = document.getElementById("search");
const output = form.querySelector("output");

function onPage() {
  return section ? [...section.querySelectorAll(".latent")] : [];
}

async function get(number) {
  const there = document.getElementById(`latent-${number}`);
  if (there) return there;
  if (!source) throw Error(`not on this page: saemill latent RUN/SAE ${number}`);
  if (number >= source.n) throw Error(`there are latents 0 to ${source.n - 1}`);
  const template = document.createElement("template");
  template.innerHTML = await source.latent(number);
  const latent = document.getElementById(`latent-${number}`) ?? template.content.querySelector(".latent");
  latent.dataset.found = "";
  section.querySelector(".found").append(latent);
  return latent;
}

async function unfold() {
  const [, number] = location.hash.match(/^#latent-(\d+)$/) ?? [];
  try {
    const target = number && section ? await get(Number(number)) : document.getElementById(location.hash.slice(1));
    if (target?.tagName !== "DETAILS") return;
    target.hidden = false;
    target.open = true;
    target.scrollIntoView();
  } catch (error) {
    output.value = error.message;
  }
}
addEventListener("hashchange", unfold);
unfold();

if (!source) {
  for (const link of document.querySelectorAll("a.n")) {
    if (!document.querySelector(link.hash)) link.replaceWith(link.textContent);
  }
}

if (section) {
  const input = form.querySelector("input");
  const more = section.querySelector(".more");
  const words = new Map();
  let [turn, rest, pause] = [0, [], 0];
  form.hidden = false;
  form.onsubmit = (event) => event.preventDefault();
  more.onclick = () => next(turn);
  input.oninput = () => {
    clearTimeout(pause);
    pause = setTimeout(() => search(input.value.trim().toLowerCase(), ++turn), PAUSE_MS);
  };

  async function search(query, own) {
    [rest, more.hidden] = [[], true];
    const isNumber = /^\d+$/.test(query);
    const found = [];
    for (const latent of onPage()) {
      const drawn = latent.dataset.found === undefined;
      latent.hidden = query ? isNumber || !drawn || !wordsOf(latent).includes(query) : !drawn;
      if (query && !latent.hidden) found.push(Number(latent.id.slice("latent-".length)));
    }
    output.value = !query || isNumber ? "" : `${found.length} found`;
    if (!query) return;
    try {
      await (isNumber ? searchNumber(Number(query), own) : searchWord(query, own, found));
    } catch (error) {
      if (own === turn) output.value = (isNumber ? "" : `${found.length} found on this page; `) + error.message;
    }
    if (own === turn) section.scrollIntoView();
  }

  async function searchNumber(number, own) {
    const latent = await get(number);
    if (own !== turn) return;
    [latent.hidden, latent.open, output.value] = [false, true, "1 found"];
  }

  async function searchWord(query, own, found) {
    const every = source ? await source.find(query) : [];
    if (own !== turn) return;
    rest = every.filter((number) => !found.includes(number));
    output.value = `${found.length + rest.length} found`;
    await next(own);
  }

  async function next(own) {
    const latents = await Promise.all(rest.slice(0, AT_ONCE).map(get));
    if (own !== turn) return;
    rest = rest.slice(AT_ONCE);
    for (const latent of latents) {
      latent.hidden = false;
      if (latent.dataset.found !== undefined) section.querySelector(".found").append(latent);
    }
    [more.hidden, more.textContent] = [!rest.length, `show more: ${rest.length} are left`];
  }

  function wordsOf(latent) {
    if (!words.has(latent)) {
      const tokens = [...latent.querySelectorAll(".peak, .tokens code, .whole")];
      words.set(latent, tokens.map((token) => token.textContent.toLowerCase()).join("\n"));
    }
    return words.get(latent);
  }
}
