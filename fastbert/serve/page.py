"""The page at `/`, on which a model can be tried: one file, that asks nobody else for anything."""

import base64
import hashlib
import json
import re
from pathlib import Path

from fastapi import Response

from fastbert import __version__
from fastbert.serve.models import Served

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_BEFORE, _AFTER = _PAGE.split("{SERVED}")


def _hash_of(tag: str) -> str:
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", _PAGE, re.DOTALL)
    digest = hashlib.sha256(inside.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_hash_of('script')}",
        f"style-src {_hash_of('style')}",
        "img-src data:",  # its icon
        "connect-src 'self'",
        "form-action 'none'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # no text ever becomes markup
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page(served: Served, needs_token: bool) -> Response:
    """The page of what is served.

    Args:
        served: what it can be asked for.
        needs_token: whether it must ask for a bearer token.
    """
    names = ("task", "labels", "mask_token", "max_seq_length", "hidden_size", "dtype")
    told = {
        "model": served.name,
        "version": __version__,
        "works": list(served.works),
        "needs_token": needs_token,
        "device": str(served.device),
        **{name: getattr(served, name) for name in names},
    }
    # ASCII, and no "<" that could end the element it stands in.
    data = json.dumps(told).replace("<", r"\u003c")
    return Response(_BEFORE + data + _AFTER, headers=_HEADERS, media_type="text/html")
