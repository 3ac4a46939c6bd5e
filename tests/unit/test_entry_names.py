"""Keys of a tensor cache as names of files."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmemfs.client.entrynames import MOST_KEY_BYTES, SUFFIX, key_of, name_of
from pmemfs.errors import BadKey

ODD = st.text(st.sampled_from("%./ae2\0\x7f\n é"))
PARTS = st.sampled_from(["", ".", "..", "a", "%", "%2E", SUFFIX, f"a{SUFFIX}"])
KEYS = ODD | st.lists(PARTS).map("/".join)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("layer0/prefix9", "layer0/prefix9.safetensors"),
        ("model.v2", "model.v2.safetensors"),
        ("température", "température.safetensors"),
        ("", "%.safetensors"),
        ("a//b/", "a/%/b/%.safetensors"),
        ("/etc/passwd", "%/etc/passwd.safetensors"),
        ("../x", "%2E./x.safetensors"),
        (".hidden", "%2Ehidden.safetensors"),
        ("100%", "100%25.safetensors"),
        ("a\nb\0c\x7f", "a%0Ab%00c%7F.safetensors"),
        ("a.safetensors/b", "a%2Esafetensors/b.safetensors"),
        ("a.safetensors", "a.safetensors.safetensors"),
    ],
)
def test_a_key_is_the_name_of_a_file(key: str, name: str) -> None:
    assert name_of(key) == name
    assert key_of(name) == key


@given(KEYS)
@example("__metadata")
def test_each_key_has_a_name_of_its_own_that_leads_nowhere_else(key: str) -> None:
    name = name_of(key)
    assert key_of(name) == key
    parts = name.split("/")
    assert all(part and part[0] != "." and part.isprintable() for part in parts)
    # No directory is what another key has as its file.
    assert not any(part.endswith(SUFFIX) for part in parts[:-1])


@given(st.text(st.sampled_from("%./a2E5safetnor")).map(lambda text: text + SUFFIX))
@example("%2E%2E.safetensors")
@example("a.safetensors/b.safetensors")
@example("a%2fb.safetensors")
@example(".pmemfs-new-00.safetensors")
def test_a_name_is_of_one_key_or_of_none(name: str) -> None:
    key = key_of(name)
    assert key is None or name_of(key) == name


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("a" * 244, "256 bytes, more than 255"),
        ("b/" + "é" * 130 + "/c", "260 bytes, more than 255"),
        ("a/" * MOST_KEY_BYTES, "are allowed"),
        ("\ud800", "UTF-8"),
        ("__metadata__", "something else"),
    ],
)
def test_what_can_be_no_key_is_refused_with_a_sentence(key: str, why: str) -> None:
    with pytest.raises(BadKey, match=why):
        name_of(key)


@pytest.mark.parametrize("key", [3, None, b"layer0", ("layer0", 9)])
def test_a_key_that_is_no_text_is_refused_by_name(key: object) -> None:
    with pytest.raises(TypeError, match="is a str, and"):
        name_of(key)  # type: ignore[arg-type]
