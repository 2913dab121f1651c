"""Every page of the console under one gate; `app.py` gives what the pages need."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from litestar import Response, Router, get
from litestar.di import Provide
from litestar.exceptions import NotFoundException
from litestar.params import FromPath

from service.console.audit import AuditController
from service.console.credentials import CredentialController
from service.console.errors import EXCEPTION_HANDLERS_OF_PAGES
from service.console.gate import PUBLIC, operator_of
from service.console.hand_over import HandOverController, OpeningController
from service.console.home import HomeController
from service.console.own import OwnController
from service.console.page import ASSETS, HEADERS, HOME, redirect
from service.console.provider_sign_in import ProviderController
from service.console.service_users import ApiKeyController
from service.console.sign_in import SignInController
from service.console.signing_keys import SigningKeysController
from service.console.token import TokenController
from service.console.upload import UploadController
from service.http.context import AnyRequest

MAX_BODY = 65_536


def console(let_in: Any, dependencies: Mapping[str, Provide]) -> Router:
    """Return the routes under `/console`, behind `let_in`."""
    return Router(
        "/console",
        route_handlers=[
            static,
            SignInController,
            ProviderController,
            HomeController,
            AuditController,
            TokenController,
            UploadController,
            ApiKeyController,
            CredentialController,
            HandOverController,
            OpeningController,
            OwnController,
            SigningKeysController,
            nothing_here,
        ],
        before_request=let_in,
        exception_handlers={**EXCEPTION_HANDLERS_OF_PAGES},
        request_max_body_size=MAX_BODY,
        dependencies={"operator": Provide(operator_of), **dependencies},
        include_in_schema=False,
    )


@get("/", include_in_schema=False)
async def front_door(request: AnyRequest) -> Response[None]:
    """Lead a browser to the console; programs find nothing here."""
    if "text/html" not in request.headers.get("accept", ""):
        raise NotFoundException
    return redirect(request, HOME)


@get("/static/{name:str}", opt={PUBLIC: True})
async def static(name: FromPath[str]) -> Response[bytes]:
    """Serve a style sheet or a script; its address names its content."""
    if (asset := ASSETS.get(name)) is None:
        raise NotFoundException
    headers = {**HEADERS, "Cache-Control": "public, max-age=31536000, immutable"}
    return Response(
        asset.content, status_code=HTTPStatus.OK, media_type=asset.media_type, headers=headers
    )


@get("/{path:path}")
async def nothing_here(path: FromPath[str]) -> None:
    """Say so in a page, too."""
    raise NotFoundException
