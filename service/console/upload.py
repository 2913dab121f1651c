"""`/console/upload`: how an integrator uploads a document, ready to paste, and a try of it."""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final
from uuid import UUID

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromQuery
from msgspec import Struct

from service.authority.audit import Action, RecordFilter, StoredRecord
from service.authority.audit.reading import AuditReading
from service.authority.by_hand import TokensByHand
from service.authority.errors import Forbidden, OAuthError, StoreUnavailable
from service.authority.model import AccessToken, ServiceUser
from service.authority.operators import Operator
from service.console.forms import Form
from service.console.gate import form_of, session_of
from service.console.ingest_client import Answer, IngestClient, Unreachable
from service.console.page import page, redirect
from service.console.samples import (
    Installation,
    Upload,
    exchange_command,
    node_sample,
    python_sample,
    upload_command,
)
from service.console.token import chosen, told
from service.http.context import AnyRequest, ServiceUserIdInPath, origin_of

RECORD_PATIENCE: Final = 5.0
"""Seconds that a try waits for its record: the ingest service reports once a second."""
_LOOK_AGAIN: Final = 0.2
_PATH: Final = "/console/upload"


class Try(Struct, frozen=True, kw_only=True):
    """What came of an upload: an answer, or why there is none; and what is on record of it, or why
    that cannot be told."""

    answer: Answer | None = None
    unreachable: str = ""
    calls: Sequence[StoredRecord] = ()
    unreadable: str = ""


class UploadController(Controller):
    """Commands, programs, and a try."""

    path = "/upload"

    @get("/", opt={"action": Action.TOKEN_MINT})
    async def ask(
        self,
        request: AnyRequest,
        by_hand: NamedDependency[TokensByHand],
        installation: NamedDependency[Installation],
        service_user: FromQuery[str] = "",
    ) -> Response[Any]:
        """Ask for whom; then show what needs no token."""
        user = await chosen(request, by_hand, service_user.strip(), "upload/upload.html")
        if isinstance(user, Response):
            return user
        return _shown(request, installation, user, Upload.suggested(user))

    @get("/{service_user_id:str}", opt={"action": Action.TOKEN_MINT})
    async def reopened(
        self, request: AnyRequest, service_user_id: ServiceUserIdInPath
    ) -> Response[Any]:
        """Lead whoever opens the address of a command once more to the form: its token is gone."""
        return redirect(request, f"{_PATH}?service_user={service_user_id}")

    @post("/{service_user_id:str}", status_code=HTTPStatus.OK, opt={"action": Action.TOKEN_MINT})
    async def mint(
        self,
        request: AnyRequest,
        service_user_id: ServiceUserIdInPath,
        by_hand: NamedDependency[TokensByHand],
        installation: NamedDependency[Installation],
        ingest_client: NamedDependency[IngestClient],
        reading: NamedDependency[AuditReading],
    ) -> Response[Any]:
        """Mint a token into a command that is ready to paste; and try it, if that was wanted."""
        user = await chosen(request, by_hand, service_user_id, "upload/upload.html")
        if isinstance(user, Response):
            return user
        form = form_of(request)
        upload = _upload(user, form)
        if upload.problems or installation.ingest_url is None:
            status = HTTPStatus.UNPROCESSABLE_ENTITY
            return _shown(request, installation, user, upload, status=status)
        try:
            token = await by_hand.mint(
                session_of(request),
                service_user_id,
                scope=None,
                resource=installation.ingest_audience,
                origin=origin_of(request.scope),
            )
        except OAuthError as error:
            return _shown(request, installation, user, upload, status=told(request, error))
        tried = None
        if form.has("try"):
            operator = session_of(request).operator
            tried = await _try(operator, ingest_client, reading, upload, token)
        return _shown(
            request,
            installation,
            user,
            upload,
            token=token,
            command=upload_command(installation.ingest_url, upload, token.token),
            tried=tried,
        )


def _upload(user: ServiceUser, form: Form) -> Upload:
    return Upload(
        source_system=user.source_system,
        department=form.text("department"),
        category=form.text("category"),
        external_id=form.text("external_id"),
        file_name=form.text("file_name"),
    )


def _shown(
    request: AnyRequest,
    installation: Installation,
    user: ServiceUser,
    upload: Upload,
    *,
    status: int = HTTPStatus.OK,
    token: AccessToken | None = None,
    command: str = "",
    tried: Try | None = None,
) -> Response[Any]:
    url, sample = installation.ingest_url, upload.corrected(user)
    return page(
        request,
        "upload/upload.html",
        status=status,
        user=user,
        upload=upload,
        installation=installation,
        fits=installation.ingest_audience in user.audiences,
        exchange=exchange_command(installation, user),
        python=python_sample(installation, url, sample) if url else "",
        node=node_sample(installation, url, sample) if url else "",
        token=token,
        command=command,
        tried=tried,
    )


async def _try(
    operator: Operator,
    ingest_client: IngestClient,
    reading: AuditReading,
    upload: Upload,
    token: AccessToken,
) -> Try:
    """Upload the sample document, and return what to show of it."""
    try:
        answer = await ingest_client.upload(upload, token.token)
    except Unreachable as error:
        return Try(unreachable=str(error))
    try:
        return Try(answer=answer, calls=await _calls(reading, operator, UUID(token.jti)))
    except Forbidden as error:
        return Try(answer=answer, unreadable=error.detail)


async def _calls(reading: AuditReading, operator: Operator, jti: UUID) -> Sequence[StoredRecord]:
    """Return what is on record of the calls made with a token, as soon as there is one.

    It is worth some seconds: whoever tries wants to see the record. None if none comes in time.
    """
    try:
        async with asyncio.timeout(RECORD_PATIENCE):
            while True:
                wanted = RecordFilter(jti=jti)
                found = await reading.page(operator, wanted, cursor=None, limit=10)
                if calls := [record for record in found if record.id != jti]:
                    return calls
                await asyncio.sleep(_LOOK_AGAIN)
    except (TimeoutError, StoreUnavailable):
        return ()
