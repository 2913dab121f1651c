"""A verifier of its own, as a service runs one: ours, or PyJWT's with its JWKS client.

Usage: python -m tests.faults.verifier_process. The first line on its input is how to verify, as
JSON; each further line is a token, and is answered by a line: empty, or why it was refused.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jwt

from keys.verifier import Reporter, Verifier


def main() -> None:
    given: dict[str, Any] = json.loads(sys.stdin.readline())
    verify = {"ours": _ours, "PyJWKClient": _pyjwt}[given["kind"]](given)
    for line in sys.stdin:
        try:
            verify(line.strip())
            answer = ""
        except Exception as error:
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, flush=True)


def _ours(given: dict[str, Any]) -> Callable[[str], object]:
    """It heeds the max-age of what it fetches by itself."""
    issuer: str = given["issuer"]
    reporter = None
    if given["reporter"] is not None:
        reporter = Reporter(issuer, *given["reporter"])
    return Verifier(issuer, given["audience"], reporter=reporter).verify


def _pyjwt(given: dict[str, Any]) -> Callable[[str], object]:
    """It has to be told how long to cache; all else is as it comes."""
    client = jwt.PyJWKClient(
        f"{given['issuer']}/.well-known/jwks.json", lifespan=given["jwks_max_age"]
    )

    def verify(token: str) -> None:
        key = client.get_signing_key_from_jwt(token)
        jwt.decode(
            token,
            key,
            algorithms=["RS256"],
            issuer=given["issuer"],
            audience=given["audience"],
            leeway=given["skew"],
        )

    return verify


if __name__ == "__main__":
    main()
