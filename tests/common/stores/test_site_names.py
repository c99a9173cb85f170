"""Names of sites: on the disk and back, whatever they are."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saemill.common.stores.site_names import abridged, folder_of, is_input, module_of, site_of_folder
from saemill.common.stores.site_records import RESERVED, site_name, sites_in

modules = st.from_regex(r"[a-z_][a-z_0-9]{0,8}(\.[a-z_0-9]{1,8}){0,3}", fullmatch=True)
sites = st.builds(lambda module, ending: module + ending, modules, st.sampled_from(["", ":in"]))


@given(st.lists(sites.filter(lambda site: site not in RESERVED), unique=True))
def test_folders_are_those_of_their_sites(names: list[str]) -> None:
    """Oracle: the names before; a folder's has no character that a file system, or a URL, gives a meaning."""
    folders = [folder_of(site_name(name)) for name in names]
    assert [site_of_folder(folder) for folder in folders] == names
    assert not set(":+%?*<>|/\\ ") & set("".join(folders))


@given(sites)
def test_an_input_is_at_the_module_of_its_name(site: str) -> None:
    """Oracle: the name put together again."""
    assert module_of(site) + (":in" if is_input(site) else "") == site
    assert not is_input(module_of(site))


@pytest.mark.parametrize("name", ["a~in", "a:out", "a:in:in", ":in~", "../a", ".a", "tokens"])
def test_what_cannot_be_a_folder_or_is_another_is_no_site(name: str) -> None:
    """Oracle: names by hand."""
    with pytest.raises(ValueError, match=r"must be|part of a store"):
        site_name(name)


def test_sites_are_found_by_their_folders(tmp_path: Path) -> None:
    """Oracle: the folders, made by hand."""
    for folder in ("layers.0.mlp~in", "layers.0.mlp"):
        (tmp_path / folder / "commits").mkdir(parents=True)
    assert sites_in(tmp_path) == ["layers.0.mlp", "layers.0.mlp:in"]


def test_many_joined_sites_are_written_by_their_ends() -> None:
    """Oracle: the names written out."""
    assert abridged("layers.2.mlp:in") == "layers.2.mlp:in"
    assert abridged("a+b+c") == "a+b+c"
    assert abridged("a+b+c+d") == "a+…+d"
