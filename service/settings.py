"""The settings of one installation, read once from `PRIVYSEAL_*` and frozen.

Opens no file and no connection: whether what is named here exists is for those who use it.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from keys.secret import Secret
from keys.signer import LOCAL

PREFIX = "PRIVYSEAL_"

RING_POLL = 10
"""Seconds after which every process has read the key ring again, NOTIFY or not."""

MAX_TOKEN_LIFETIME = 3600
"""Seconds: no token lives longer, whatever a service user or a setting says."""

LOCAL_AUDIENCE = "http://127.0.0.1:8081"
"""The example ingest service; any other installation names its own."""

# Read by the client half of the command line and by the tests, not by the server.
_NOT_OURS = frozenset({"AUDIT_KEY", "URL", "CLIENT_ID", "CLIENT_SECRET", "REQUIRE_ALL"})

# RFC 8414 §2: no query, no fragment; ours also has no path, so that one comparison of bytes does.
_ISSUER = re.compile(
    r"(?P<scheme>https?)://(?P<host>[a-z0-9.-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?"
)
# RFC 8707 §2: an absolute URI without fragment.
_AUDIENCE = re.compile(r"[a-z][a-z0-9+.-]{0,31}:[A-Za-z0-9._~:/?@!$&'()*+,;=%-]{1,200}")
_WEB_ADDRESS = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[1-9][0-9]{0,4})?"
    r"(?:/[A-Za-z0-9._~/%-]*)?"
)
# OpenID Connect Discovery §3: https, no query, no fragment; a path is common.
_OIDC_ISSUER = re.compile(
    r"(?P<scheme>https?)://(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::[1-9][0-9]{0,4})?"
    r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%/-]*)?"
)
_PROVIDER_FORMS = {
    # RFC 6749 appendix A.1
    "OIDC_CLIENT_ID": (re.compile(r"[ -~]{1,255}"), "255 printable ASCII characters"),
    "OIDC_SCOPES_CLAIM": (re.compile(r"[!-~]{1,255}"), "255 ASCII characters without spaces"),
    "OIDC_NAME": (re.compile(r"[^\x00-\x1f\x7f]{1,40}"), "40 characters on one line"),
}
_INTEGER = re.compile(r"[0-9]{1,9}")
_SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_KEY_BITS = (2048, 3072, 4096)
_ROTATION_GATES = ("bounded", "strict")

Network = IPv4Network | IPv6Network


class SettingsError(Exception):
    """Some settings cannot be used; the text has one line for each, and each says what to do."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an installation may choose. Durations are whole seconds unless the name says days.

    Raises `SettingsError` for whatever would break a promise of the authority.
    """

    issuer: str = "http://127.0.0.1:8080"
    database_url: Secret | None = None
    """`None`: an embedded PostgreSQL under `data_dir`."""
    data_dir: Path = Path("var")
    kek_file: Path | None = None
    """`None`: `data_dir/kek`; read `kek_path`."""
    checkpoint_dir: Path | None = None
    """`None`: `data_dir/checkpoints`; read `checkpoint_path`."""
    audit_retention_months: int | None = None
    """How old a month is when `audit archive` takes it and `doctor` misses that; `None`: never."""
    audience: str = LOCAL_AUDIENCE
    ingest_url: str | None = None
    """Where the console's Upload page sends a document to; `None`: `audience` and `/api/v1/ingest`,
    if that is a web address, and not plain http beyond loopback: a token goes there."""
    token_lifetime: int = 900
    jwks_max_age: int = 300
    key_publish_lead: int = 86_400
    key_rotation_days: int = 30
    key_bits: int = 2048
    key_custody: tuple[str, ...] = (LOCAL,)
    """Where private halves are: `local:`, or a PKCS #11 URI (RFC 7512). The first makes new keys,
    all are used."""
    rotation_gate: str = "bounded"
    """`strict`: a rotation waits for verifiers that lack the next key until an operator asks."""
    clock_skew: int = 60
    trusted_proxies: tuple[Network, ...] = ()
    drain_seconds: int = 0
    """How long a process that was told to stop is not ready before it stops."""
    log_level: str = "info"
    pg_bin: Path | None = None
    """Directory of other PostgreSQL binaries for the embedded server."""
    oidc_issuer: str | None = None
    """The human portal through which people sign in to the console; `None`: with credentials only.
    It has to know the address `provider_callback`."""
    oidc_client_id: str | None = None
    oidc_client_secret: Secret | None = None
    """`None`: a public client, which PKCE alone protects."""
    oidc_scopes_claim: str = "privyseal_scopes"
    """The claim of the ID token whose values are the admin scopes of who signs in."""
    oidc_name: str | None = None
    """What people call the portal; `None`: its host. Read `provider_name`."""

    def __post_init__(self) -> None:
        if problems := _problems(self):
            raise SettingsError(problems)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Read every `PRIVYSEAL_*` variable; raise `SettingsError` naming all faults at once.

        An empty variable counts as unset. A variable that nobody reads is refused, because a
        misspelt setting must not be silent.
        """
        problems: list[str] = []
        given: dict[str, Any] = {}
        for variable, text in environ.items():
            name = variable.removeprefix(PREFIX)
            if name == variable or name in _NOT_OURS:
                continue
            if (read := _READERS.get(name)) is None:
                problems.append(f"{variable} is not a setting. Remove it, or correct its name.")
            elif text:
                try:
                    given[name.lower()] = read(text)
                except ValueError as error:
                    problems.append(f"{variable} {error}.")
        try:
            settings = cls(**given)
        except SettingsError as error:
            raise SettingsError([*problems, *error.problems]) from None
        if problems:
            raise SettingsError(problems)
        return settings

    @property
    def kek_path(self) -> Path:
        """The file with the key-encryption keys."""
        return self.kek_file or self.data_dir / "kek"

    @property
    def checkpoint_path(self) -> Path:
        """Where the audit log's checkpoints are kept outside the database."""
        return self.checkpoint_dir or self.data_dir / "checkpoints"

    @property
    def log_origin(self) -> str:
        """The name of the first audit log (C2SP tlog-checkpoint: no scheme)."""
        return f"{self.issuer.partition('://')[2]}/audit/1"

    @property
    def upload_url(self) -> str | None:
        """Where the console's Upload page sends a document to; None if nothing says where."""
        url = self.ingest_url or f"{self.audience.rstrip('/')}/api/v1/ingest"
        match = _WEB_ADDRESS.fullmatch(url)
        return url if match and not _is_in_the_clear(match) else None

    @property
    def api_audience(self) -> str:
        """The only `aud` that the admin API accepts."""
        return f"{self.issuer}/api/v1"

    @property
    def console_audience(self) -> str:
        """The `aud` of a session of the console, which no exchange gives."""
        return f"{self.issuer}/console"

    @property
    def provider_name(self) -> str | None:
        """What the sign-in page calls the human portal; `None` if there is none."""
        return self.oidc_issuer and (self.oidc_name or urlsplit(self.oidc_issuer).hostname)

    @property
    def provider_callback(self) -> str:
        """Where the human portal sends people back to (OpenID Connect: the `redirect_uri`)."""
        return f"{self.console_audience}/sign-in/callback"


