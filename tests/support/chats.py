"""Conversations in files, and chat templates of several kinds."""

import json
import random
from pathlib import Path
from typing import Any

from texts import WORDS

Messages = list[dict[str, str]]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim }}<|im_end|>\n"
    "{{ '' }}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}[INST] {{ system if loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""The system's message stands within the user's first one."""


def conversations(n: int, seed: int = 0) -> list[Messages]:
    """Conversations of one to three turns, a third of them with a system's message."""
    made = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(made.choices(WORDS, k=made.randint(3, most)))

    chats = []
    for number in range(n):
        chat = [{"role": "system", "content": words(6)}] if number % 3 == 0 else []
        for _ in range(made.randint(1, 3)):
            chat += [{"role": "user", "content": f"{number} {words(20)}"}]
            chat += [{"role": "assistant", "content": words(30)}]
        chats.append(chat)
    return chats


def chat_file(path: Path, chats: list[Any], column: str = "messages") -> Path:
    path.write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats))
    return path


def template_file(folder: Path, template: str) -> Path:
    path = folder / "template.jinja"
    path.write_text(template)
    return path
