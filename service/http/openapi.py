"""The OpenAPI description: what Litestar derives from the routes, and the raw routes beside it.

Serves JSON only; no page that loads scripts from elsewhere.
"""

from importlib.metadata import version
from typing import Final, cast

import msgspec
from litestar import Litestar
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import (
    Components,
    License,
    OAuthFlow,
    OAuthFlows,
    OpenAPI,
    OpenAPIHeader,
    OpenAPIMediaType,
    OpenAPIResponse,
    Operation,
    Parameter,
    PathItem,
    Reference,
    RequestBody,
    Responses,
    Schema,
    SecurityScheme,
    Server,
)
from litestar.openapi.spec.enums import OpenAPIType
from litestar.routes import HTTPRoute

from service.authority.model import SHOWN_DAYS, AdminScope
from service.http import audit_tree, token, well_known

_STRING: Final = Schema(type=OpenAPIType.STRING)
_ALERT: Final = "Privyseal-Alert"
_ALERT_HEADER: Final = OpenAPIHeader(
    # Neither is written: in a header they would say what its name and place say already.
    name="",
    param_in="header",
    description=f"How many forged tokens were noticed in the last {SHOWN_DAYS} days: a signing key "
    "is in other hands. Absent while there are none, and for callers that may only report.",
    schema=Schema(type=OpenAPIType.STRING, pattern="^token\\.forged [1-9][0-9]*$"),
)
_IF_MATCH: Final = Parameter(
    name="If-Match",
    param_in="header",
    required=True,
    description="The ETag of what is changed (428 without it, 412 if it was changed meanwhile).",
    schema=Schema(type=OpenAPIType.STRING, pattern='^"[0-9]{1,18}"$'),
)


def config(issuer: str) -> OpenAPIConfig:
    """Return what the description says of the whole."""
    return OpenAPIConfig(
        title="Privyseal",
        version=version("privyseal"),
        description="Short-lived signed tokens for machines: verified offline, all on record.",
        license=License(name="Apache-2.0", identifier="Apache-2.0"),
        servers=[Server(url=issuer)],
        path="/schema",
        render_plugins=[JsonRenderPlugin(path="/openapi.json")],
        components=Components(
            security_schemes={
                "bearer": SecurityScheme(
                    type="http",
                    scheme="bearer",
                    bearer_format="JWT",
                    description="An access token whose only audience is the issuer + /api/v1.",
                ),
                "client_credentials": SecurityScheme(
                    type="oauth2",
                    description="Where that token comes from, with `resource` as its audience.",
                    flows=OAuthFlows(
                        client_credentials=OAuthFlow(
                            token_url=f"{issuer}{token.PATH}",
                            scopes={scope.value: "" for scope in AdminScope},
                        )
                    ),
                ),
                "client_secret_basic": SecurityScheme(
                    type="http",
                    scheme="basic",
                    description="client_id and client_secret, form-encoded (RFC 6749 §2.3.1).",
                ),
            }
        ),
        use_handler_docstrings=True,
    )


def complete(app: Litestar) -> None:
    """Add the raw routes, the whole form of every body, and to every admin operation the problem
    details that it may answer."""
    schema = app.openapi_schema
    assert schema.paths is not None
    # Litestar's own schemas leave out what is inside a list, and that other members are refused.
    bodies = {
        handler.parsed_fn_signature.parameters["data"].annotation
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        if "data" in handler.parsed_fn_signature.parameters
    }
    _, schemas = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    schema.components.schemas.update(cast("dict[str, Schema]", schemas), Problem=_PROBLEM)
    for path, item in schema.paths.items():
        if path.startswith("/api/v1"):
            for operation in (item.get, item.post, item.patch):
                if operation is not None and operation.responses is not None:
                    # Ours are problem details, with the statuses of RFC 9110.
                    operation.responses.pop("400", None)
                    operation.responses["default"] = _REFUSAL
        if item.patch is not None:
            item.patch.parameters = [*(item.patch.parameters or []), _IF_MATCH]
    export = schema.paths["/api/v1/audit-records/export"].get
    assert export is not None
    assert export.responses is not None
    export.responses["200"] = _EXPORT
    _tell_of_the_alert(schema)
    schema.paths.update(RAW_ROUTES)


