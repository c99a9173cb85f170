"""`saemill view`: what the page's server answers, whom it refuses, and the page itself in a browser."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from browser import NARROW, WIDE, browser
from pipeline import Pipeline

from saemill import Sae
from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.latent import run as show
from saemill.assess.report.latents import page_of
from saemill.assess.run import run as assess
from saemill.common.errors import ConfigError, StoreError
from saemill.common.stores import features
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.tokens import TokenStore
from saemill.embeddings.config import ImportConfig
from saemill.embeddings.run import run as take
from saemill.train.config import TrainConfig
from saemill.train.run import run as train
from saemill.view.config import ViewConfig
from saemill.view.run import open_server
from saemill.view.server import MOST_BYTES, Server


@contextmanager
def served(run: Path) -> Iterator[Server]:
    """A server that answers while the block runs."""
    with open_server(ViewConfig(run=run, port=0, device="cpu")) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def assessed(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: dict[str, str], tokenizer_folder: str, corpus: Path
) -> Pipeline:
    made = Pipeline(
        tmp_path_factory.mktemp("causal"), tiny_models["neox"], tokenizer_folder, corpus, "layers.1"
    )
    assess(AssessConfig(run=made.out, device="cpu", model_tokens=500, n_latents=8, most_beside=0))
    return made


@pytest.fixture(scope="module")
def server(assessed: Pipeline) -> Iterator[Server]:
    with served(assessed.out) as one:
        yield one


def ask(
    server: Server, path: str, body: Any = None, host: str | None = None, **headers: str
) -> tuple[int, Any]:
    """Status and content of an answer, had by Python's own client."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)) as client:
        named = {"Host": host or f"localhost:{server.server_port}"} | headers
        if body is None:
            client.request("GET", path, headers=named)
        else:
            named = {"Content-Type": "application/json"} | named
            client.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), named)
        answer = client.getresponse()
        content = answer.read()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(content) if is_json else content.decode()


def test_any_latent_is_served_as_the_terminal_has_it(server: Server, assessed: Pipeline) -> None:
    """Oracle: `saemill latent` of the same latents, rendered as on any page."""
    variant = features.load(assessed.out).variant
    found = show(LatentConfig(run=assessed.out / variant, latents=("0", "77"), device="cpu"))
    for latent in found.latents:
        plain = latent.model_copy(update={"asked": False})
        assert ask(server, f"/latents/{latent.latent}") == (200, {"html": page_of(plain, found)})
    assert ask(server, "/latents/128") == (400, {"error": "there are latents 0 to 127, got 128"})
    assert ask(server, "/latents/x")[0] == 404


def test_a_word_finds_the_latents_that_fire_on_it(server: Server, assessed: Pipeline) -> None:
    """Oracle: all activations of the cache at once, and the tokenizer's text of every id."""
    acts = ActivationStore(assessed.acts)
    sae = Sae.load(assessed.out / features.load(assessed.out).variant)
    kept = [acts.keep_addresses(i, acts.mask, side) for i in range(acts.n_shards) for side in (False, True)]
    kept_T = np.logical_or(kept[0], kept[1])
    assert acts.n_shards == 1
    encoded = sae.encode(acts.read("layers.1", 0, acts.n_tokens).float())
    acts_TF = torch.zeros(acts.n_tokens, 128).scatter_(1, encoded.top_indices, encoded.top_acts).numpy()
    acts_TF *= kept_T[:, None]
    tokenizer = transformers.AutoTokenizer.from_pretrained(acts.tokens.tokenizer_folder)
    ids_T = acts.tokens.rows(0, acts.tokens.n_rows).reshape(-1)
    for word in ("the", "THE ", "hill"):
        texts_T = np.array([tokenizer.decode([int(number)]).strip().lower() for number in ids_T])
        wanted = word.strip().lower()
        is_it = texts_T == wanted
        is_it = is_it if is_it[kept_T].any() else np.char.find(texts_T, wanted) >= 0
        share_F = acts_TF[is_it].sum(0) / np.maximum(acts_TF.sum(0), 1e-30)
        status, found = ask(server, f"/find?word={word.replace(' ', '%20')}")
        assert status == 200
        assert found["latents"]
        assert set(found["latents"]) == set(np.flatnonzero(share_F >= 0.1).tolist())
        shares = share_F[found["latents"]]
        assert (np.diff(shares) <= 1e-6).all()


