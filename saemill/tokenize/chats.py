"""Conversations as datasets hold them: rows of messages, checked and put into one form."""

import re
from typing import Any

from saemill.common.errors import DataError
from saemill.common.models.chat import Message

OF_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Role by the `from` of a message in ShareGPT's form."""
NO_TEXT = re.compile("[\ufdd0-\ufdef]")
"""Characters that Unicode keeps free; some of them mark places in a text here."""
NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""Fields that templates write out beside the content, which would be left out here."""


def conversation_of(value: Any, where: str) -> list[Message]:
    """Read a row's messages: `{role, content}`, or ShareGPT's `{from, value}`. None is an empty conversation.

    Raises:
        DataError: it holds something else than messages of text.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{where} must be a list of messages, got {value!r:.60}; mend or remove that row")
    return [_message(item, f"message {place} of {where}") for place, item in enumerate(value)]


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where} must have a role and a content, got {item!r:.60}; mend or remove that row")
    if item.get("from") is not None and item.get("role") is None:
        role, content = OF_SHAREGPT.get(item["from"]), item.get("value")
        if role is None:
            raise DataError(
                f"{where} is from {item['from']!r:.60}, where human, gpt or system is known; "
                "rename or remove it"
            )
    else:
        role, content = item.get("role"), item.get("content")
        if not isinstance(role, str) or not role:
            raise DataError(f"{where} has no role, but {role!r:.60}; mend or remove that row")
    for name in NOT_TEXT:
        if item.get(name):
            raise DataError(
                f"{where} has {name}, which is not read: write it into the content, or remove that row"
            )
    return {"role": role, "content": _content(content, where)}


def _content(value: Any, where: str) -> str:
    """Return a message's text; of a list of parts, their texts joined."""
    if isinstance(value, list):
        value = "".join(_part(part, where) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{where} holds no text, but {value!r:.60}; mend or remove that row")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half of a surrogate pair, which is no Unicode text; mend that row"
        ) from None
    if NO_TEXT.search(value):
        raise DataError(f"{where} holds a character of U+FDD0 to U+FDEF, which no text has; remove it")
    return value


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        got = f"one of type {kind!r:.40}" if kind is not None else f"{part!r:.60}"
        raise DataError(
            f"{where} has parts, of which only those of type 'text' are read, got {got}; remove that row"
        )
    return text
