"""`saemill explain`: what a server says of planted latents, scored on contexts that it was not shown."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from answering import Reply, answering, completion, finds_the_word, is_judgement
from pages import Page

from saemill.assess.config import AssessConfig, LatentConfig
from saemill.assess.latent import run as show
from saemill.assess.run import run as assess
from saemill.assess.write import show_explanations
from saemill.common.errors import ConfigError, Interrupted, SaemillError, StoreError
from saemill.common.stores import assessments, explanations, features, runs
from saemill.common.stores.activations import ActivationStore
from saemill.common.stores.explanations import Explanations
from saemill.explain import endpoint
from saemill.explain.config import ExplainConfig
from saemill.explain.run import run
from saemill.verify import run_problems

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def copied(planted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planted, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_WAIT_SECONDS", 0.001)


def explain(folder: Path, url: str, **settings: Any) -> Explanations:
    return run(
        ExplainConfig(
            **{"run": folder, "url": url, "model": "m", "device": "cpu", "n_latents": 12} | settings
        )
    )


def test_a_planted_rule_is_found_and_a_shuffled_one_is_not(copied: Path, words: dict[str, int]) -> None:
    """Oracle: the planted rule: latent i fires on word i alone. The server sees only what is sent; the texts
    and documents are looked up in the token store."""
    with answering(finds_the_word) as server:
        found = explain(copied, server.url)
    shown = features.load(copied)
    assert [each.latent for each in found.latents] == [each.latent for each in shown.latents[:12]]
    near = {each.latent: [other.latent for other in each.nearest] for each in shown.latents}
    tokens = ActivationStore(Path(runs.finished(copied).acts)).tokens
    ids, hashes = tokens.rows(0, tokens.n_rows), tokens.documents["text_hash"].to_numpy()
    for each in found.latents:
        word = list(words)[each.latent]
        assert each.text == f"the word '{word}'"
        assert each.score.value == 1
        assert all(case.said == case.fires for case in each.tested)
        documents = [
            hashes[tokens.document_of(list(a))] for a in (each.shown, [c.address for c in each.tested])
        ]
        assert not set(documents[0].tolist()) & set(documents[1].tolist())
        assert len(set(documents[1].tolist())) == len(each.tested)
        for case in each.tested:
            row, position = divmod(case.address, tokens.ctx_len)
            around = ids[row, max(0, position - 12) : position + 13]
            assert (words[word] in around.tolist()) == case.fires
            if case.neighbour is not None:
                assert case.neighbour in near[each.latent]
                assert list(words.values())[case.neighbour] in around.tolist()
        n_near = sum(case.neighbour is not None for case in each.tested)
        n_firing = sum(case.fires for case in each.tested)
        assert n_firing == len(each.tested) - n_firing - n_near >= 3
        assert n_near == n_firing
    assert found.score.value == found.near_score.value == 1
    assert found.shuffled.value is not None
    assert abs(float(found.shuffled.value) - 0.5) < 0.1
    assert all(case.said_shuffled is not None for each in found.latents for case in each.tested)


def test_what_holds_of_neighbours_too_is_told_by_them(copied: Path, words: dict[str, int]) -> None:
    """Oracle: a judge who takes the words of a latent's neighbours for its own: by the planted rule all
    contexts of neighbours are told wrong, all firing ones right."""
    names = list(words)
    alike = {
        names[latent.latent]: {names[latent.latent], *(names[near.latent] for near in latent.nearest)}
        for latent in features.load(copied).latents
    }

    def too_wide(body: dict[str, Any]) -> Reply:
        if not is_judgement(body):
            return finds_the_word(body)
        about, *texts = str(body["messages"][1]["content"]).split("\n\n")
        found = alike[about.split("'")[1]]
        return completion(json.dumps([int(bool(found & set(text.split()))) for text in texts]))

    with answering(too_wide) as server:
        found = explain(copied, server.url)
    for each in found.latents:
        assert all(case.said for case in each.tested if case.fires or case.neighbour is not None)
        assert each.near_score.value == 0.5
    assert found.score.value is not None
    assert float(found.score.value) > 0.6


def test_prompts_hold_no_context_that_is_judged(copied: Path) -> None:
    """Oracle: the questions as the server got them: nothing but marks of the explainer's side, and no marks,
    no activation and no word on the outcome on the judge's."""
    with answering(finds_the_word) as server:
        explain(copied, server.url, n_latents=3)
    asked = [str(body["messages"][1]["content"]) for body in server.asked]
    judged = [
        text.split("\n\n")[1:] for body, text in zip(server.asked, asked, strict=True) if is_judgement(body)
    ]
    shown = [text for body, text in zip(server.asked, asked, strict=True) if not is_judgement(body)]
    assert len(shown) == 3
    assert all("<<" in text for text in shown)
    for texts in judged:
        for text in texts:
            assert "<<" not in text
            assert text.partition(". ")[2] not in "".join(shown).replace("<<", "").replace(">>", "")