def _tell_of_the_alert(schema: OpenAPI) -> None:
    """Add the header that every answer to an operator may have: before the raw routes are there,
    which have no operator."""
    schema.components.headers = {_ALERT: _ALERT_HEADER}
    for path, item in (schema.paths or {}).items():
        if path.startswith("/api/v1"):
            for operation in (item.get, item.post, item.patch):
                for response in ((operation and operation.responses) or {}).values():
                    if isinstance(response, OpenAPIResponse):
                        response.headers = {
                            **(response.headers or {}),
                            _ALERT: Reference(ref=f"#/components/headers/{_ALERT}"),
                        }


def _object(properties: dict[str, Schema], required: list[str]) -> Schema:
    return Schema(type=OpenAPIType.OBJECT, properties=dict(properties), required=required)


def _json(
    description: str,
    schema: Schema,
    media_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> OpenAPIResponse:
    return OpenAPIResponse(
        description=description,
        content={media_type: OpenAPIMediaType(schema=schema)},
        headers={
            name: OpenAPIHeader(name="", param_in="header", description=text, schema=_STRING)
            for name, text in (headers or {}).items()
        },
    )


_PROBLEM: Final = _object(
    {
        "type": _STRING,
        "title": _STRING,
        "status": Schema(type=OpenAPIType.INTEGER),
        "detail": _STRING,
        "request_id": _STRING,
        "error": Schema(type=OpenAPIType.STRING, description="A code of RFC 6749 §5.2."),
        "errors": Schema(
            type=OpenAPIType.ARRAY,
            description="Where it is wrong: a JSON pointer into the body, or a parameter.",
            items=_object(
                {"pointer": _STRING, "parameter": _STRING, "detail": _STRING}, ["detail"]
            ),
        ),
    },
    ["type", "title", "status", "detail", "request_id"],
)
_REFUSAL: Final = OpenAPIResponse(
    description="A refusal, as problem details (RFC 9457).",
    content={
        "application/problem+json": OpenAPIMediaType(
            schema=Reference(ref="#/components/schemas/Problem")
        )
    },
)


_EXPORT: Final = OpenAPIResponse(
    description="The records, as they come. An answer that breaks off is incomplete.",
    content={
        media_type: OpenAPIMediaType(schema=_STRING)
        for media_type in ("application/x-ndjson", "text/csv")
    },
)


def _oauth_error(codes: list[str]) -> Schema:
    return _object(
        {"error": Schema(type=OpenAPIType.STRING, enum=codes), "error_description": _STRING},
        ["error", "error_description"],
    )


_REQUEST_ERRORS: Final = [
    "invalid_request",
    "unsupported_grant_type",
    "invalid_scope",
    "invalid_target",
]

_TOKEN: Final = PathItem(
    post=Operation(
        operation_id="Token",
        tags=["Token"],
        summary="Exchange a credential for an access token.",
        description=(
            "The client credentials grant (RFC 6749 §4.4) with resource indicators (RFC 8707). "
            "The client authenticates with HTTP Basic or with client_id and client_secret in the "
            "body, never both. Each parameter may stand once; an empty one counts as absent and "
            "an unknown one is ignored. The query must be empty."
        ),
        security=[{"client_secret_basic": []}, {}],
        request_body=RequestBody(
            required=True,
            content={
                "application/x-www-form-urlencoded": OpenAPIMediaType(
                    schema=_object(
                        {
                            "grant_type": Schema(
                                type=OpenAPIType.STRING, enum=["client_credentials"]
                            ),
                            "client_id": Schema(
                                type=OpenAPIType.STRING,
                                description="The id of the service user, unless in HTTP Basic.",
                                pattern="^(su_[a-z2-7]{24})?$",
                            ),
                            "client_secret": Schema(
                                type=OpenAPIType.STRING,
                                description="A secret of its own, unless in HTTP Basic.",
                                pattern="^(pvs_[0-9A-Za-z]{49})?$",
                            ),
                            "scope": Schema(
                                type=OpenAPIType.STRING,
                                description="Names separated by single spaces; absent: all that "
                                "is granted for the audience.",
                            ),
                            "resource": Schema(
                                type=OpenAPIType.STRING,
                                description="The audience, one absolute URI; absent: the first "
                                "of the service user.",
                            ),
                        },
                        ["grant_type"],
                    )
                )
            },
        ),
        responses={
            "200": _json(
                "A token, whose audit record is durable.",
                _object(
                    {
                        "access_token": _STRING,
                        "token_type": Schema(type=OpenAPIType.STRING, enum=["Bearer"]),
                        "expires_in": Schema(type=OpenAPIType.INTEGER, description="Seconds."),
                        "scope": _STRING,
                        "credential_expires_at": Schema(
                            type=OpenAPIType.STRING,
                            description="Present from 30 days before the credential ends.",
                        ),
                    },
                    ["access_token", "token_type", "expires_in", "scope"],
                ),
                headers={"Cache-Control": "no-store", "Pragma": "no-cache"},
            ),
            "400": _json("The request cannot be granted.", _oauth_error(_REQUEST_ERRORS)),
            "401": _json(
                "The client is not authenticated.",
                _oauth_error(["invalid_client"]),
                headers={"WWW-Authenticate": "The Basic challenge."},
            ),
            "405": OpenAPIResponse(
                description="Only POST.",
                headers={
                    "Allow": OpenAPIHeader(
                        name="", param_in="header", description="POST, OPTIONS", schema=_STRING
                    )
                },
            ),
            "408": _json("The body came too slowly.", _oauth_error(["invalid_request"])),
            "413": _json("The body is larger than 8 KiB.", _oauth_error(["invalid_request"])),
            "415": _json("The body is no form in UTF-8.", _oauth_error(["invalid_request"])),
            "503": _json(
                "Neither a grant nor a refusal can be put on record just now.",
                _oauth_error(["temporarily_unavailable"]),
                headers={"Retry-After": "Seconds."},
            ),
        },
    )
)


def _public(
    operation_id: str,
    summary: str,
    schema: Schema,
    media_type: str,
    more: dict[str, OpenAPIResponse] | None = None,
) -> PathItem:
    responses: Responses = {"200": _json(summary, schema, media_type), **(more or {})}
    return PathItem(
        get=Operation(
            operation_id=operation_id,
            tags=["Discovery and health"],
            summary=summary,
            security=[{}],
            responses=responses,
        )
    )


_NOT_MODIFIED: Final = {"304": OpenAPIResponse(description="Not modified since that ETag.")}
_ANY_OBJECT: Final = Schema(type=OpenAPIType.OBJECT)
RAW_ROUTES: Final[dict[str, PathItem]] = {
    token.PATH: _TOKEN,
    well_known.JWKS_PATH: _public(
        "JWKS",
        "The published keys (RFC 7517).",
        _object({"keys": Schema(type=OpenAPIType.ARRAY, items=_ANY_OBJECT)}, ["keys"]),
        "application/jwk-set+json",
        _NOT_MODIFIED,
    ),
    well_known.METADATA_PATH: _public(
        "Metadata",
        "The authorization server metadata (RFC 8414).",
        _ANY_OBJECT,
        "application/json",
        _NOT_MODIFIED,
    ),
    well_known.OPENID_PATH: _public(
        "OpenIDMetadata",
        "The same document, for verifiers that look only here.",
        _ANY_OBJECT,
        "application/json",
        _NOT_MODIFIED,
    ),
    audit_tree.CHECKPOINT_PATH: _public(
        "Checkpoint",
        "The newest signed head of the audit log (C2SP tlog-checkpoint).",
        _STRING,
        "text/plain",
        _NOT_MODIFIED | {"404": OpenAPIResponse(description="There is none yet.")},
    ),
    "/healthz": _public("Health", "Whether the process lives.", _ANY_OBJECT, "application/json"),
    "/readyz": _public(
        "Ready",
        "Whether to send requests here.",
        _ANY_OBJECT,
        "application/json",
        {"503": _json("Not now; the body says why.", _ANY_OBJECT)},
    ),
    "/metrics": _public("Metrics", "Metrics for Prometheus.", _STRING, "text/plain"),
}
