"""Settings: from YAML, `--set` and flags into dataclasses, strictly."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saemill.common import config
from saemill.common.config import as_yaml, build, check_folder, check_same, count, plain, resolve
from saemill.common.errors import ConfigError
from saemill.tokenize.config import TokenizeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    depth: int = 1
    rate: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    name: str
    n: int = 1
    ratio: float = 0.1
    flag: bool = False
    sizes: tuple[int, ...] = (8,)
    names: tuple[str, ...] = ()
    rates: tuple[Literal["auto"] | float, ...] = ("auto",)
    kind: Literal["first", "second"] = "first"
    limit: int | None = 5
    label: str | None = None
    out: Path = Path("out")
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


def made(**values: Any) -> Settings:
    return build(Settings, {"name": "x"} | values, "train")


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_order_of_sources(tmp_path: Path) -> None:
    """Oracle: each setting is given by one source more; the strongest that names it must win."""
    file = yaml_file(tmp_path, "train:\n  name: file\n  n: 2\n  ratio: 0.2\n  limit: 20\n")
    got = resolve(Settings, "train", {"ratio": "0.4", "n": None}, file, ["n=3"])
    assert (got.name, got.n, got.ratio, got.limit) == ("file", 3, 0.4, 20)
    assert got.sizes == (8,), "the default stays where no source names the setting"


def test_sets_reach_inside(tmp_path: Path) -> None:
    """Oracle: what the file says of a group stays, beside what --set and a dotted flag change in it."""
    file = yaml_file(tmp_path, "train: {name: x, inner: {depth: 2, rate: 0.25}}")
    got = resolve(Settings, "train", {"maybe.rate": 7}, file, ["inner.depth=9", "maybe.depth=4"])
    assert got.inner == Inner(depth=9, rate=0.25)
    assert got.maybe == Inner(depth=4, rate=7.0)


@pytest.mark.parametrize(
    ("flags", "sets"),
    [
        ({}, ["name=a", "name=b"]),
        ({"name": "a"}, ["name=b"]),
        ({"name": "a"}, ["name=a"]),
        ({"name": "a", "inner.depth": "2"}, ["inner={depth: 3}"]),
        ({"name": "a"}, ["inner.depth=3", "inner={rate: 1}"]),
        ({"name": "a"}, ["train.n=3", "n=4"]),
    ],
)
def test_what_is_said_twice_on_the_command_line_is_refused(flags: dict[str, Any], sets: list[str]) -> None:
    """Oracle: both sources name one setting, or a group and a setting in it; none is passed over."""
    with pytest.raises(ConfigError, match=r"is given twice, by .* and by .*; leave one out"):
        resolve(Settings, "train", flags, None, sets)


def test_a_set_may_name_its_section() -> None:
    """Oracle: the same without the section; another command's setting is told as that."""
    assert resolve(Settings, "train", {"name": "x"}, None, ["train.n=6", "train.inner.depth=2"]) == made(
        n=6, inner={"depth": 2}
    )
    with pytest.raises(ConfigError, match=r"cache\.layers is no setting of `saemill train`"):
        resolve(Settings, "train", {"name": "x"}, None, ["cache.layers=6"])


def test_dashes_are_underscores(tmp_path: Path) -> None:
    """Oracle: `max-tokens` in file, --set and flags is the field max_tokens; the flag still wins."""
    file = yaml_file(tmp_path, "tokenize: {dataset: d, tokenizer: t, out: o, max-tokens: 1k, ctx-len: 8}")
    assert resolve(TokenizeConfig, "tokenize", {}, file).max_tokens == 1000
    assert resolve(TokenizeConfig, "tokenize", {}, file, ["max-tokens=2k"]).max_tokens == 2000
    got = resolve(TokenizeConfig, "tokenize", {"max_tokens": "3k"}, file)
    assert (got.max_tokens, got.ctx_len) == (3000, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {nmae: x}", "unknown setting train.nmae; did you mean name"),
        ("train: {name: x, inner: {dept: 1}}", "unknown setting train.inner.dept; did you mean depth"),
        ("train: {name: x, qqqq: 1}", "known: flag, inner, kind, label"),
        ("trian: {name: x}", "unknown section 'trian'; did you mean train"),
        ("cache: {}", "has no section 'train'; it has cache"),
        ("", "has no section 'train'; it has none"),
        ("- 1", "must hold sections"),
        ("train: 5", "section 'train' must be a group of settings, got 5"),
        ("train: [name, x]", "section 'train' must be a group of settings"),
        ("train: {name: x", "is not valid YAML"),
        ("train: {n: 2}", "train.name must be given"),
        ("train: {name: x, inner: 3}", "inner must be a group of settings, got 3"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    """Oracle: the message written here by hand, which names the mistake and the nearest name."""
    with pytest.raises(ConfigError, match=message.replace("[", "\\[")):
        resolve(Settings, "train", {}, yaml_file(tmp_path, text))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("n", "key=value"),
        ("limits=1", "unknown setting train.limits; did you mean limit"),
        ("n.deep=1", "train.n must be a whole number"),
        ("inner=2", "inner must be a group"),
        ("inner.rats=2", "did you mean rate"),
        ("sizes=[1", "--set sizes=.1 is not valid YAML"),
    ],
)
def test_wrong_set(item: str, message: str) -> None:
    """Oracle: the message written here by hand."""
    with pytest.raises(ConfigError, match=message):
        resolve(Settings, "train", {"name": "x"}, None, [item])