def test_which_latents_fire_on_a_text(server: Server, assessed: Pipeline) -> None:
    """Oracle: transformers' own hidden state after the block, encoded by the SAE."""
    text = "The old man sat by the hill."
    status, answer = ask(server, "/read", {"text": text})
    assert status == 200
    model = transformers.AutoModel.from_pretrained(assessed.model)
    store = TokenStore(assessed.tokens)
    tokenizer = transformers.AutoTokenizer.from_pretrained(store.tokenizer_folder)
    ids = [*store.tokenizer.prefix_ids, *tokenizer(text, add_special_tokens=False).input_ids]
    ids += store.tokenizer.suffix_ids
    seen: list[torch.Tensor] = []
    model.layers[1].register_forward_hook(
        lambda _m, _i, out: seen.append(out if torch.is_tensor(out) else out[0])
    )
    with torch.no_grad():
        model(torch.tensor([ids]))
    x_SD = seen[0][0].bfloat16().float()  # as the store holds it
    codes = Sae.load(assessed.out / features.load(assessed.out).variant).encode(x_SD)
    assert "".join(token["text"] for token in answer["tokens"]).strip() == text
    assert len(answer["tokens"]) == len(ids)
    for token, acts, latents in zip(answer["tokens"], codes.top_acts, codes.top_indices, strict=True):
        expected = {int(i): float(a) for a, i in zip(acts, latents, strict=True) if a > 0}
        assert dict(token["latents"]) == pytest.approx(expected, rel=1e-3)
        listed = [act for _, act in token["latents"]]
        assert listed == sorted(listed, reverse=True)
    assert answer["tokens"][0]["left_out"]
    assert not answer["tokens"][2]["left_out"]


def test_the_model_writes_on_with_a_latent_added(server: Server, assessed: Pipeline) -> None:
    """Oracle: transformers' greedy loop without a cache, by a hook of one line that adds the decoder row."""
    variant = features.load(assessed.out).variant
    (latent,) = show(LatentConfig(run=assessed.out / variant, latents=("5",), device="cpu")).latents
    body = {"text": "The old man", "latent": 5, "times": 4.0, "n_tokens": 6, "temperature": 0.0}
    status, answer = ask(server, "/steer", body)
    assert status == 200
    assert answer["amount"] == pytest.approx(4 * (latent.largest or 1.0))
    model = transformers.AutoModelForCausalLM.from_pretrained(assessed.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TokenStore(assessed.tokens).tokenizer_folder)
    row = Sae.load(assessed.out / variant).W_dec[5]
    left_out = Sae.load(assessed.out / variant).config.provenance["left_out"]

    def written(amount: float) -> str:
        ids = list(tokenizer("The old man", add_special_tokens=False).input_ids)
        start = len(ids)

        def add(_module: Any, _inputs: Any, out: Any) -> Any:
            x = out if torch.is_tensor(out) else out[0]
            at = torch.tensor(
                [
                    i >= left_out["first_positions"] and ids[i] not in left_out["token_ids"]
                    for i in range(len(ids))
                ]
            )
            changed = torch.where(at[None, :, None], x + amount * row, x)
            return changed if torch.is_tensor(out) else (changed, *out[1:])

        hook = model.base_model.layers[1].register_forward_hook(add)
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        hook.remove()
        return tokenizer.decode(ids[start:])

    assert answer["plain"].strip() == written(0.0).strip()
    assert answer["steered"].strip() == written(answer["amount"]).strip()
    sampled = [ask(server, "/steer", body | {"temperature": 1.0})[1] for _ in range(2)]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/read", {"text": ""}, "the text has no token; write something"),
        ("/read", {"text": "old " * 40}, "and a row has 32; shorten it"),
        ("/read", {}, "the question text: Field required"),
        ("/read", b"{", "the question"),
        ("/steer", {"text": "a", "latent": 128, "times": 1.0, "n_tokens": 4, "temperature": 0.0}, "0 to 127"),
        ("/steer", {"text": "a", "latent": 1, "times": 1.0, "n_tokens": 999, "temperature": 0.0}, "1 to 256"),
        ("/steer", {"text": "a", "latent": 1, "times": 1e9, "n_tokens": 4, "temperature": 0.0}, "times"),
    ],
)
def test_what_is_wrong_is_said_in_words(server: Server, path: str, body: Any, told: str) -> None:
    """Oracle: the sentence, with a status that is no success."""
    status, answer = ask(server, path, body)
    assert status == 400
    assert told in answer["error"]


