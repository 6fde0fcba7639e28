"""URLs: what of them is shown, and what says which file is meant."""

from __future__ import annotations

import pytest

from pipeline.data.tokens.urls import beside, content_of, shown_error, shown_names, shown_url

SIGNED = [
    "X-Amz-Algorithm=a&X-Amz-Credential=b%2Fc&X-Amz-Date={0}&X-Amz-Signature={0}",
    "X-Goog-Date={0}&X-Goog-Signature={0}",
    "Expires={0}&Signature={0}&Key-Pair-Id=k",
    "AWSAccessKeyId=k&Expires={0}&Signature={0}",
    "sv=2024&se={0}&sp=r&sr=b&sig={0}",
    "skoid=a&sktid=b&skt={0}&ske={0}&sks=b&skv=2024&sv=2024&st={0}&se={0}&sr=b&sp=r&sip=1.2.3.4&sig={0}",
]


@pytest.mark.parametrize("query", SIGNED)
def test_what_signs_a_url_does_not_choose_the_file(query: str) -> None:
    url = "https://user:pass@host:80/a/b%20c.npy"
    plain = content_of("https://host:80/a/b%20c.npy")
    assert content_of(f"{url}?{query.format(1)}") == content_of(f"{url}?{query.format(2)}") == plain
    assert content_of(f"{url}?versionId=3&{query.format(1)}") == content_of(f"{url}?versionId=3") != plain


@pytest.mark.parametrize("query", ["a=1", "a=2", "a", "Expires=3", "sv=1&se=2", "se=2", "b=1&a=1", "A=1"])
def test_other_parameters_do(query: str) -> None:
    others = {content_of(f"https://host/a?{other}") for other in ("", "c=1", "a=1&b=1")}
    assert content_of(f"https://host/a?{query}") not in others
    assert content_of(f"https://host/a?{query}") == content_of(f"https://host/a?{query}")


def test_credentials_are_not_shown() -> None:
    one, other = (shown_url(f"https://user:pass@host:80/a.npy?key={key}") for key in "bc")
    assert one.startswith("https://host:80/a.npy?[") and one != other and len(one) == len(other)
    assert shown_url("http://host/a.npy") == "http://host/a.npy"
    assert shown_url("http://user:pass@[::1/a.npy?key=b") == "[::1/a.npy"
    names = shown_names("a-?.npy, https://user:pass@host:80/a.npy?key=b, HTTP://h/b.npy?key=b and 3 more")
    assert names == f"a-?.npy, {one}, {shown_url('http://h/b.npy?key=b')} and 3 more"
    error = ValueError("Max retries exceeded with url: /a.npy?key=secret (Caused by 'http://u:secret@h/b?c=secret')")
    assert shown_error(error) == "Max retries exceeded with url: /a.npy?[...] (Caused by 'http://h/b?[...]')"


def test_the_name_beside() -> None:
    assert beside("https://h/a.npy?key=b", ".json") == "https://h/a.npy.json?key=b"
    assert beside("https://h/a.npy", ".json") == "https://h/a.npy.json"
