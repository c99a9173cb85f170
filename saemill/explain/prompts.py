"""The two questions that a language model is asked of a latent, and how its answers are read.

It explains from contexts in which the tokens where the latent fires are marked. It judges by detection
(Paulo et al. 2024, arXiv 2410.13928): given an explanation and contexts without marks, in which of them does
the latent fire?
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from saemill.common.stores.features import Context, Passage, Snippet
from saemill.explain.config import ExplainConfig
from saemill.explain.silent import Case

AT_ONCE = 10
"""Contexts that are judged in one question."""
MARKED = 0.3
"""Share of a context's largest activation from which on a token is marked."""
MOST_LETTERS = 1000
"""Letters of a passage, and of an explanation, that are sent on."""
EXPLAIN = (
    "You study a latent of a sparse autoencoder that was trained on {of}. You are shown texts on "
    "which it fires, the strongest first. Where single tokens are known, those on which it fires stand "
    "between << and >>; ↵ is the end of a line. Find what they have in common: what is said, a word or a "
    "part of one, grammar, layout, or what comes before. Answer with one short sentence that says on what "
    "the latent fires, so that someone could tell from a new text whether it fires there. Write nothing else."
)
JUDGE = (
    "A latent of a sparse autoencoder that was trained on {of} is described to you, and you are "
    "shown numbered texts, one on each line; ↵ is the end of a line in them. Say of each whether the latent "
    "fires on {it}, going by the description. Answer with a JSON list of as many numbers "
    "as there are texts, in their order: 1 where it fires, 0 where it does not. Write nothing else."
)
OF_TOKENS = {"of": "a language model", "it": "at least one token of it"}
OF_PASSAGES = {"of": "embeddings of texts, each as a whole", "it": "it"}
LIST = re.compile(r"\[[^\[\]]*\]")
THOUGHTS = re.compile(r"^.*</think>|<think>.*", re.DOTALL)
"""What models that think aloud write before their answer; with some the prompt begins the thought."""


def explain(shown: Sequence[Context], config: ExplainConfig) -> dict[str, Any]:
    """Ask what the contexts have in common."""
    texts = [f"{number}. {_marked(context)}" for number, context in enumerate(shown, 1)]
    return _request(EXPLAIN.format(**_unit(shown[0].place)), "\n\n".join(texts), config)


def judge(text: str, cases: Sequence[Case], config: ExplainConfig) -> dict[str, Any]:
    """Ask in which of the contexts a latent fires that is explained by a text."""
    numbered = [f"{number}. {_plain(case.place)}" for number, case in enumerate(cases, 1)]
    return _request(
        JUDGE.format(**_unit(cases[0].place)), "\n\n".join([f"The latent: {text}", *numbered]), config
    )


def _unit(place: Snippet | Passage) -> dict[str, str]:
    """Choose the words for what the SAE was trained on."""
    return OF_PASSAGES if isinstance(place, Passage) else OF_TOKENS


def _request(system: str, user: str, config: ExplainConfig) -> dict[str, Any]:
    """Make the body of a chat completion."""
    roles = {"system": system, "user": user}
    request = {
        "model": config.model,
        "messages": [{"role": role, "content": content} for role, content in roles.items()],
        "temperature": config.temperature,
    }
    return request | ({"max_tokens": config.max_answer_tokens} if config.max_answer_tokens else {})


def explanation(content: str) -> str | None:
    """Read an explanation, on one line; None where there is none."""
    words = " ".join(THOUGHTS.sub("", content).split())
    return _sendable(words)[:MOST_LETTERS] or None


def verdicts(content: str, n: int) -> list[bool] | None:
    """Read the last list of n judgements in an answer; None where there is none."""
    for found in reversed(LIST.findall(THOUGHTS.sub("", content))):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        if len(values) == n and all(value in (0, 1) for value in values):
            return [bool(value) for value in values]
    return None


def _marked(context: Context) -> str:
    """Write a context with the tokens marked on which the latent fires; those beside one another together."""
    place = context.place
    if isinstance(place, Passage):
        return _plain(place)
    bar = MARKED * max(context.values)
    hot = [value > 0 and value >= bar for value in context.values]
    text = ""
    for at, (token, is_hot) in enumerate(zip(place.tokens, hot, strict=True)):
        before = at > 0 and hot[at - 1]
        text += ("<<" if is_hot and not before else ">>" if before and not is_hot else "") + token
    return _on_a_line(text + (">>" if hot[-1] else ""))


def _plain(place: Snippet | Passage) -> str:
    """Write a context without marks."""
    text = (place.text or "")[:MOST_LETTERS] if isinstance(place, Passage) else "".join(place.tokens)
    return _on_a_line(text)


def _on_a_line(text: str) -> str:
    """Return the text with a sign in place of each line end, so that it is one entry of a list."""
    return _sendable("↵".join(text.strip().splitlines()))


def _sendable(text: str) -> str:
    """Return the text with a sign in place of halves of characters, which no request can hold."""
    return text.encode(errors="replace").decode()
