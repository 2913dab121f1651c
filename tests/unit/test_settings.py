"""Settings that would break a promise are refused at start, in words."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from service.settings import Settings, SettingsError, warnings

CANARY = "canary-9d1b"
REMOTE = f"postgresql://privyseal_service:{CANARY}@db.example:5432/privyseal"
HTTPS = {
    "PRIVYSEAL_ISSUER": "https://tokens.example",
    "PRIVYSEAL_AUDIENCE": "https://ingest.example",
}


def problems_of(**settings: str) -> list[str]:
    environ = {f"PRIVYSEAL_{name}": text for name, text in settings.items()}
    with pytest.raises(SettingsError) as refusal:
        Settings.from_environ(environ)
    assert str(refusal.value).splitlines() == list(refusal.value.problems)
    return list(refusal.value.problems)


def test_nothing_set_means_loopback_and_the_embedded_database() -> None:
    settings = Settings.from_environ({"PATH": "/usr/bin"})
    assert settings == Settings()
    assert settings.issuer == "http://127.0.0.1:8080"
    assert settings.api_audience == "http://127.0.0.1:8080/api/v1"
    assert settings.database_url is None
    assert settings.kek_path == Path("var/kek")
    assert warnings(settings) == []


def test_every_setting_is_read() -> None:
    settings = Settings.from_environ(
        {
            "PRIVYSEAL_ISSUER": "https://tokens.example:8443",
            "PRIVYSEAL_DATABASE_URL": f"{REMOTE}?sslmode=verify-full",
            "PRIVYSEAL_CHECKPOINT_DIR": "/srv/checkpoints",
            "PRIVYSEAL_DATA_DIR": "/srv/privyseal",
            "PRIVYSEAL_KEK_FILE": "/run/secrets/kek",
            "PRIVYSEAL_AUDIENCE": "https://ingest.example",
            "PRIVYSEAL_TOKEN_LIFETIME": "600",
            "PRIVYSEAL_JWKS_MAX_AGE": "120",
            "PRIVYSEAL_KEY_PUBLISH_LEAD": "7200",
            "PRIVYSEAL_KEY_ROTATION_DAYS": "7",
            "PRIVYSEAL_KEY_BITS": "3072",
            "PRIVYSEAL_CLOCK_SKEW": "30",
            "PRIVYSEAL_TRUSTED_PROXIES": "10.0.0.0/8, fd00::/8",
            "PRIVYSEAL_LOG_LEVEL": "DEBUG",
            "PRIVYSEAL_PG_BIN": "/opt/pg/bin",
        }
    )
    assert settings.database_url is not None
    assert settings.database_url.reveal() == f"{REMOTE}?sslmode=verify-full"
    assert settings.kek_path == Path("/run/secrets/kek")
    assert settings.trusted_proxies == (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert (settings.token_lifetime, settings.jwks_max_age, settings.key_bits) == (600, 120, 3072)
    assert (settings.key_publish_lead, settings.key_rotation_days) == (7200, 7)
    assert (settings.clock_skew, settings.log_level) == (30, "debug")
    assert (settings.data_dir, settings.pg_bin) == (Path("/srv/privyseal"), Path("/opt/pg/bin"))
    assert settings.audience == "https://ingest.example"
    assert settings.checkpoint_path == Path("/srv/checkpoints")
    assert settings.log_origin == "tokens.example:8443/audit/1"


def test_a_misspelt_setting_is_refused_by_name() -> None:
    assert problems_of(TOKEN_LIFTIME="600") == [
        "PRIVYSEAL_TOKEN_LIFTIME is not a setting. Remove it, or correct its name."
    ]


def test_variables_of_the_client_and_of_the_tests_are_left_alone() -> None:
    names = ("URL", "CLIENT_ID", "CLIENT_SECRET", "REQUIRE_ALL")
    assert Settings.from_environ({f"PRIVYSEAL_{name}": "x" for name in names}) == Settings()


def test_all_faults_are_told_at_once() -> None:
    told = problems_of(TOKEN_LIFETIME="soon", ISSUER="http://tokens.example/", LOG_LEVEL="loud")
    assert [line.split()[0] for line in told] == [
        "PRIVYSEAL_TOKEN_LIFETIME",
        "PRIVYSEAL_ISSUER",
        "PRIVYSEAL_LOG_LEVEL",
    ]


@pytest.mark.parametrize(
    "issuer",
    [
        "https://tokens.example/",
        "https://tokens.example/path",
        "https://tokens.example?x=1",
        "https://tokens.example#x",
        "https://user@tokens.example",
        "https://Tokens.example",
        "https://tokens.example:",
        "https://tokens.example:99999",
        "https://tokens.example\n",
        "ftp://127.0.0.1",
        "tokens.example",
        "https://",
        "http://tokens.example",
        "http://127.0.0.1.example",
        "http://10.0.0.1",
    ],
)
def test_an_issuer_of_another_form_or_in_the_clear_is_refused(issuer: str) -> None:
    assert problems_of(ISSUER=issuer, DATABASE_URL="postgresql://localhost/x")[0].startswith(
        "PRIVYSEAL_ISSUER "
    )


@pytest.mark.parametrize(
    "issuer",
    ["http://127.0.0.1:8080", "http://localhost:1", "http://[::1]:8080", "https://127.0.0.2"],
)
def test_a_loopback_issuer_may_use_the_embedded_database(issuer: str) -> None:
    assert Settings.from_environ({"PRIVYSEAL_ISSUER": issuer}).issuer == issuer


def test_a_public_issuer_needs_a_database() -> None:
    assert "Name a Postgres server" in problems_of(ISSUER="https://tokens.example")[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TOKEN_LIFETIME", "59"),
        ("TOKEN_LIFETIME", "3601"),
        ("TOKEN_LIFETIME", "-900"),
        ("TOKEN_LIFETIME", "900.0"),
        ("TOKEN_LIFETIME", "9_00"),
        ("TOKEN_LIFETIME", "٩٠٠"),
        ("JWKS_MAX_AGE", "0"),
        ("CLOCK_SKEW", "301"),
        ("KEY_BITS", "1024"),
        ("KEY_ROTATION_DAYS", "0"),
        ("TRUSTED_PROXIES", "10.0.0.1/8"),
        ("TRUSTED_PROXIES", "proxy.example"),
        ("TRUSTED_PROXIES", "0.0.0.0/0"),
        ("TRUSTED_PROXIES", "::/0"),
        ("AUDIENCE", "two words"),
        ("AUDIENCE", "http://127.0.0.1:8080/api/v1"),
        ("LOG_LEVEL", "verbose"),
    ],
)
def test_a_value_out_of_form_or_range_is_refused(name: str, text: str) -> None:
    assert problems_of(**{name: text})[0].startswith(f"PRIVYSEAL_{name} ")


def test_p5_records_are_kept_for_as_long_as_a_key_signs() -> None:
    for months, days in (("1", "30"), ("3", "90"), ("12", "360")):
        Settings.from_environ(
            {
                "PRIVYSEAL_AUDIT_RETENTION_MONTHS": months,
                "PRIVYSEAL_KEY_ROTATION_DAYS": days,
            }
        )
        (told,) = problems_of(AUDIT_RETENTION_MONTHS=months, KEY_ROTATION_DAYS=str(int(days) + 1))
        assert told.startswith("PRIVYSEAL_AUDIT_RETENTION_MONTHS is shorter")


@pytest.mark.parametrize(
    ("url", "is_safe"),
    [
        ("https://ingest.example/api/v1/ingest", True),
        ("https://ingest.example:8443", True),
        ("http://127.0.0.1:8081/api/v1/ingest", True),
        ("http://[::1]:8081", True),
        ("http://localhost/upload", True),
        ("http://ingest.example/api/v1/ingest", False),
        ("http://127.0.0.1.example", False),
        ("http://10.0.0.1:8081", False),
        ("http://[fd00::1]", False),
        ("http://localhost:pw@ingest.example/", False),
        ("https://[::1", False),
        ("urn:bank:ingest", False),
    ],
)
def test_no_token_is_sent_in_the_clear_with_a_document(url: str, is_safe: bool) -> None:
    if is_safe:
        assert Settings.from_environ({"PRIVYSEAL_INGEST_URL": url}).upload_url == url
    else:
        (told,) = problems_of(INGEST_URL=url)
        assert told.startswith("PRIVYSEAL_INGEST_URL must be ")


@pytest.mark.parametrize(
    ("audience", "upload_url"),
    [
        ("https://ingest.example/", "https://ingest.example/api/v1/ingest"),
        ("http://127.0.0.1:8081", "http://127.0.0.1:8081/api/v1/ingest"),
        ("http://ingest.example", None),
        ("https://ingest.example?a=b", None),
        ("urn:bank:ingest", None),
    ],
)
def test_an_audience_is_an_address_for_documents_only_if_no_token_goes_there_in_the_clear(
    audience: str, upload_url: str | None
) -> None:
    settings = Settings.from_environ({"PRIVYSEAL_AUDIENCE": audience})
    assert settings.upload_url == upload_url


def test_k7_a_publish_lead_that_breaks_verifiers_is_refused() -> None:
    timing = {"PRIVYSEAL_JWKS_MAX_AGE": "300", "PRIVYSEAL_CLOCK_SKEW": "60"}
    Settings.from_environ(timing | {"PRIVYSEAL_KEY_PUBLISH_LEAD": "370"})
    told = problems_of(JWKS_MAX_AGE="300", CLOCK_SKEW="60", KEY_PUBLISH_LEAD="369")
    assert told[0].startswith("PRIVYSEAL_KEY_PUBLISH_LEAD must be at least 370 seconds")


def test_k7_a_rotation_faster_than_the_publish_lead_is_refused() -> None:
    told = problems_of(KEY_ROTATION_DAYS="1", KEY_PUBLISH_LEAD="86401")
    assert told[0].startswith("PRIVYSEAL_KEY_ROTATION_DAYS is shorter")


@pytest.mark.parametrize(
    "url",
    [
        REMOTE,
        f"postgresql://u:{CANARY}@127.0.0.1,db.example/x",
        f"postgresql://u:{CANARY}@127.0.0.1/x?host=db.example",
        f"{REMOTE}?sslmode=on",
        f"{REMOTE}?sslmode=require&sslmode=disable",
        f"mysql://u:{CANARY}@127.0.0.1/x",
        f"postgresql://u:{CANARY}@[::1/x",
        f"postgresql://u:{CANARY}@/x",
        f"postgresql://u:{CANARY}@127.0.0.1/x?service=other",
        f"host=db.example password={CANARY}",
    ],
)
def test_a_database_url_is_refused_without_repeating_it(url: str) -> None:
    (told,) = problems_of(DATABASE_URL=url)
    assert told.startswith("PRIVYSEAL_DATABASE_URL ")
    assert CANARY not in told
    assert "example" not in told


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@127.0.0.1:5432/x",
        "postgres://u@localhost/x",
        "postgresql://u@[::1]:5432/x",
        "postgresql://u@/x?host=/run/postgresql",
        "postgresql://u@%2Frun%2Fpostgresql/x",
        f"{REMOTE}?sslmode=verify-full",
        "postgresql://u@a.example,b.example:5433/x?sslmode=verify-full",
    ],
)
def test_a_local_database_needs_no_sslmode_and_a_verified_one_no_warning(url: str) -> None:
    settings = Settings.from_environ(HTTPS | {"PRIVYSEAL_DATABASE_URL": url})
    assert warnings(settings) == []


@pytest.mark.parametrize("sslmode", ["disable", "allow", "prefer", "require", "verify-ca"])
def test_an_sslmode_below_verify_full_is_a_warning(sslmode: str) -> None:
    url = f"{REMOTE}?sslmode={sslmode}"
    (told,) = warnings(Settings.from_environ(HTTPS | {"PRIVYSEAL_DATABASE_URL": url}))
    assert f"sslmode={sslmode}" in told
    assert CANARY not in told


def test_the_password_of_the_database_is_in_no_repr() -> None:
    url = f"{REMOTE}?sslmode=verify-full"
    settings = Settings.from_environ(HTTPS | {"PRIVYSEAL_DATABASE_URL": url})
    assert CANARY not in repr(settings) + str(settings)


def test_custody_is_local_or_a_pkcs11_uri_and_the_gate_is_bounded_or_strict() -> None:
    uri = "pkcs11:token=hsm?module-path=/usr/lib/hsm.so&pin-source=/run/pin"
    given = {"PRIVYSEAL_KEY_CUSTODY": uri, "PRIVYSEAL_ROTATION_GATE": "STRICT"}
    settings = Settings.from_environ(given)
    assert (settings.key_custody, settings.rotation_gate) == ((uri,), "strict")
    assert (Settings().key_custody, Settings().rotation_gate) == (("local:",), "bounded")
    both = Settings.from_environ({"PRIVYSEAL_KEY_CUSTODY": f"local: {uri}"})
    assert both.key_custody == ("local:", uri)
    assert problems_of(KEY_CUSTODY=f"{uri} {uri}")[0].startswith("PRIVYSEAL_KEY_CUSTODY names two")
    for custody in ("vault:transit", "local", "/run/keys"):
        (told,) = problems_of(KEY_CUSTODY=custody)
        assert told.startswith("PRIVYSEAL_KEY_CUSTODY must be local: or a PKCS #11 URI")
    assert problems_of(ROTATION_GATE="open") == [
        "PRIVYSEAL_ROTATION_GATE must be bounded or strict."
    ]


DATABASE = {"PRIVYSEAL_DATABASE_URL": f"{REMOTE}?sslmode=verify-full"}
PORTAL = {
    "PRIVYSEAL_OIDC_ISSUER": "https://login.example/realms/staff",
    "PRIVYSEAL_OIDC_CLIENT_ID": "privyseal",
}


def test_a_portal_takes_issuer_and_client_id_and_the_rest_has_defaults() -> None:
    settings = Settings.from_environ(HTTPS | DATABASE | PORTAL)
    assert settings.provider_name == "login.example"
    assert settings.provider_callback == "https://tokens.example/console/sign-in/callback"
    assert (settings.oidc_scopes_claim, settings.oidc_client_secret) == ("privyseal_scopes", None)
    named = {
        "PRIVYSEAL_OIDC_NAME": "Bank Portal",
        "PRIVYSEAL_OIDC_SCOPES_CLAIM": "https://bank.example/privyseal",
        "PRIVYSEAL_OIDC_CLIENT_SECRET": CANARY,
    }
    settings = Settings.from_environ(HTTPS | DATABASE | PORTAL | named)
    assert settings.provider_name == "Bank Portal"
    assert settings.oidc_scopes_claim == "https://bank.example/privyseal"
    assert CANARY not in repr(settings) + str(settings)
    assert Settings().provider_name is None


@pytest.mark.parametrize("name", ["ISSUER", "CLIENT_ID", "CLIENT_SECRET", "NAME"])
def test_half_a_portal_is_refused_by_name(name: str) -> None:
    (told,) = problems_of(**{f"OIDC_{name}": "https://login.example"})
    assert told.startswith(f"PRIVYSEAL_OIDC_{name} is set")
    assert "Set both, or none of these" in told


@pytest.mark.parametrize(
    "issuer",
    [
        "http://login.example",
        "login.example",
        "https://login.example?tenant=1",
        "https://login.example#x",
        "https://user@login.example",
        "https://login.example/ ",
        "ftp://127.0.0.1",
    ],
)
def test_an_issuer_that_is_no_openid_connect_issuer_is_refused(issuer: str) -> None:
    (told,) = problems_of(OIDC_ISSUER=issuer, OIDC_CLIENT_ID="privyseal")
    assert told.startswith("PRIVYSEAL_OIDC_ISSUER must be")


@pytest.mark.parametrize(
    "issuer", ["http://127.0.0.1:9000", "http://localhost/realms/a", "http://[::1]"]
)
def test_a_portal_on_loopback_needs_no_https(issuer: str) -> None:
    portal = {"PRIVYSEAL_OIDC_ISSUER": issuer, "PRIVYSEAL_OIDC_CLIENT_ID": "privyseal"}
    assert Settings.from_environ(portal).oidc_issuer == issuer


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("OIDC_CLIENT_ID", "privyseal\u00fc"),
        ("OIDC_SCOPES_CLAIM", "two words"),
        ("OIDC_NAME", "two\nlines"),
        ("OIDC_NAME", "x" * 41),
    ],
)
def test_what_cannot_be_sent_or_shown_of_a_portal_is_refused(name: str, text: str) -> None:
    portal = {"OIDC_ISSUER": "https://login.example", "OIDC_CLIENT_ID": "privyseal"}
    (told,) = problems_of(**{**portal, name: text})
    assert told.startswith(f"PRIVYSEAL_{name} must be one to ")