def test_set_below_a_plain_value(tmp_path: Path) -> None:
    """Oracle: `n.deep` after `n` has a value is refused; the value is not replaced by a group."""
    with pytest.raises(ConfigError, match="n is not a group of settings"):
        resolve(Settings, "train", {"name": "x"}, yaml_file(tmp_path, "train: {n: 1}"), ["n.deep=1"])


def test_missing_file(tmp_path: Path) -> None:
    """Oracle: a file that does not exist is an error, not an empty config."""
    with pytest.raises(ConfigError, match=r"no config file .*absent\.yaml"):
        resolve(Settings, "train", {"name": "x"}, tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7), ("7", 7), (" 7 ", 7), ("-3", -3), (2.0, 2), ("2_000_000", 2_000_000), ("1e6", 1_000_000),
        ("2.5e3", 2500), ("512k", 512_000), ("2M", 2_000_000), ("1.5M", 1_500_000), ("1B", 1_000_000_000),
        ("0.001k", 1), ("2e-3k", 2), ("2e-4k", None), ("8.2M", 8_200_000), (2**53 + 1, 2**53 + 1),
        (str(2**53 + 1), 2**53 + 1), (str(2**64 - 1), 2**64 - 1),
    ],
)  # fmt: skip
def test_count(value: Any, expected: int | None) -> None:
    """Oracle: the number written out by hand; none where it is not whole."""
    if expected is None:
        with pytest.raises(ValueError, match="2e-4k"):
            count(value)
    else:
        assert count(value) == expected
        assert type(count(value)) is int


@given(st.integers(-(10**21), 10**21), st.sampled_from(["", "k", "M", "B"]))
def test_count_is_exact(thousandths: int, suffix: str) -> None:
    """Oracle: integer arithmetic; a decimal with a suffix loses nothing to floating point."""
    scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}[suffix]
    text = f"{'-' if thousandths < 0 else ''}{abs(thousandths) // 1000}.{abs(thousandths) % 1000:03}{suffix}"
    product = thousandths * scale
    if product % 1000:
        with pytest.raises(ValueError):
            count(text)
    else:
        assert count(text) == product // 1000


@pytest.mark.parametrize(
    "value",
    ["", "k", "2.5", "2T", "two", "1e6k6", "0x10", "1/1", "inf", "-inf", "nan", 2.5, math.inf, math.nan, None,
     [1], {}, True],
)  # fmt: skip
def test_bad_count(value: Any) -> None:
    """Oracle: none of these is a whole number; `build` says so, with the setting's name and the value."""
    with pytest.raises(ConfigError) as caught:
        made(n=value)
    assert str(caught.value) == f"train.n must be a whole number (4096, 512k, 2M, 1e6), got {value!r}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("16,32", (16, 32)), ("16, 1k", (16, 1000)), ("16", (16,)), (16, (16,)), ([16, "1e3"], (16, 1000)),
        ((1, 2), (1, 2)), ([], ()),
    ],
)  # fmt: skip
def test_tuple(value: Any, expected: tuple[int, ...]) -> None:
    """Oracle: the tuple written out by hand."""
    assert made(sizes=value).sizes == expected


@pytest.mark.parametrize("name", ["name", "out"])
def test_bytes_that_no_utf8_has_are_refused(name: str) -> None:
    """Oracle: what Python makes of such a name on the command line; it could not be written into a config."""
    with pytest.raises(ConfigError) as caught:
        made(**{name: os.fsdecode(b"a/n\xe9")})
    assert str(caught.value) == f"train.{name} must be UTF-8, got 'a/n\\udce9'; rename it"


def test_tuple_of_names_has_no_spaces() -> None:
    """Oracle: `a, b` names a and b; a blank after a comma is no part of a name."""
    assert made(names="layers.2, layers.4").names == ("layers.2", "layers.4")
    assert made(names=["with, comma"]).names == ("with, comma",), "a YAML list is not split again"


@pytest.mark.parametrize(("value", "name"), [("16,x", "sizes[1]"), ("16,,32", "sizes[1]"), ("", "sizes[0]")])
def test_bad_tuple_names_the_item(value: str, name: str) -> None:
    """Oracle: the position of the wrong item, counted by hand."""
    with pytest.raises(ConfigError) as caught:
        made(sizes=value)
    assert str(caught.value).startswith(f"train.{name} must be a whole number")


def test_union_in_tuple() -> None:
    """Oracle: the word stays a word, everything else is a number."""
    assert made(rates="auto,1e-3").rates == ("auto", 0.001)
    assert made(rates=2).rates == (2.0,)
    with pytest.raises(ConfigError, match=r"rates\[0\] must be auto or a number, got 'atuo'"):
        made(rates="atuo")


