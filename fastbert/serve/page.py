"""The page at `/`, on which a model can be tried."""

from fastapi import Response

from fastbert.serve.models import Served


def page(served: Served, needs_token: bool) -> Response:
    """The page of what is served.

    Args:
        served: what it can be asked for.
        needs_token: whether it must ask for a bearer token.
    """
    return Response("<!doctype html><title>fastbert</title>", media_type="text/html")
