"""Tokens that came to this authority itself and that it never issued: a key is in other hands.

Refuses nobody: `operators.py` did. The record is that of a reported call, with no reporter.
"""

from collections.abc import Callable
from datetime import UTC, datetime

from keys.verifier.strict import base64url_encode
from service import metrics
from service.authority.audit.attribution import TokenRecords, TokenStanding, find
from service.authority.audit.events import Call, call_record, tell_of_forged
from service.authority.audit.log import AuditLog
from service.authority.audit.record import Outcome, new_record_id
from service.authority.audit.reported import ApiCall
from service.authority.audit.unproven import UnprovenReports
from service.authority.model import ClientAddress, Clock, UnrecordedToken


class PresentedTokens:
    """Says of a refused token whether it was forged, and puts it on record then."""

    def __init__(
        self,
        *,
        tokens: TokenRecords,
        unproven: UnprovenReports,
        audit: AuditLog,
        broken: Callable[[], str | None],
        clock: Clock,
    ) -> None:
        """`broken` says whether records may be missing: then nothing is proven."""
        self._tokens = tokens
        self._unproven = unproven
        self._audit = audit
        self._broken = broken
        self._clock = clock

    async def record_if_forged(
        self, token: UnrecordedToken, action: str, origin: ClientAddress
    ) -> bool:
        """Return whether it was forged; then that is on record, or counted while the store is away.

        A token that was minted by hand was not. `action` is what was asked for, empty if it has no
        name. A live token is hours old at most, and a month is archived a week after its end at
        the earliest: so the record of its issuance would be here. Raise StoreUnavailable.
        """
        if self._broken() is not None:
            return False
        call = ApiCall(
            id=str(new_record_id(self._clock())),
            occurred_at=datetime.fromtimestamp(self._clock(), UTC),
            jti=token.jti,
            kid=token.kid,
            signing_input_sha256=base64url_encode(token.signing_input_sha256),
            signature=token.signature,
            action=action,
            resource="",
            outcome=Outcome.REFUSED,
            request_id=origin.request_id,
            client_address=origin.address,
            user_agent=origin.user_agent,
        )
        (finding,) = await find([call], self._tokens, issued_since=token.issued_at)
        if finding.standing is not TokenStanding.FORGED:
            return False
        metrics.forged_tokens.inc()
        record = call_record(Call(event=call, finding=finding), None)
        if self._unproven.has_room(record):
            tell_of_forged(record)
            await self._audit.append_or_count(record)
        return True
