"""URLs of token files: how they are shown, and what of them says which file is meant."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from xxhash import xxh3_64

from pipeline.errors import brief

_QUERY = re.compile(r"\?[^\s'\"()<>]+")
_URLS = re.compile(r"https?://\S*[^\s,]", re.IGNORECASE)
_USER = re.compile(r"//[^/\s@'\"()<>]+@")
_SIGNED_PREFIXES = ("x-amz-", "x-goog-")
_SIGNATURES = (
    ("Signature", frozenset(("Signature", "Expires", "Policy", "Key-Pair-Id", "AWSAccessKeyId", "GoogleAccessId"))),
    (
        "sig",
        frozenset(
            (
                "sv",
                "ss",
                "srt",
                "sp",
                "st",
                "se",
                "spr",
                "sr",
                "sip",
                "sig",
                "skoid",
                "sktid",
                "skt",
                "ske",
                "sks",
                "skv",
                "saoid",
                "suoid",
                "scid",
                "sduoid",
            )
        ),
    ),
)
"""The parameter that a signature is in, and those that come with it: of CloudFront, S3 and Google (version 2), and of
Azure, by an account's key and by a user's delegation."""


def shown_url(url: str) -> str:
    """A URL for messages: its query and its user may be credentials. Of the query a short digest is left, by which two
    URLs can be told apart."""
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL: it is in the message that says so
        return url.partition("?")[0].rpartition("@")[2]
    digest = f"?[{xxh3_64(parts.query.encode()).hexdigest()[:6]}]" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{digest}"


def shown_names(text: str) -> str:
    """A text that names files and URLs, for messages."""
    return _URLS.sub(lambda found: shown_url(found[0]), text)


def shown_error(error: BaseException) -> str:
    """The message of an error about a URL, in one line, without queries and users."""
    return brief(_USER.sub("//", _QUERY.sub("?[...]", str(error))))


def content_of(url: str) -> str:
    """The URL without what only signs it, which is another each time it is signed: by this a cache knows the file.

    All other parameters stay: they may choose the file.
    """
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    names = {name for name, _ in query}
    signing = {name for name in names if name.lower().startswith(_SIGNED_PREFIXES)}
    for signature, others in _SIGNATURES:
        signing |= names & others if signature in names else set()
    left = [(name, value) for name, value in query if name not in signing]
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, urlencode(left), ""))


def is_whole(url: str) -> bool:
    """Whether a URL can be parsed and names a server."""
    try:
        parts = urlsplit(url)
        # Read where a request is made, and refused there as no number.
        _ = parts.port
    except ValueError:
        return False
    return bool(parts.hostname)


def beside(url: str, suffix: str) -> str:
    """The URL of the file whose name is that of `url` with a suffix."""
    address, mark, query = url.partition("?")
    return f"{address}{suffix}{mark}{query}"
