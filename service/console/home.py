"""`/console`: what needs a person now, and nothing that does not."""

from collections.abc import Mapping
from typing import Any, Final

from litestar import Controller, Response, get
from litestar.di import NamedDependency

from service.authority.attention import NAMED, Watch
from service.authority.audit import Action
from service.authority.model import Clock
from service.authority.own_credentials import OwnCredentials
from service.console.gate import session_of
from service.console.own import own_home
from service.console.page import page
from service.console.samples import Installation
from service.http.context import AnyRequest

MEANINGS: Final[Mapping[str, str]] = {
    "unknown_client": "No service user has this client id.",
    "wrong_secret": "The client id is known, and the secret is none of its own.",
    "revoked_credential": "A credential that was revoked is still in use somewhere.",
    "credential_expired": "A credential that ended is still in use: its holder needs a new one.",
    "credential_held": "The credential waits for its confirmation since a restore.",
    "service_user_disabled": "The service user is disabled, and something still calls as it.",
    "no_client_authentication": "No client id and secret came with the exchange.",
    "unsupported_client_authentication": "The exchange came with another proof than a secret.",
    "unsupported_grant_type": "Only the grant client_credentials is known here.",
    "invalid_request": "The exchange lacks something, or says it twice.",
    "invalid_scope": "The exchange asked for a scope that the service user does not have.",
    "invalid_target": "The exchange asked for an audience that the service user does not have.",
    "invalid_token": "The token had ended, or is none of ours.",
    "never_issued": "A token that a key of ours signed was never issued: that key leaked.",
    "differs_from_its_record": "A token that a key of ours signed is not the one on record: that "
    "key leaked.",
    "insufficient_scope": "Somebody tried what their scopes do not allow.",
    "nothing_granted": "A person signed in to whom the portal grants nothing here.",
    "hand_over_opened": "A link was opened that had been opened before.",
    "hand_over_lapsed": "A link was opened after its time.",
    "unknown_code": "A link was opened that nobody handed over.",
}
"""What the usual reasons of a refusal mean."""
MISTAKES: Final = ("invalid", "not_found", "conflict", "precondition_failed", "too_many")
"""Reasons that an operator meets at work: nothing was changed, and nobody is needed."""


class HomeController(Controller):
    """The first page."""

    @get("/", opt={"action": Action.SERVICE_USER_READ})
    async def home(
        self,
        request: AnyRequest,
        watch: NamedDependency[Watch],
        own_credentials: NamedDependency[OwnCredentials],
        installation: NamedDependency[Installation],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Show what needs a person; to an integrator, itself."""
        session = session_of(request)
        if not session.is_operator:
            return await own_home(request, session, own_credentials, installation, clock())
        attention = await watch.look(session.operator)
        refusals = attention.log.refusals if attention.log else ()
        return page(
            request,
            "home.html",
            attention=attention,
            named=NAMED,
            refused=[each for each in refusals if each.reason not in MISTAKES],
            meanings=MEANINGS,
        )