def warnings(settings: Settings) -> list[str]:
    """Return what is allowed but weak, a sentence each, to be logged at every start."""
    if settings.database_url is None:
        return []
    hosts, sslmode = _hosts_and_sslmode(settings.database_url.reveal())
    if sslmode == "verify-full" or all(map(_is_loopback, hosts)):
        return []
    return [
        f"PRIVYSEAL_DATABASE_URL has sslmode={sslmode}: whoever stands between here and Postgres "
        "can pretend to be it. Use sslmode=verify-full."
    ]


def _path(text: str) -> Path:
    if "\0" in text:
        raise ValueError("must be a path without NUL")
    return Path(text)


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError("must be a whole number in decimal digits, at most nine of them")
    return int(text)


def _networks(text: str) -> tuple[Network, ...]:
    networks: list[Network] = []
    for part in text.split(","):
        try:
            networks.append(ip_network(part.strip()))
        except ValueError:
            raise ValueError(
                "must be networks such as 10.0.0.0/8 or fd00::/8 with no bits set beyond the "
                "prefix, separated by commas"
            ) from None
    return tuple(networks)


_READERS: dict[str, Callable[[str], Any]] = {
    "ISSUER": str,
    "DATABASE_URL": Secret,
    "DATA_DIR": _path,
    "KEK_FILE": _path,
    "CHECKPOINT_DIR": _path,
    "AUDIT_RETENTION_MONTHS": _integer,
    "AUDIENCE": str,
    "INGEST_URL": str,
    "TOKEN_LIFETIME": _integer,
    "JWKS_MAX_AGE": _integer,
    "KEY_PUBLISH_LEAD": _integer,
    "KEY_ROTATION_DAYS": _integer,
    "KEY_BITS": _integer,
    "KEY_CUSTODY": lambda text: tuple(text.split()),
    "ROTATION_GATE": str.lower,
    "CLOCK_SKEW": _integer,
    "TRUSTED_PROXIES": _networks,
    "DRAIN_SECONDS": _integer,
    "LOG_LEVEL": str.lower,
    "PG_BIN": _path,
    "OIDC_ISSUER": str,
    "OIDC_CLIENT_ID": str,
    "OIDC_CLIENT_SECRET": Secret,
    "OIDC_SCOPES_CLAIM": str,
    "OIDC_NAME": str,
}


