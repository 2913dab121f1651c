"""The authority's `POST /api/v1/audit-events`, spoken with a reporter's own credential.

It must not retry, beyond one new token for one that is refused; nor let a secret into a text.
"""

import base64
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote_plus, urlencode

from .events import Event
from .fetch import Answer, FetchFailed, post
from .strict import JSON, json_object

MAX_EVENTS = 1000
MAX_BYTES = 1024 * 1024 - len(b'{"events":[]}')
MAX_PAUSE = 30.0  # seconds

_MAX_RETRY_AFTER = 60.0
_RENEW_AT = 0.8  # of its lifetime
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # RFC 6750 §2.1


class AuthorityAway(Exception):
    """Nothing is known of these events; send them again, in `retry_after` seconds or later."""

    def __init__(self, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class BatchRefused(Exception):
    """Something in the batch, or its size, makes the authority refuse all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of one event."""

    id: str
    status: str
    detail: str


class AuditEvents:
    """Reports to one authority. An object is for one thread; each call blocks it.

    The access token is exchanged when it is needed, renewed after four fifths of its life, when
    it is refused, and after a failure without an answer: it costs less to learn from an exchange
    that the authority is still away.
    """

    def __init__(self, issuer: str, client_id: str, client_secret: str, *, timeout: float) -> None:
        self._api = f"{issuer}/api/v1"
        self._token_url = f"{issuer}/oauth/token"
        # RFC 6749 §2.3.1: each form-encoded before they are joined.
        pair = f"{quote_plus(client_id)}:{quote_plus(client_secret)}"
        self._basic = f"Basic {base64.b64encode(pair.encode()).decode('ascii')}"
        self._timeout = timeout
        self._bearer = ""
        self._renew_at = 0.0

    def report(self, events: Sequence[Event]) -> list[Result]:
        """Return what became of each event, in order, or raise BatchRefused or AuthorityAway."""
        body = json.dumps({"events": events}, ensure_ascii=False, separators=(",", ":")).encode()
        try:
            answer = self._post(body)
            if answer.status == 401:
                self._bearer = ""
                answer = self._post(body)
        except FetchFailed as error:
            self._bearer = ""
            raise AuthorityAway(str(error)) from None
        problem = _problem(answer, "detail")
        # A 400 that says nothing is a proxy's, about the request and not about what is in it.
        if answer.status in (413, 422) or (answer.status == 400 and problem):
            raise BatchRefused(f"status {answer.status}{problem}")
        if answer.status != 200:
            if answer.status == 401:
                self._bearer = ""
            raise _away("audit-events", answer, "detail")
        return _results(answer.body, events)

    def _post(self, body: bytes) -> Answer:
        if not self._bearer or time.monotonic() >= self._renew_at:
            self._exchange()
        return post(
            f"{self._api}/audit-events",
            body,
            content_type="application/json",
            authorization=self._bearer,
            timeout=self._timeout,
        )

    def _exchange(self) -> None:
        asked_at = time.monotonic()
        form = {"grant_type": "client_credentials", "scope": "audit:report", "resource": self._api}
        answer = post(
            self._token_url,
            urlencode(form).encode("ascii"),
            content_type="application/x-www-form-urlencoded",
            authorization=self._basic,
            timeout=self._timeout,
        )
        if answer.status != 200:
            raise _away("token", answer, "error_description")
        try:
            granted = json_object(answer.body)
        except ValueError as error:
            raise AuthorityAway(f"token: {error}") from None
        token, lifetime = granted.get("access_token"), granted.get("expires_in")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise AuthorityAway("token: expected access_token")
        if not isinstance(lifetime, int):
            raise AuthorityAway("token: expected expires_in, whole seconds")
        self._bearer = f"Bearer {token}"
        self._renew_at = asked_at + lifetime * _RENEW_AT


def _results(body: bytes, events: Sequence[Event]) -> list[Result]:
    try:
        results = json_object(body).get("results")
    except ValueError as error:
        raise AuthorityAway(f"audit-events: {error}") from None
    if not isinstance(results, list) or len(results) != len(events):
        raise AuthorityAway("audit-events: expected one result for each event")
    return [_result(each, event) for each, event in zip(results, events, strict=True)]


def _result(result: JSON, event: Event) -> Result:
    match result:
        case {"id": str(id_), "status": str(status), **rest} if id_ == event["id"]:
            detail = rest.get("detail")
            return Result(
                id=id_, status=status, detail=_shown(detail) if isinstance(detail, str) else ""
            )
        case _:
            raise AuthorityAway("audit-events: expected the results in the order of the events")


def _away(what: str, answer: Answer, member: str) -> AuthorityAway:
    # Who is refused as a client waits for a person to change that.
    by_a_person = 400 <= answer.status < 500 and answer.status not in (408, 425, 429)
    told = min(answer.retry_after, _MAX_RETRY_AFTER)
    return AuthorityAway(
        f"{what}: expected status 200, found {answer.status}{_problem(answer, member)}",
        retry_after=max(told, MAX_PAUSE) if by_a_person else told,
    )


def _problem(answer: Answer, member: str) -> str:
    try:
        text = json_object(answer.body).get(member)
    except ValueError:
        return ""
    return f": {_shown(text)}" if isinstance(text, str) else ""


def _shown(text: str) -> str:
    return "".join(each if each.isprintable() else "?" for each in text[:200])
