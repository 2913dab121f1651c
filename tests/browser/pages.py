"""Every page that can be opened by its address, by who opens it; paths begin after `/console`.

What is in braces is for whoever opens them to fill in.
"""

from typing import Final

OPERATOR: Final = {
    "home": "",
    "service users": "/service-users",
    "new service user": "/service-users/new",
    "service user": "/service-users/{service_user_id}",
    "change service user": "/service-users/{service_user_id}/change",
    "disable service user": "/service-users/{service_user_id}/disable",
    "new credential": "/service-users/{service_user_id}/credentials/new",
    "revoke credential": "/service-users/{service_user_id}/credentials/{credential_id}/revoke",
    "confirm credential": "/service-users/{service_user_id}/credentials/{credential_id}/confirm",
    "credentials that end": "/service-users/ending",
    "hand over": "/service-users/{service_user_id}/hand-over",
    "token": "/token",
    "token of one": "/token?service_user={service_user_id}",
    "upload": "/upload",
    "upload of one": "/upload?service_user={service_user_id}",
    "signing keys": "/signing-keys",
    "revoke key": "/signing-keys/{kid}/revoke",
    "revoke all keys": "/signing-keys/revoke-all",
    "audit": "/audit",
    "audit tail": "/audit/tail",
    "audit record": "/audit/records/{record_id}",
    "nothing": "/no/such/page",
}
INTEGRATOR: Final = {
    "own home": "",
    "own credentials": "/me",
    "own rotation": "/me/rotate",
    "own token": "/token",
    "own upload": "/upload",
    "own audit": "/audit",
}
PUBLIC: Final = {"sign-in": "/sign-in", "open hand-over": "/hand-over"}