def test_nothing_is_asked_twice(copied: Path) -> None:
    """Oracle: the number of questions that came; the record of one run that was not disturbed."""
    with answering(finds_the_word) as server:
        whole = explain(copied, server.url)
        n_asked = len(server.asked)
        assert n_asked == len({json.dumps(body) for body in server.asked})
        record = (copied / runs.EXPLANATIONS).read_bytes()
        assert explain(copied, server.url) == whole
        (copied / runs.EXPLANATIONS).unlink()
        assert explain(copied, server.url) == whole
        assert (copied / runs.EXPLANATIONS).read_bytes() == record
        assert len(server.asked) == n_asked
        lines = [json.loads(line) for line in (copied / runs.ANSWERS).read_text().splitlines()]
        assert {json.dumps(line["request"]) for line in lines} == {json.dumps(body) for body in server.asked}
        more = explain(copied, server.url, n_latents=14)
        n_judged = [-(-len(each.tested) // 10) for each in more.latents]
        new, last_before = n_judged[12:], n_judged[11]  # whose control is now the thirteenth
        assert len(server.asked) - n_asked == len(new) + 2 * sum(new) + last_before
        assert more.latents[:11] == whole.latents[:11]
    assert explanations.problems(copied) == []


@pytest.mark.parametrize("how", ["signal", "error"])
def test_what_was_stopped_goes_on(copied: Path, tmp_path: Path, how: str) -> None:
    """Oracle: the latents of an undisturbed run; answers on disk, and questions that follow."""
    with answering(finds_the_word) as server:
        whole = explain(Path(shutil.copytree(copied, tmp_path / "whole")), server.url)
        n_whole = len(server.asked)

    def stopping(body: dict[str, Any]) -> Reply:
        if len(disturbed.asked) == 17:
            if how == "error":
                return Reply("out of credit", 402)
            os.kill(os.getpid(), signal.SIGTERM)
        return finds_the_word(body)

    with answering(stopping) as disturbed:
        if how == "signal":
            with pytest.raises(Interrupted, match="stopped; answers so far are in"):
                explain(copied, disturbed.url)
        else:
            with pytest.raises(endpoint.EndpointError, match=r"refuses the question \(402: out of credit\)"):
                explain(copied, disturbed.url)
    n_kept = len((copied / runs.ANSWERS).read_text().splitlines())
    assert 13 <= n_kept <= 20
    assert not (copied / runs.EXPLANATIONS).exists()
    assert assessments.problems(copied) == []
    with (copied / runs.ANSWERS).open("ab") as file:
        file.write(b'{"request": {"mod')  # as a crash in the middle of a line leaves it
    with answering(finds_the_word) as server:
        found = explain(copied, server.url)
        assert len(server.asked) == n_whole - n_kept
    assert found.latents == whole.latents


def test_rubbish_is_no_score(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: no list in any answer, so no figure, with the reason; an empty explanation likewise. Answers
    that were cut off are counted."""
    with answering(
        lambda body: completion("I'd rather not [1, 0, maybe]." if is_judgement(body) else "words")
    ) as server:
        found = explain(copied, server.url)
    for each in found.latents:
        assert each.text == "words"
        assert each.score.value is None
        assert each.score.reason == "no firing context was judged: no answer on one could be read"
    assert found.score.value is None
    (copied / runs.EXPLANATIONS).unlink()
    assert "cut off" not in capsys.readouterr().out
    cut = Reply({"choices": [{"message": {"content": None}, "finish_reason": "length"}]})
    with answering(lambda _: cut) as server:
        found = explain(copied, server.url, model="other")
        assert len(server.asked) == 12
    assert "explain: 12 of 12 answers were cut off" in capsys.readouterr().out
    assert {each.text for each in found.latents} == {None}
    assert {each.score.reason for each in found.latents} == {"the answer holds no explanation"}
    assert "not scored: the answer holds no explanation" in (copied / "report.html").read_text()


def test_a_judge_that_says_always_yes_is_at_chance(copied: Path) -> None:
    """Oracle: the definition: all firing contexts right and all silent ones wrong make one half."""

    def yes(body: dict[str, Any]) -> Reply:
        text = str(body["messages"][1]["content"])
        n = len(text.split("\n\n")) - 1
        return completion(json.dumps([1] * n) if is_judgement(body) else text[:50])

    with answering(yes) as server:
        found = explain(copied, server.url)
    assert [each.score.value for each in found.latents] == [0.5] * 12
    assert found.difference.value == 0


def test_the_page_and_the_terminal_show_it(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the record; the page is listed with its hash; a later assessment shows them again; an
    explanation is text, whatever is in it."""

    def hostile(body: dict[str, Any]) -> Reply:
        return (
            finds_the_word(body) if is_judgement(body) else completion("<script>alert('x')</script>\n\u202eb")
        )

    with answering(hostile) as server:
        found = explain(copied, server.url, n_latents=4)
    assert assessments.problems(copied) == []
    assert run_problems(copied) == []
    page = Page((copied / "report.html").read_text())
    said = [text for text in page.texts if "<script>alert('x')</script> ‹202E›b" in text]
    assert len(said) == 2 * 4  # folded and unfolded
    text = (copied / "report.html").read_text()
    assert text.count("balanced accuracy 0.50") >= 4
    capsys.readouterr()
    show(
        LatentConfig(run=copied, latents=(str(found.latents[0].latent),), device="cpu", out=copied / "l.html")
    )
    told = capsys.readouterr().out
    assert "“<script>alert('x')</script> \\u202eb”" in told
    assert "balanced accuracy 0.50" in told
    assert "balanced accuracy 0.50" in (copied / "l.html").read_text()
    assess(AssessConfig(run=copied, device="cpu", with_model=False, variant=found.variant, n_latents=10))
    assert "balanced accuracy 0.50" in (copied / "report.html").read_text()
    assess(
        AssessConfig(
            run=copied, device="cpu", with_model=False, variant="embed_in-k2-f128-s0-lr0.003", n_latents=10
        )
    )
    assert "balanced accuracy 0.50" not in (copied / "report.html").read_text()
    assert "explanations.json is damaged or of another SAE, and is not shown" in capsys.readouterr().out
    show_explanations(copied)
    assert assessments.problems(copied) == []


def test_a_stop_between_page_and_record_is_repaired_by_the_command_itself(copied: Path) -> None:
    """Oracle: the record as it was before the page was written anew, which is what a kill leaves: `verify`
    advises the repair that asks nothing, and that repairs it. A page without explanations, or beside those
    of other latents, needs the assessment."""
    record = copied / assessments.FILE
    before = record.read_bytes()
    with answering(finds_the_word) as server:
        explain(copied, server.url, n_latents=2)
        n_asked = len(server.asked)
        record.write_bytes(before)
        (line,) = run_problems(copied)
        assert line.startswith(f"{copied / runs.REPORT}: ")
        assert line.endswith(explanations.REPAIR)
        explain(copied, server.url, n_latents=2)
        assert len(server.asked) == n_asked
    assert run_problems(copied) == []
    record.write_bytes(before)
    (copied / runs.EXPLANATIONS).unlink()
    (line,) = run_problems(copied)
    assert line.endswith(assessments.REPAIR)


def test_the_key_is_sent_and_is_nowhere_else(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the header that came, and a search of every file and of all that was printed; the server
    repeats the key in its answers."""
    key = "sk-very-secret-0123456789"
    monkeypatch.setenv("SOME_KEY", key)
    before = set(copied.rglob("*"))

    def repeating(body: dict[str, Any]) -> Reply:
        return completion("[1]" if is_judgement(body) else f"your key is {key}")

    with answering(repeating) as server:
        explain(copied, server.url, api_key_env="SOME_KEY", n_latents=3)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {key}"}
    assert set(copied.rglob("*")) > before
    assert not [file for file in copied.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]
    with (
        answering(lambda _: Reply(f"key {key} is unknown", 401)) as server,
        pytest.raises(SaemillError, match="is the key in SOME_KEY the right one") as refused,
    ):
        explain(copied, server.url, api_key_env="SOME_KEY", model="other")
    assert key not in str(refused.value)
    assert key not in "".join(capfd.readouterr())
    with answering(finds_the_word) as server:
        explain(copied, server.url, n_latents=1)
        assert not any("Authorization" in headers for headers in server.headers)
    with pytest.raises(ConfigError, match="'NO_SUCH_KEY' is not set; export it, or leave it out"):
        explain(copied, server.url, api_key_env="NO_SUCH_KEY")


def test_what_cannot_be_explained_is_refused_before_anything_is_sent(copied: Path, tmp_path: Path) -> None:
    """Oracle: the messages, and that no question came."""
    with answering(finds_the_word) as server:
        with pytest.raises(StoreError, match=r"has no final_assessment\.json, .* run `saemill assess"):
            explain(tmp_path / "nothing", server.url)
        missing = next(
            i for i in range(128) if i not in {each.latent for each in features.load(copied).latents}
        )
        with pytest.raises(ConfigError, match=f"does not show {missing} of .* --latents {missing}"):
            explain(copied, server.url, latents=(str(missing),), n_latents=None)
        with pytest.raises(ConfigError, match="n_latents has no effect where latents are named"):
            explain(copied, server.url, latents=("3",), n_latents=4)
        for url in ("localhost:8000/v1", "ftp://h/v1", "http://", "http://a b/v1"):
            with pytest.raises(
                ConfigError, match="url must be that of an endpoint, as http://localhost:8000/v1"
            ):
                explain(copied, url)
        with pytest.raises(ConfigError, match=r"url must end in the path .* got 'http://h/v1\?key=1'"):
            explain(copied, "http://h/v1?key=1")
        with pytest.raises(ConfigError, match="url must hold no password"):
            explain(copied, "http://me:pw@h/v1")
        (copied / "features.json").write_text("{}")
        with pytest.raises(StoreError, match=r"features\.json: file has 2 bytes"):
            explain(copied, server.url)
        assert server.asked == []
    assert not (copied / runs.ANSWERS).exists()


def test_damaged_answers_are_an_error(copied: Path) -> None:
    """Oracle: a byte changed in the file: the line is named, and `verify` finds it."""
    with answering(finds_the_word) as server:
        explain(copied, server.url, n_latents=2)
        content = (copied / runs.ANSWERS).read_bytes()
        (copied / runs.ANSWERS).write_bytes(content.replace(b"the word", b"the wOrd", 1))
        assert "explanations.jsonl: content differs" in "".join(run_problems(copied))
        with pytest.raises(
            StoreError, match=r"explanations\.jsonl is damaged in line \d+: .*Remove the line"
        ):
            explain(copied, server.url, n_latents=2)