def test_literal() -> None:
    """Oracle: one of the words, else an error that lists them."""
    assert made(kind="second").kind == "second"
    with pytest.raises(ConfigError, match="kind must be one of first, second, got 'third'"):
        made(kind="third")


@pytest.mark.parametrize("value", [None, "none", "null"])
def test_none(value: Any) -> None:
    """Oracle: YAML's null and the words a flag can carry are None where None is allowed, else refused."""
    assert made(limit=value).limit is None
    with pytest.raises(ConfigError, match="n must be a whole number"):
        made(n=value)


def test_none_in_yaml_and_on_the_command_line(tmp_path: Path) -> None:
    """Oracle: a flag of None means not given, and the word none overrides a file's number."""
    file = yaml_file(tmp_path, "train: {name: x, limit: 3}")
    assert resolve(Settings, "train", {"limit": None}, file).limit == 3
    assert resolve(Settings, "train", {"limit": "none"}, file).limit is None
    assert resolve(Settings, "train", {}, file, ["limit=null"]).limit is None


@pytest.mark.parametrize(
    ("value", "expected"), [("true", True), ("False", False), (True, True), (False, False)]
)
def test_bool(value: Any, expected: bool) -> None:
    """Oracle: the two words and the two values; nothing else is a truth value."""
    assert made(flag=value).flag is expected


@pytest.mark.parametrize(
    "values", [{"flag": "yes"}, {"flag": 1}, {"n": True}, {"ratio": True}, {"ratio": "x"}, {"ratio": [1]},
               {"name": False}, {"name": None}, {"name": ["x"]}, {"out": 3}]
)  # fmt: skip
def test_wrong_type(values: dict[str, Any]) -> None:
    """Oracle: a value of another kind is refused by name; YAML's `no` does not become the text 'False'."""
    (name,) = values
    with pytest.raises(ConfigError, match=f"^train.{name} must be "):
        made(**values)


def test_scalars() -> None:
    """Oracle: each value by hand, with its exact type."""
    got = made(name=5, ratio=1, out="a/b")
    assert (got.name, got.ratio, got.out) == ("5", 1.0, Path("a/b"))
    assert type(got.ratio) is float


def test_check_same_names_differing_keys() -> None:
    """Oracle: of four keys two differ; exactly those are named, with both values and the place."""
    found = {"a": 1, "b": [1, 2], "c": "same", "only there": 0}
    check_same(found, {"a": 1, "b": [1, 2]}, Path("place"))
    with pytest.raises(ConfigError) as caught:
        check_same(found, {"a": 2, "b": [1, 2], "c": "same", "d": 7}, Path("place"))
    message = str(caught.value)
    assert "place was made with other settings" in message
    assert "a: there 1, now 2" in message
    assert "d: there None, now 7" in message
    assert "b:" not in message
    assert "c:" not in message


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
words = texts.filter(bool).filter(lambda text: text not in ("none", "null"))
names = words.filter(lambda text: len(text.encode()) <= config.LONGEST_NAME_BYTES)
numbers = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-config.LARGEST, config.LARGEST)
inners = st.builds(Inner, depth=integers, rate=numbers)
any_settings = st.builds(
    Settings,
    name=texts, n=integers, ratio=numbers, flag=st.booleans(), names=st.lists(words).map(tuple),
    sizes=st.lists(integers).map(tuple), rates=st.lists(st.just("auto") | numbers).map(tuple),
    kind=st.sampled_from(["first", "second"]), limit=st.none() | integers, label=st.none() | words,
    out=names.map(Path), inner=inners, maybe=st.none() | inners,
)  # fmt: skip


@given(settings=any_settings)
def test_written_yaml_reads_back(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Oracle: the settings themselves, whatever words and numbers are in them."""
    file = tmp_path_factory.getbasetemp() / "resolved.yaml"
    file.write_bytes(as_yaml("train", plain(settings)))
    assert resolve(Settings, "train", {}, file) == settings


def test_a_name_that_no_disk_takes_is_refused() -> None:
    """Oracle: 255 bytes, of which é takes two."""
    assert made(out="a/" + "é" * 127 + "b").out == Path("a/" + "é" * 127 + "b")
    with pytest.raises(ConfigError, match=r"at most 255 bytes, and 'é+… .* has 256; choose a shorter one"):
        made(out="a/" + "é" * 128)


def test_plain_is_yaml() -> None:
    """Oracle: yaml.safe_load of yaml.safe_dump, which knows only plain values."""
    values = plain(made(sizes="1,2", out="a/b", maybe={"depth": 3}))
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert values["out"] == "a/b"
    assert values["sizes"] == [1, 2]


def test_an_output_that_cannot_be_a_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a new folder is fine, one below a file or where nothing may be written is not."""
    check_folder(tmp_path / "new" / "deep")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(ConfigError, match=r"out must be a folder, but .*/file is a file"):
            check_folder(path)
    monkeypatch.setattr(config.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"you may not write in {tmp_path}; choose another"):
        check_folder(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
