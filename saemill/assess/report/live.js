// What a server behind the page knows: any latent, and a model to try them on.
async function ask(path, body) {
  const how = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, how).catch(() => { throw Error("saemill view has ended: start it again"); });
  const content = await answer.json();
  if (!answer.ok) throw Error(content.error);
  return content;
}

const source = {
  n: Number(document.getElementById("latents").dataset.n),
  latent: async (number) => (await ask(`latents/${number}`)).html,
  find: async (query) => (await ask(`find?word=${encodeURIComponent(query)}`)).latents,
};

async function working(form, output, work) {
  const started = performance.now();
  const buttons = form.querySelectorAll("button");
  buttons.forEach((button) => { button.disabled = true; });
  output.value = "working …";
  try {
    await work();
    output.value = `${((performance.now() - started) / 1000).toFixed(1)} s`;
  } catch (error) {
    output.value = error.message;
  }
  buttons.forEach((button) => { button.disabled = false; });
}

function made(tag, text, values = {}) {
  return Object.assign(document.createElement(tag), { textContent: text }, values);
}

function linkTo(latent) {
  return made("a", latent, { href: `#latent-${latent}`, className: "n" });
}

const reading = document.getElementById("read");
const steering = document.getElementById("steer");
const fired = document.getElementById("fired");

if (reading) {
  reading.onsubmit = (event) => {
    event.preventDefault();
    working(reading, reading.querySelector("output"), async () => {
      const { tokens } = await ask("read", { text: reading.text.value });
      fired.replaceChildren();
      const buttons = tokens.map((token) => made("button", token.text, { type: "button" }));
      const largest = shade(tokens, buttons, ({ latents: [[, act] = [0, 0]] }) => act);
      buttons.forEach((button, at) => { button.onclick = () => list(tokens, buttons, at, largest); });
      document.getElementById("tokens").replaceChildren(...buttons);
    });
  };
}

function shade(tokens, buttons, actOf) {
  const acts = tokens.map(actOf);
  const largest = Math.max(...acts.map(Math.abs)) || 1;
  buttons.forEach((button, at) => {
    const level = acts[at] ? Math.max(1, Math.round(9 * Math.abs(acts[at]) / largest)) : 0;
    button.className = `a${level}${tokens[at].left_out ? " left" : ""}`;
    button.title = acts[at] ? acts[at].toPrecision(3) : "";
  });
  return largest;
}

function list(tokens, buttons, at, largest) {
  const token = tokens[at];
  buttons.forEach((button, other) => button.classList.toggle("chosen", other === at));
  fired.replaceChildren(made("h4", token.latents.length ? `${token.latents.length} latents fire on “${token.text}”` : `No latent fires on “${token.text}”`));
  for (const [latent, act] of token.latents) {
    const line = made("p", "");
    const bar = made("progress", "", { max: largest, value: Math.abs(act) });
    const where = made("button", "where", { type: "button", title: "shade the text by this latent" });
    where.onclick = () => shade(tokens, buttons, ({ latents }) => new Map(latents).get(latent) ?? 0);
    line.append(linkTo(latent), bar, made("small", act.toPrecision(3)), where);
    if (steering) {
      const choose = made("button", "add it", { type: "button" });
      choose.onclick = () => { steering.latent.value = latent; steering.scrollIntoView(); };
      line.append(choose);
    }
    fired.append(line);
  }
}

if (steering) {
  steering.times.oninput = () => { steering.amount.value = Number(steering.times.value).toFixed(2); };
  steering.onsubmit = (event) => {
    event.preventDefault();
    working(steering, steering.said, async () => {
      const [latent, times, n_tokens, temperature] =
        ["latent", "times", "n_tokens", "temperature"].map((name) => Number(steering[name].value));
      const text = reading.text.value;
      const written = await ask("steer", { text, latent, times, n_tokens, temperature });
      const place = document.getElementById("written");
      const [plain, steered] = place.querySelectorAll("bdi");
      [plain.textContent, steered.textContent, place.hidden] = [written.plain, written.steered, false];
    });
  };
}