def _problems(settings: Settings) -> list[str]:
    return [
        *_issuer_problems(settings),
        *_database_problems(settings),
        *_range_problems(settings),
        *_key_problems(settings),
        *_provider_problems(settings),
        *_other_problems(settings),
    ]


def _issuer_problems(settings: Settings) -> list[str]:
    match = _ISSUER.fullmatch(settings.issuer)
    if not match or int(match["port"] or 0) > 65_535:
        return [
            "PRIVYSEAL_ISSUER must be scheme, lower-case host and port only, such as "
            "https://tokens.example: no path, query, fragment, user name or trailing slash."
        ]
    if _is_in_the_clear(match):
        return [
            "PRIVYSEAL_ISSUER is plain http and not loopback: credentials would travel in the "
            "clear. Use https."
        ]
    return []


def _database_problems(settings: Settings) -> list[str]:
    if settings.database_url is None:
        issuer = _ISSUER.fullmatch(settings.issuer)
        if issuer and not _is_loopback(issuer["host"]):
            return [
                "PRIVYSEAL_DATABASE_URL is not set, and the embedded PostgreSQL is for loopback "
                "issuers only. Name a Postgres server."
            ]
        return []
    try:
        hosts, sslmode = _hosts_and_sslmode(settings.database_url.reveal())
    except ValueError as error:
        # The text is ours: the URL, with its password, is never repeated.
        return [f"PRIVYSEAL_DATABASE_URL {error}."]
    if sslmode is not None and sslmode not in _SSL_MODES:
        return [f"PRIVYSEAL_DATABASE_URL must have an sslmode of {', '.join(_SSL_MODES)}."]
    if sslmode is None and not all(map(_is_loopback, hosts)):
        return [
            "PRIVYSEAL_DATABASE_URL is not loopback and names no sslmode. "
            "Add sslmode=verify-full (and sslrootcert)."
        ]
    return []


def _range_problems(settings: Settings) -> list[str]:
    ranges = {
        "TOKEN_LIFETIME": (60, MAX_TOKEN_LIFETIME, "seconds"),
        "JWKS_MAX_AGE": (1, 86_400, "seconds"),
        "KEY_PUBLISH_LEAD": (1, 90 * 86_400, "seconds"),
        "KEY_ROTATION_DAYS": (1, 366, "days"),
        "CLOCK_SKEW": (5, 300, "seconds"),
        "DRAIN_SECONDS": (0, 300, "seconds"),
        "AUDIT_RETENTION_MONTHS": (1, 1200, "months"),
    }
    return [
        f"{PREFIX}{name} must be {low} to {high} {unit}."
        for name, (low, high, unit) in ranges.items()
        if (value := getattr(settings, name.lower())) is not None and not low <= value <= high
    ]


def _key_problems(settings: Settings) -> list[str]:
    problems: list[str] = []
    # A verifier may have fetched the set just before a process that polls published the key.
    least = settings.jwks_max_age + RING_POLL + settings.clock_skew
    if settings.key_publish_lead < least:
        problems.append(
            f"PRIVYSEAL_KEY_PUBLISH_LEAD must be at least {least} seconds (PRIVYSEAL_JWKS_MAX_AGE "
            f"+ {RING_POLL} + PRIVYSEAL_CLOCK_SKEW), or a rotation would break verifiers."
        )
    if settings.key_rotation_days * 86_400 < settings.key_publish_lead:
        problems.append(
            "PRIVYSEAL_KEY_ROTATION_DAYS is shorter than PRIVYSEAL_KEY_PUBLISH_LEAD: no key could "
            "be published long enough before its turn. Raise the first or lower the second."
        )
    retained = settings.audit_retention_months
    if retained is not None and 30 * retained < settings.key_rotation_days:
        problems.append(
            "PRIVYSEAL_AUDIT_RETENTION_MONTHS is shorter than PRIVYSEAL_KEY_ROTATION_DAYS: forged "
            "tokens of the key that signs could not be told from issued ones. Raise the first or "
            "lower the second."
        )
    if settings.key_bits not in _KEY_BITS:
        problems.append("PRIVYSEAL_KEY_BITS must be 2048, 3072 or 4096.")
    schemes = [uri.partition(":")[0] for uri in settings.key_custody if ":" in uri]
    if len(schemes) != len(settings.key_custody) or not {*schemes} <= {"local", "pkcs11"}:
        problems.append(
            "PRIVYSEAL_KEY_CUSTODY must be local: or a PKCS #11 URI (RFC 7512), such as "
            "pkcs11:token=privyseal?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source="
            "/run/secrets/pin, or both: the first makes new keys."
        )
    elif len(schemes) != len({*schemes}):
        problems.append("PRIVYSEAL_KEY_CUSTODY names two of one kind: one token at a time.")
    if settings.rotation_gate not in _ROTATION_GATES:
        problems.append(f"PRIVYSEAL_ROTATION_GATE must be {' or '.join(_ROTATION_GATES)}.")
    return problems


