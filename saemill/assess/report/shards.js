// The latents that lie beside the page, in scripts that call `shard`.
const beside = document.getElementById("latents")?.dataset ?? {};
const asked = new Map();
const calls = new Map();
globalThis.shard = (name, packed) => calls.get(name)?.(packed);

function load(name) {
  if (!asked.has(name)) {
    const script = document.createElement("script");
    script.src = `${beside.folder}/${name}.js`;
    const content = new Promise((resolve, reject) => {
      calls.set(name, resolve);
      script.onerror = () => reject(Error(`${script.getAttribute("src")} is not beside this page: copy the whole folder to it`));
      script.onload = () => reject(damaged(name));
    }).then((packed) => unpack(packed).catch(() => { throw damaged(name); })).then(checked);
    content.catch(() => asked.delete(name));
    asked.set(name, content);
    document.head.append(script);
  }
  return asked.get(name);
}

function damaged(name) {
  return Error(`${beside.folder}/${name}.js is damaged: run saemill assess again`);
}

async function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function checked(content) {
  if (content.stamp !== beside.stamp) {
    throw Error(`the folder ${beside.folder} beside this page is of another assessment: copy the one that was written with it`);
  }
  return content;
}

const source = beside.folder && {
  n: Number(beside.n),
  async latent(number) {
    return (await load(String(Math.floor(number / beside.per)))).latents[number];
  },
  async find(query) {
    const { words } = await load("words");
    const [whole, within] = [[], []];
    words.forEach((lines, number) => {
      if (`\n${lines}\n`.includes(`\n${query}\n`)) whole.push(number);
      else if (lines.includes(query)) within.push(number);
    });
    return [...whole, ...within];
  },
};

