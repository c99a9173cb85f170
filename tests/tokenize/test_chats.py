"""Conversations: written out by the chat template, each token with the role of its message."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chats import CHATML, LLAMA2, MARKED, Messages, chat_file, conversations, template_file
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import tokenize

from saemill.common.errors import ConfigError, DataError, StoreError
from saemill.common.models.chat import ChatTemplate
from saemill.common.stores.mask import MaskConfig
from saemill.common.stores.message_roles import RoleSpans, RoleWriter
from saemill.common.stores.token_writer import copy_rows
from saemill.common.stores.tokens import TokenStore

CHATS = conversations(40)


def tokens(
    folder: Path, tokenizer: str, chats: list[Any], template: str = CHATML, **values: Any
) -> TokenStore:
    folder.mkdir(exist_ok=True)
    values = {"chat_column": "messages", "chat_template": template_file(folder, template)} | values
    file = chat_file(folder / "chats.jsonl", chats, values["chat_column"])
    return tokenize(file, folder / "out", tokenizer, held_out_fraction=0.0, **values)


def words_of(store: TokenStore, gpt: Any, role: str) -> str:
    """All text of a role's tokens, in order, without white space."""
    number = store.manifest.roles.index(role) + 1
    ids, roles = store.rows(0, store.n_rows), store.roles_of(0, store.n_rows)
    return "".join(gpt.decode(ids[roles == number]).split())


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: str) -> TokenStore:
    return tokens(tmp_path_factory.mktemp("chats"), tokenizer_folder, CHATS)


def test_rows_are_what_transformers_writes_out(chat_store: TokenStore, gpt: Any) -> None:
    """Oracle: `apply_chat_template` of transformers, chat by chat, each with the separator."""
    ids = []
    for chat in CHATS:
        ids += [*gpt.apply_chat_template(chat, chat_template=CHATML, return_dict=False), gpt.eos_token_id]
    assert chat_store.rows(0, chat_store.n_rows).reshape(-1).tolist() == ids[: chat_store.n_tokens]
    assert chat_store.manifest.source.column == "messages"


@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
def test_roles_are_those_of_the_messages(
    tmp_path: Path, tokenizer_folder: str, gpt: Any, template: str
) -> None:
    """Oracle: the messages' own words, whatever the template puts around them or where it moves them."""
    store = tokens(tmp_path, tokenizer_folder, CHATS, template)
    for role in ("user", "assistant", "system"):
        wanted = "".join("".join(m["content"].split()) for chat in CHATS for m in chat if m["role"] == role)
        found = words_of(store, gpt, role)
        assert len(found) > 0.9 * len(wanted)
        assert wanted.startswith(found)


