"""What every operator is told with every answer of the admin API: that a key leaked.

Counts nothing itself, and tells nobody who only reports.
"""

from collections.abc import Awaitable, Callable
from typing import Final

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from service.authority.audit import Action
from service.authority.operators import Operator
from service.http.context import noted

ALERT: Final = b"privyseal-alert"


def alerting(count_forged: Callable[[], Awaitable[int]]) -> Callable[[ASGIApp], ASGIApp]:
    """Return the middleware that adds `Privyseal-Alert: token.forged N` while N is not 0."""

    def around(app: ASGIApp) -> ASGIApp:
        async def alerted(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_with_alert(message: Message) -> None:
                if (
                    message["type"] == "http.response.start"
                    and _is_told(scope)
                    and (count := await count_forged())
                ):
                    alert = f"{Action.TOKEN_FORGED} {count}".encode("ascii")
                    message["headers"] = [*message["headers"], (ALERT, alert)]
                await send(message)

            await app(scope, receive, send_with_alert)

        return alerted

    return around


def _is_told(scope: Scope) -> bool:
    operator: Operator | None = noted(scope, "operator")
    return operator is not None and not operator.only_reports
