"""Conversations written out by a tokenizer's chat template, with the place of each message in the text.

Where the template marks what the assistant says (`{% generation %}`), its marks are the assistant's, and no
other role is told. Otherwise the conversation is written out once more for each message, with a placeholder
in place of its text: what is the same before and after the placeholder is the template's, and what is left is
the message. So a template may trim a text, cut out thoughts or move a system message: the place is right.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from saemill.common.errors import ConfigError, DataError

Message = dict[str, str]
"""`role` and `content`."""
PLACEHOLDER = "\ufdd2"
"""A character that no text has: Unicode keeps it free for such uses."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"
Span = tuple[int, int, str]
"""Characters start..stop of a text that are a message's, and its role."""


@dataclass(frozen=True, slots=True)
class WrittenOut:
    """A conversation as text."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """A chat template of a tokenizer.

    Args:
        tokenizer: of transformers.
        template: Jinja; None takes the tokenizer's own.

    Raises:
        ConfigError: there is none, or it is no Jinja template.
    """

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        try:
            self.template: str = tokenizer.get_chat_template(template)
        except ValueError as error:
            raise ConfigError(
                "the tokenizer has no chat template to write conversations out with; pass one with "
                "--chat-template FILE, as the model was trained with"
            ) from error
        self.special = dict(tokenizer.special_tokens_map)
        self.marks_assistant = GENERATION.search(self.template) is not None
        try:
            self._render([{"role": "user", "content": PLACEHOLDER}], "a trial")
        except DataError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                line, fault = error.__cause__.lineno, error.__cause__.message
                raise ConfigError(
                    f"the chat template cannot be read: line {line}: {fault}; mend it"
                ) from None

    def write_out(self, messages: Sequence[Message], where: str) -> WrittenOut:
        """Write a conversation out.

        Args:
            messages: its messages, one at least.
            where: its row, for messages.

        Raises:
            DataError: the template refuses it, or does not write a message's text in one place.
        """
        text, marks = self._render(messages, where)
        if self.marks_assistant:
            return WrittenOut(text, [(start, stop, ASSISTANT) for start, stop in marks])
        spans = [self._span(messages, place, text, where) for place in range(len(messages))]
        return WrittenOut(text, [span for span in spans if span[0] < span[1]])

    def _span(self, messages: Sequence[Message], place: int, text: str, where: str) -> Span:
        """Find the characters of one message; none of one that the template leaves out."""
        role = messages[place]["role"]
        if not messages[place]["content"]:
            return 0, 0, role
        others = [*messages]
        others[place] = messages[place] | {"content": PLACEHOLDER}
        pieces = self._render(others, where)[0].split(PLACEHOLDER)
        if len(pieces) == 1:
            return 0, 0, role
        start, stop = len(pieces[0]), len(text) - len(pieces[-1])
        is_same = text.startswith(pieces[0]) and text.endswith(pieces[-1]) and start <= stop
        if len(pieces) > 2 or not is_same:
            why = "writes it more than once" if len(pieces) > 2 else "writes what is around it in another way"
            raise DataError(
                f"{where}: the place of message {place} ({role}) in the text cannot be told: with another "
                f"text the chat template {why}. Pass one with --chat-template that marks what the "
                "assistant says with {% generation %} … {% endgeneration %}"
            )
        return start, stop, role

    def _render(self, messages: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
        """Write messages out: the text, and the characters that the template marks as the assistant's."""
        try:
            texts, marks = render_jinja_template(
                [list(messages)],
                chat_template=self.template,
                return_assistant_tokens_mask=self.marks_assistant,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"{where}: the chat template refuses its messages ({roles}): {error}; mend or remove that "
                "row, or pass another template with --chat-template"
            ) from error
        return texts[0], [(start, stop) for start, stop in marks[0]] if marks else []