def test_marks_of_a_template_are_the_assistants(tmp_path: Path, tokenizer_folder: str, gpt: Any) -> None:
    """Oracle: transformers' own `return_assistant_tokens_mask`."""
    store = tokens(tmp_path, tokenizer_folder, CHATS, MARKED)
    mask = []
    for chat in CHATS:
        told = gpt.apply_chat_template(
            chat, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        mask += [*told["assistant_masks"], 0]
    assert store.manifest.roles == ("assistant",)
    assert store.roles_of(0, store.n_rows).reshape(-1).tolist() == mask[: store.n_tokens]


def test_sharegpt_and_parts_make_the_same(
    tmp_path: Path, tokenizer_folder: str, chat_store: TokenStore
) -> None:
    """Oracle: the store of the same messages with role and content."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    theirs = [[{"from": names[m["role"]], "value": m["content"]} for m in chat] for chat in CHATS]
    store = tokens(tmp_path / "a", tokenizer_folder, theirs, chat_column="conversations")
    halves: list[Any] = [
        [
            {
                "role": m["role"],
                "content": [{"type": "text", "text": t} for t in (m["content"][:5], m["content"][5:])],
            }
            for m in chat
        ]
        for chat in CHATS
    ]
    parts = tokens(tmp_path / "b", tokenizer_folder, halves, streaming=True)
    assert chat_store.content == store.content == parts.content
    whole = chat_store.roles_of(0, chat_store.n_rows)
    assert np.array_equal(whole, store.roles_of(0, store.n_rows))
    assert np.array_equal(whole, parts.roles_of(0, parts.n_rows))


def test_a_mask_keeps_the_roles_alone(chat_store: TokenStore, tmp_path: Path) -> None:
    """Oracle: the roles of the tokens; a copy of the first rows has them too."""
    copy = copy_rows(chat_store, 5, tmp_path / "copy")
    assert np.array_equal(copy.roles_of(0, 5), chat_store.roles_of(0, 5))
    every, theirs = MaskConfig(), MaskConfig(roles=("assistant", "user"))
    numbers = [chat_store.manifest.roles.index(role) + 1 for role in theirs.roles]
    wanted = chat_store.keep(0, 5, every) & np.isin(chat_store.roles_of(0, 5), numbers)
    assert np.array_equal(copy.keep(0, 5, theirs), wanted)
    assert 0 < wanted.sum() < chat_store.keep(0, 5, every).sum()
    with pytest.raises(ConfigError, match="no role 'asistant'; did you mean assistant"):
        copy.keep(0, 5, MaskConfig(roles=("asistant",)))


def test_text_without_roles_is_told_so(plain_store: TokenStore) -> None:
    """Oracle: the message names the way to make roles."""
    with pytest.raises(ConfigError, match=r"--train-on.*does not tell whose.*--chat-column"):
        plain_store.keep(0, 1, MaskConfig(roles=("assistant",)))


def test_damaged_roles_are_found(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: one byte of the file, changed."""
    store = tokens(tmp_path, tokenizer_folder, CHATS[:10])
    file = store.path / "roles.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"roles\.parquet"):
        TokenStore(store.path).keep(0, 1, MaskConfig(roles=("user",)))


def test_special_tokens_that_a_message_writes_out(tmp_path: Path, tokenizer_folder: str, gpt: Any) -> None:
    """Oracle: the characters of the message; the tokens that the template itself writes stay tokens."""
    chats = [
        [{"role": "user", "content": "end <|endoftext|> here"}, {"role": "assistant", "content": "ok"}]
    ] * 9
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    store = tokens(tmp_path / "a", tokenizer_folder, chats, template, ctx_len=8)
    assert "end<|endoftext|>here" in words_of(store, gpt, "user")
    n_special = (store.rows(0, store.n_rows) == 0).sum()
    as_tokens = tokens(
        tmp_path / "b", tokenizer_folder, chats, template, ctx_len=8, special_tokens_in_text="special"
    )
    assert (as_tokens.rows(0, as_tokens.n_rows) == 0).mean() > n_special / store.n_tokens
    assert store.manifest.n_special_documents == as_tokens.manifest.n_special_documents == 9
    with pytest.raises(DataError, match=r"row 0 of .*writes out the special token '<\|endoftext\|>'"):
        tokens(tmp_path / "c", tokenizer_folder, chats, template, special_tokens_in_text="refuse")


BAD: dict[str, tuple[Any, str]] = {
    "an image": (
        [{"role": "user", "content": [{"type": "image", "text": None}]}],
        "parts, of which only those of type 'text' are read, got one of type 'image'",
    ),
    "a tool call": (
        [{"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}],
        "has tool_calls, which is not read",
    ),
    "no content": ([{"role": "user", "content": None}], "holds no text, but None"),
    "no role": ([{"role": None, "content": "x"}], "has no role"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_messages_that_are_none(tmp_path: Path, tokenizer_folder: str, kind: str) -> None:
    """Oracle: the row and the message that were written."""
    chat, told = BAD[kind]
    with pytest.raises(DataError, match=f"message 0 of row 1 of .*column messages.*{told}"):
        tokens(tmp_path, tokenizer_folder, [CHATS[1], chat])


def test_what_cannot_be_written_out(tmp_path: Path, tokenizer_folder: str) -> None:
    """Oracle: each message, which says how to go on."""
    with pytest.raises(ConfigError, match=r"no chat template.*--chat-template FILE"):
        tokens(tmp_path, tokenizer_folder, CHATS, chat_template=None)
    with pytest.raises(ConfigError, match="chat template cannot be read: line 1"):
        tokens(tmp_path, tokenizer_folder, CHATS, "{% for m in %}")
    with pytest.raises(DataError, match=r"row 0 of .* refuses its messages \(system, user.*no system here"):
        tokens(
            tmp_path, tokenizer_folder, CHATS,
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x",
        )  # fmt: skip
    with pytest.raises(DataError, match=r"the chat template writes it more than once.*{% generation %}"):
        tokens(tmp_path, tokenizer_folder, CHATS, "{% for m in messages %}{{ m.content * 2 }}{% endfor %}")
    with pytest.raises(ConfigError, match="holds texts, not conversations"):
        tokens(tmp_path, tokenizer_folder, ["text"])
    with pytest.raises(ConfigError, match="no effect without conversations"):
        tokens(tmp_path, tokenizer_folder, CHATS, chat_column=None)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cn")), min_size=1, max_size=12)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), TEXT), min_size=1, max_size=5))
def test_any_words_are_found_where_they_stand(gpt: Any, said: list[tuple[str, str]]) -> None:
    """Oracle: the words themselves, in the order in which they were said; none lies within another."""
    chat: Messages = [{"role": role, "content": text} for role, text in said]
    written = ChatTemplate(gpt, CHATML).write_out(chat, "row 0")
    found = [(role, written.text[start:stop]) for start, stop, role in written.spans]
    assert [(role, text) for role, text in found if text] == [(r, t.strip()) for r, t in said if t.strip()]
    assert all(a[1] <= b[0] for a, b in zip(written.spans, written.spans[1:], strict=False))


@given(st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.data())
def test_spans_are_the_roles_that_were_added(rows: list[list[int]], data: st.DataObject) -> None:
    """Oracle: the roles themselves, at any addresses, also of a store's first rows."""
    writer = RoleWriter()
    for row in rows:
        writer.add(row)
    flat = np.array(rows).reshape(-1)
    spans = RoleSpans(writer.table(), len(flat), 3)
    assert spans.at(np.arange(len(flat))).tolist() == flat.tolist()
    assert spans.n_tokens(3) == np.bincount(flat, minlength=4).tolist()
    end = 4 * data.draw(st.integers(1, len(rows)))
    assert RoleSpans(spans.until(end), end, 3).at(np.arange(end)).tolist() == flat[:end].tolist()