def test_only_its_own_page_may_ask(server: Server) -> None:
    """Oracle: HTTP's statuses: another name of this machine, another site's page, a form's body, a body
    without end, another method; each leaves the server at work."""
    port = server.server_port
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        assert ask(server, "/", host=host)[0] == 403
    assert ask(server, "/", host=f"127.0.0.1:{port}")[0] == 200
    for origin in ("http://evil.example", "null", f"https://localhost:{port}"):
        assert ask(server, "/read", {"text": "a"}, Origin=origin)[0] == 403
        assert ask(server, "/find?word=a", Origin=origin)[0] == 403
    assert ask(server, "/read", {"text": "a"}, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "/read", b"x", **{"Content-Length": str(MOST_BYTES + 1)})[0] == 413
    assert ask(server, "/read", {"text": "a"}, Origin=f"http://localhost:{port}")[0] == 200
    assert ask(server, "/../../etc/passwd")[0] == 404
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as client:
        client.request("DELETE", "/")
        assert client.getresponse().status == 501


def test_a_browser_tries_a_text(server: Server, tmp_path: Path) -> None:
    """Oracle: Chromium: tokens are shown, a latent of one leads to it, the model writes on; nothing in the
    console, nothing asked of another server, nothing wider than the window."""
    with browser(tmp_path) as tab:
        for size, scheme in ((WIDE, "light"), (NARROW, "dark")):
            tab.open(server.address, size, scheme)
            tab.type("#read textarea", "The old man sat.")
            tab.value("document.querySelector('#read button').click()")
            tab.until("document.querySelectorAll('#tokens button').length")
            tab.value("document.querySelectorAll('#tokens button')[2].click()")
            tab.value("document.querySelector('#fired button').click()")
            latent = tab.value("document.querySelector('#fired a').textContent")
            tab.value("document.querySelector('#fired a').click()")
            tab.until(f"document.getElementById('latent-{latent}')?.open")
            tab.value("document.querySelectorAll('#fired button')[1].click()")
            assert tab.value("document.querySelector('#steer').latent.value") == latent
            tab.value("document.querySelector('#steer button').click()")
            tab.until("!document.querySelector('#written').hidden")
            assert tab.value("[...document.querySelectorAll('#written bdi')].every((one) => one.textContent)")
            tab.type("#search input", "the")
            tab.until("document.querySelector('#search output').value.includes('found')")
            assert tab.value("document.documentElement.scrollWidth <= innerWidth")
            assert tab.complaints == []
            assert all(address.startswith(server.address) for address in tab.requests)
            tab.value("document.querySelector('#steer').n_tokens.value = '0'")
            tab.value("document.querySelector('#steer').noValidate = true")
            tab.value("document.querySelector('#steer button').click()")
            tab.until("document.querySelector('#steer').said.value.includes('n_tokens')")


def test_another_sae_of_the_run_may_be_named(assessed: Pipeline) -> None:
    """Oracle: the name on the page; latents are drawn of those that are live."""
    other = next(path.parent for path in assessed.out.glob("*/cfg.json") if "-k2-" in path.parent.name)
    with served(other) as server:
        status, page = ask(server, "/")
        assert status == 200
        assert f"Latents of {other.name}" in page
        assert page.count('<details class="latent"') == 8


def test_embeddings_have_no_text_to_try(tmp_path: Path) -> None:
    """Oracle: the page and the answer say why; a word finds passages' latents."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((600, 8)).astype(np.float32))
    take(ImportConfig(source=str(tmp_path / "x.npy"), out=tmp_path / "acts"))
    train(
        TrainConfig(
            acts=tmp_path / "acts", site=("embedding",), out=tmp_path / "run", k=(2,), num_latents=(24,),
            batch_size=64, epochs=1, device="cpu",
        )
    )  # fmt: skip
    assess(AssessConfig(run=tmp_path / "run", device="cpu", n_latents=4))
    with served(tmp_path / "run") as server:
        assert "No text can be tried: embeddings have no language model." in ask(server, "/")[1]
        assert ask(server, "/read", {"text": "a"}) == (400, {"error": "embeddings have no language model"})
        assert ask(server, "/find?word=xyz") == (200, {"latents": []})


def test_what_cannot_be_served_is_refused(assessed: Pipeline, server: Server) -> None:
    """Oracle: the advice: assess, or another port."""
    with pytest.raises(ConfigError, match=f"port {server.server_port} cannot be had"):
        open_server(ViewConfig(run=assessed.out, port=server.server_port, device="cpu"))
    variant = features.load(assessed.out).variant
    verdict = assessed.out / "final_assessment.json"
    content = verdict.read_bytes()
    verdict.unlink()
    try:
        with pytest.raises(StoreError, match="is not assessed; run `saemill assess"):
            open_server(ViewConfig(run=assessed.out / variant, port=0, device="cpu"))
    finally:
        verdict.write_bytes(content)