def _provider_problems(settings: Settings) -> list[str]:
    given = [
        f"{PREFIX}{name}"
        for name in ("OIDC_ISSUER", "OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET", "OIDC_NAME")
        if getattr(settings, name.lower()) is not None
    ]
    if not given:
        return []
    if settings.oidc_issuer is None or settings.oidc_client_id is None:
        return [
            f"{given[0]} is set, and a sign-in through a portal takes both PRIVYSEAL_OIDC_ISSUER "
            "and PRIVYSEAL_OIDC_CLIENT_ID. Set both, or none of these."
        ]
    problems: list[str] = []
    match = _OIDC_ISSUER.fullmatch(settings.oidc_issuer)
    if not match or _is_in_the_clear(match):
        problems.append(
            "PRIVYSEAL_OIDC_ISSUER must be the issuer of an OpenID Connect provider exactly as its "
            "discovery document has it, such as https://login.example/realms/staff: https unless "
            "loopback, no user name, query or fragment."
        )
    problems += [
        f"{PREFIX}{name} must be one to {words}."
        for name, (form, words) in _PROVIDER_FORMS.items()
        if not form.fullmatch(getattr(settings, name.lower()) or "-")
    ]
    return problems


def _other_problems(settings: Settings) -> list[str]:
    problems: list[str] = []
    if not _AUDIENCE.fullmatch(settings.audience):
        problems.append(
            "PRIVYSEAL_AUDIENCE must be an absolute URI without a fragment, "
            "such as https://ingest.example."
        )
    elif settings.audience in (settings.api_audience, settings.console_audience):
        problems.append(
            "PRIVYSEAL_AUDIENCE is the audience of the admin API or the console. "
            "Name the service that verifies the tokens."
        )
    if settings.ingest_url is not None and settings.upload_url is None:
        problems.append(
            "PRIVYSEAL_INGEST_URL must be the web address that takes documents, such as "
            "https://ingest.example/api/v1/ingest: https unless loopback, because a token goes "
            "there; no user name, query or fragment."
        )
    issuer = _ISSUER.fullmatch(settings.issuer)
    if settings.audience == LOCAL_AUDIENCE and issuer and not _is_loopback(issuer["host"]):
        problems.append(
            "PRIVYSEAL_AUDIENCE is not set, and its default is for trying on one machine. "
            "Name the service that verifies the tokens, such as https://ingest.example."
        )
    if any(network.prefixlen == 0 for network in settings.trusted_proxies):
        problems.append(
            "PRIVYSEAL_TRUSTED_PROXIES trusts every address, so anybody could write any address "
            "into the audit log. Name the proxies."
        )
    if settings.log_level not in _LOG_LEVELS:
        problems.append(f"PRIVYSEAL_LOG_LEVEL must be one of {', '.join(_LOG_LEVELS)}.")
    return problems


def _hosts_and_sslmode(url: str) -> tuple[list[str], str | None]:
    """Return the hosts that a connection URI may lead to, and its `sslmode`.

    Source: PostgreSQL, "Connection URIs". Raises `ValueError` with a text that repeats nothing.
    """
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError("is not a valid URI") from None
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("must begin with postgresql://")
    if "service" in query or "servicefile" in query:
        raise ValueError("must name its hosts itself, not through a service file")
    authority = parts.netloc.rpartition("@")[2]
    hosts = [_without_port(unquote(host)) for host in authority.split(",")] if authority else []
    for value in query.get("host", []):
        hosts += value.split(",")
    if not hosts or not all(hosts):
        raise ValueError("must name a host")
    modes = query.get("sslmode", [None])
    if len(modes) > 1:
        raise ValueError("names sslmode twice")
    return hosts, modes[0]


def _without_port(host: str) -> str:
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _is_in_the_clear(address: re.Match[str]) -> bool:
    """Whether what goes there can be read, and changed, on its way."""
    return address["scheme"] == "http" and not _is_loopback(address["host"])


def _is_loopback(host: str) -> bool:
    # A directory is that of a Unix-domain socket.
    if host == "localhost" or host.startswith("/"):
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
