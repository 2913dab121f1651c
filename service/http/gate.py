"""The gate of `/api/v1`: who calls, the form that a request must have, the record of one refused.

Knows no route; what an operator may do, the rules behind it decide.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import HttpMethod, Response
from litestar.params import QueryParameter
from litestar.typing import FieldDefinition

from keys.verifier.strict import JSON, json_object
from service.authority.audit import AuditRecord, Outcome, new_record_id, personal
from service.authority.errors import Unauthenticated
from service.authority.model import CREDENTIAL_ID, KID, SERVICE_USER_ID
from service.authority.operators import Operator, Operators
from service.http.context import AnyRequest, note, noted, origin_of
from service.http.errors import Refused, invalid_body

MAX_BODY: Final = 65_536
BODY_DEADLINE: Final = 10.0
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def gatekeeper(
    operators: Operators,
) -> Callable[[AnyRequest], Awaitable[Response[None] | None]]:
    """Return what stands before every admin route: first who calls, then what was sent."""

    async def let_in(request: AnyRequest) -> Response[None] | None:
        note(request.scope, operator=await operators.authenticate(_bearer_token(request)))
        if request.method == HttpMethod.OPTIONS:
            return _options(request)
        await check_form(request)
        return None

    return let_in


def _options(request: AnyRequest) -> Response[None]:
    # The framework's own answer forgets the methods that it registered first.
    path = request.scope["path_template"]
    methods = next(route.methods for route in request.app.routes if route.path_format == path)
    allow = ", ".join(sorted(methods))
    return Response(None, status_code=HTTPStatus.NO_CONTENT, headers={"Allow": allow})


async def operator_of(request: AnyRequest) -> Operator:
    """Return who calls, as the gatekeeper found it."""
    return noted(request.scope, "operator")


async def check_form(request: AnyRequest) -> None:
    """Refuse what the framework would take: other content types, doubled JSON members, "900" for
    900, unknown or doubled query parameters, and control characters in any string."""
    handler = request.route_handler
    parameters = dict(handler.parsed_fn_signature.parameters)
    for dependency in handler.resolve_dependencies().values():
        parameters.update(dependency.parsed_fn_signature.parameters)
    parameters = {_sent_name(name, field): field for name, field in parameters.items()}
    known = {name for name, field in parameters.items() if field.has_default}
    names = [name for name, _ in request.query_params.multi_items()]
    if unknown := sorted(set(names) - known):
        raise Refused(HTTPStatus.BAD_REQUEST, f"Unknown query parameter: {unknown[0][:40]!a}.")
    if len(set(names)) != len(names):
        raise Refused(HTTPStatus.BAD_REQUEST, "Each query parameter may be given once.")
    if any(_CONTROL.search(value) for value in request.query_params.values()):
        raise Refused(HTTPStatus.BAD_REQUEST, "Parameters must not hold control characters.")
    for name, value in request.query_params.items():
        field = parameters[name]
        kinds = {field.annotation, *(inner.annotation for inner in field.inner_types)}
        # The framework takes the word for None: a filter that holds nothing back.
        if value.lower() == "null" and str not in kinds:
            raise Refused(HTTPStatus.BAD_REQUEST, f"Leave {name} out instead of sending null.")
    if "data" not in parameters:
        return
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Expected Content-Type: application/json.")
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            raw = await request.body()
    except TimeoutError:
        raise Refused(
            HTTPStatus.REQUEST_TIMEOUT, f"The body did not arrive within {BODY_DEADLINE:.0f} s."
        ) from None
    form = parameters["data"].annotation
    if len(raw) <= MAX_BODY:
        _check_body(raw, form)
    else:
        # It takes longer than the event loop may stand still.
        await asyncio.to_thread(_check_body, raw, form)


def _sent_name(name: str, field: FieldDefinition) -> str:
    """Return what a parameter is called in the query: `from` can be no name in Python."""
    sent_as = field.kwarg_definition
    return (isinstance(sent_as, QueryParameter) and sent_as.name) or name


def _check_body(raw: bytes, form: Any) -> None:
    try:
        body = json_object(raw)
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, f"The body is no JSON object: {error}.") from None
    # RFC 8259 §7: one below U+0020 can only be written as an escape.
    if (b"\\" in raw or b"\x7f" in raw) and any(map(_CONTROL.search, _strings(body))):
        raise Refused(HTTPStatus.BAD_REQUEST, "Strings must not hold control characters.")
    try:
        msgspec.convert(body, form)
    except msgspec.ValidationError as error:
        raise invalid_body(error) from None


def refusal_record(scope: Mapping[str, Any], now: float) -> AuditRecord:
    """Return the record of a refused administrative request."""
    operator: Operator | None = noted(scope, "operator")  # type: ignore[arg-type]
    path = scope.get("path_params", {})
    service_user_id = path.get("service_user_id", "")
    return AuditRecord(
        id=new_record_id(now),
        action=scope["route_handler"].opt["action"],
        outcome=Outcome.REFUSED,
        reason=noted(scope, "refused"),  # type: ignore[arg-type]
        service_user_id=_if_formed(SERVICE_USER_ID, service_user_id),
        credential_id=_if_formed(CREDENTIAL_ID, path.get("credential_id")),
        kid=_if_formed(KID, path.get("kid")),
        actor_id=operator.service_user.id if operator else None,
        actor=operator.service_user.name if operator else None,
        actor_credential_id=operator.credential_id if operator else None,
        **personal(origin_of(scope)),  # type: ignore[arg-type]
    )


def _bearer_token(request: AnyRequest) -> str:
    # RFC 6750 §2.1; the query and the body are no places for a token.
    headers = request.headers.getall("authorization", [])
    if len(headers) != 1:
        raise Unauthenticated("Expected one Authorization header: Bearer and an access token.")
    scheme, _, token = headers[0].partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("Expected the scheme Bearer and an access token.")
    return token


def _strings(value: JSON) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for name, member in value.items():
                yield name
                yield from _strings(member)
        case list():
            for member in value:
                yield from _strings(member)
        case _:
            pass


def _if_formed(pattern: str, value: object) -> str | None:
    # What has not the form of an id may be a secret that was put into the wrong place.
    return value if isinstance(value, str) and re.fullmatch(pattern, value) else None
