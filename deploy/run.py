"""`make run`: authority, example ingest service and a first integrator on this machine, shown.

For trying only: it prints credentials. It uses the commands and the API, and reaches into nothing.
"""

import argparse
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import httpx
import jwt

REPOSITORY: Final = Path(__file__).resolve().parents[1]
PRIVYSEAL: Final = Path(sys.executable).with_name("privyseal")
HOST: Final = "127.0.0.1"
DEFAULT_PORTS: Final = (8080, 8081)
START_DEADLINE: Final = 60.0
STOP_DEADLINE: Final = 40.0
CALL_DEADLINE: Final = 10.0
SHOWN: Final = 60
"""Characters of a value: with its name they fill 80 columns."""
INTEGRATOR: Final = {
    "name": "vkyc-prod",
    "source_system": "vkyc",
    "owner": "Video KYC",
    "contact": "vkyc@bank.example",
    "description": "The integrator of the example.",
    "scopes": ["ingest:write", "search:read"],
}
REPORTER: Final = {
    "name": "ingest",
    "source_system": "ingest",
    "owner": "Document platform",
    "contact": "ingest@bank.example",
    "description": "The example service: it reports the calls that it takes.",
    "scopes": ["audit:report"],
}
DEPARTMENT: Final = "retail"
METADATA: Final = {
    "source_tag": "vkyc",
    "external_id": "session-123",
    "document_category": "kyc_vkyc",
    "department": DEPARTMENT,
}
# The smallest that calls itself a PDF: one empty page.
DOCUMENT: Final = (
    b"%PDF-1.4\n"
    b"1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
    b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 200]>>endobj\n"
    b"trailer<</Root 1 0 R>>\n%%EOF\n"
)
_PR_SET_PDEATHSIG: Final = 1

Credential = tuple[str, str]
"""client_id and client_secret."""


class Failed(Exception):
    """It cannot go on; the text says why and what to do."""


class Places:
    """Where everything is: addresses, files, and the environment of what is started."""

    def __init__(self, port: int, ingest_port: int) -> None:
        self.port = port
        self.ingest_port = ingest_port
        self.issuer = f"http://{HOST}:{port}"
        self.api = f"{self.issuer}/api/v1"
        self.ingest = f"http://{HOST}:{ingest_port}"
        # Operator, audiences and tokens carry these addresses: others begin anew.
        own = (port, ingest_port) == DEFAULT_PORTS
        self.var = Path("var") if own else Path("var") / f"{port}-{ingest_port}"
        self.operator = self.var / "operator.json"
        self.integrator = self.var / f"{INTEGRATOR['name']}.json"
        self.reporter = self.var / f"{REPORTER['name']}.json"
        self.document = self.var / "document.pdf"
        self.vkey = self.var / "vkey"
        self.authority_log = self.var / "authority.log"
        self.ingest_log = self.var / "ingest.log"
        kept = {
            name: value
            for name, value in os.environ.items()
            # What this shell says about another installation is not for this one.
            if not name.startswith(("PRIVYSEAL_", "INGEST_")) or name == "PRIVYSEAL_PG_BIN"
        }
        self.environ = kept | {
            "PRIVYSEAL_ISSUER": self.issuer,
            "PRIVYSEAL_AUDIENCE": self.ingest,
            "PRIVYSEAL_DATA_DIR": str(self.var),
            "INGEST_ISSUER": self.issuer,
            "INGEST_AUDIENCE": self.ingest,
            "INGEST_DATA_DIR": str(self.var / "ingest"),
        }


def main() -> None:
    """Start everything, show one exchange and one upload, and stay until told to stop."""
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--port", type=int, default=DEFAULT_PORTS[0])
    parser.add_argument("--ingest-port", type=int, default=DEFAULT_PORTS[1])
    given = parser.parse_args()
    os.chdir(REPOSITORY)
    # SIGINT too: whoever starts us in the background may have set it to be ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    places = Places(given.port, given.ingest_port)
    try:
        _run(places)
    except KeyboardInterrupt:
        click.echo("Stopped. The next `make run` goes on with the same operator and records.")
    except Failed as failure:
        click.echo(f"\n{click.style('Cannot go on.', fg='red', bold=True)} {failure}", err=True)
        sys.exit(1)


def _run(places: Places) -> None:
    _require_free(places)
    places.var.mkdir(mode=0o711, parents=True, exist_ok=True)
    places.document.write_bytes(DOCUMENT)
    click.secho("Privyseal, for trying on this machine", bold=True)
    click.echo()
    serve = (str(PRIVYSEAL), "serve", "--port", str(places.port))
    uvicorn = (sys.executable, "-m", "uvicorn", "--app-dir", "deploy/examples/ingest", "app:app")
    with _process(serve, places.environ, places.authority_log) as authority:
        _await_ready("authority", f"{places.issuer}/readyz", authority, places.authority_log)
        _keep_verifier_key(places)
        operator = _operator(places)
        integrator = _service_user(places, operator, INTEGRATOR, places.integrator)
        # It reports calls with tokens for the ingest service, and to the admin API.
        reporter = REPORTER | {"audiences": [places.api, places.ingest]}
        client_id, client_secret = _service_user(places, operator, reporter, places.reporter)
        reporting = {
            "INGEST_CLIENT_ID": client_id,
            "INGEST_CLIENT_SECRET": client_secret,
            "INGEST_SPOOL_DIR": str(places.var / "spool"),
        }
        ingest_command = (*uvicorn, "--port", str(places.ingest_port), "--no-access-log")
        with _process(ingest_command, places.environ | reporting, places.ingest_log) as ingest:
            _await_ready("ingest", f"{places.ingest}/healthz", ingest, places.ingest_log)
            try:
                access_token = _show_exchange(places, integrator)
                _show_upload(places, access_token)
                _show_records(places, operator, access_token)
            except Failed as refusal:
                # Whoever changed the integrator can change it back only while the authority runs.
                click.echo(f"\n{refusal}\nWas {INTEGRATOR['name']} changed? Change it back.")
            _show_what_to_paste(places, operator, integrator)
            _stay({"authority": authority, "ingest": ingest}, places)


def _require_free(places: Places) -> None:
    if places.port == places.ingest_port:
        raise Failed("PORT and INGEST_PORT must differ.")
    for port in (places.port, places.ingest_port):
        with socket.socket() as attempt:
            attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                attempt.bind((HOST, port))
            except (OSError, OverflowError) as error:
                raise Failed(
                    f"Port {port}: {getattr(error, 'strerror', error)}. Stop what uses it, or "
                    "choose two others:\n  make run PORT=18080 INGEST_PORT=18081"
                ) from None


@contextmanager
def _process(
    command: Sequence[str], environ: Mapping[str, str], log: Path
) -> Generator[subprocess.Popen[bytes], None, None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us: we stop one after the other
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _await_ready(name: str, url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() < started + START_DEADLINE:
        if process.poll() is not None:
            raise Failed(f"The {name} ended at once; {log} says:\n\n{_end_of(log)}")
        try:
            if httpx.get(url, timeout=1, trust_env=False).status_code == HTTPStatus.OK:
                took = time.monotonic() - started
                origin = url.rpartition("/")[0]
                _line(name, f"{origin}, ready in {took:.1f} s, log {log}")
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise Failed(
        f"The {name} was not ready in {START_DEADLINE:.0f} s; {log} says:\n\n{_end_of(log)}"
    )


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-12:])


def _keep_verifier_key(places: Places) -> None:
    """Write down what verifies the audit log's checkpoints, as it was at the start of this run."""
    command = (str(PRIVYSEAL), "migrate")
    done = subprocess.run(command, env=places.environ, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise Failed(f"`privyseal migrate` does not say the verifier key:\n{done.stderr.strip()}")
    places.vkey.write_text(done.stdout)
    _line("audit log", f"its verifier key is in {places.vkey}")


def _operator(places: Places) -> Credential:
    """Return the operator that var/ keeps, or make the first one."""
    kept = _read(places.operator)
    if kept is not None and _exchange(places, kept).is_success:
        _line("operator", f"kept in {places.operator}")
        return kept
    command = (str(PRIVYSEAL), "bootstrap", "--json")
    done = subprocess.run(command, env=places.environ, capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        raise Failed(
            f"{places.operator} holds no credential of an operator, and no other can be made:\n"
            f"{done.stderr.strip()}\nTo begin with nothing: rm -r {places.var}"
        )
    made: dict[str, str] = json.loads(done.stdout)
    _keep(places.operator, made)
    _line("operator", f"made by `privyseal bootstrap`, kept in {places.operator}")
    return made["client_id"], made["client_secret"]


def _service_user(
    places: Places, operator: Credential, wanted: Mapping[str, Any], path: Path
) -> Credential:
    """Return a working credential that `path` keeps, made through the API as any operator would."""
    name = wanted["name"]
    kept = _read(path)
    if kept is not None and _exchange(places, kept).is_success:
        _line("service user", f"{name}, kept in {path}")
        return kept
    with httpx.Client(
        base_url=places.api,
        headers={"Authorization": f"Bearer {_exchange(places, operator).json()['access_token']}"},
        timeout=CALL_DEADLINE,
        trust_env=False,
    ) as api:
        listed = _expect(HTTPStatus.OK, api.get("/service-users", params={"name": name}))
        found = listed["service_users"]
        if not found:
            found = [_expect(HTTPStatus.CREATED, api.post("/service-users", json=wanted))]
        service_user = f"/service-users/{found[0]['id']}"
        if found[0]["status"] == "disabled":
            _expect(HTTPStatus.OK, api.post(f"{service_user}/enable"))
            if kept is not None and _exchange(places, kept).is_success:
                _line("service user", f"{name}, enabled again, kept in {path}")
                return kept
        made = _expect(
            HTTPStatus.CREATED,
            api.post(f"{service_user}/credentials", json={"label": "make run"}),
        )
    _keep(path, {key: made[key] for key in ("client_id", "client_secret")})
    _line("service user", f"{name}, made through the API, kept in {path}")
    return made["client_id"], made["client_secret"]


def _exchange(places: Places, credential: Credential) -> httpx.Response:
    return httpx.post(
        f"{places.issuer}/oauth/token",
        data={"grant_type": "client_credentials"},
        auth=credential,
        timeout=CALL_DEADLINE,
        trust_env=False,
    )


def _show_exchange(places: Places, integrator: Credential) -> str:
    answer = _exchange(places, integrator)
    _title("One exchange", f"POST {places.issuer}/oauth/token", answer)
    body = _expect(HTTPStatus.OK, answer)
    access_token: str = body["access_token"]
    for name, value in (
        body | jwt.get_unverified_header(access_token) | _unverified_claims(access_token)
    ).items():
        _line(name, _show(value))
    return access_token


def _show_upload(places: Places, access_token: str) -> None:
    with places.document.open("rb") as document:
        answer = httpx.post(
            f"{places.ingest}/api/v1/ingest",
            headers={
                "Authorization": f"Bearer {access_token}",
                "X-Approver-Department": DEPARTMENT,
            },
            files={"file": ("document.pdf", document)},
            data={"metadata": json.dumps(METADATA)},
            timeout=CALL_DEADLINE,
            trust_env=False,
        )
    _title("One upload", f"POST {places.ingest}/api/v1/ingest", answer)
    for name, value in _expect(HTTPStatus.CREATED, answer).items():
        _line(name, _show(value))


def _show_records(places: Places, operator: Credential, access_token: str) -> None:
    """Show what is on record of the token: its issuance, and the upload that was reported."""
    bearer = _expect(HTTPStatus.OK, _exchange(places, operator))["access_token"]
    url = f"{places.api}/audit-records"
    deadline = time.monotonic() + CALL_DEADLINE
    while True:
        answer = httpx.get(
            url,
            params={"jti": _unverified_claims(access_token)["jti"]},
            headers={"Authorization": f"Bearer {bearer}"},
            timeout=CALL_DEADLINE,
            trust_env=False,
        )
        found = _expect(HTTPStatus.OK, answer)["records"]
        # The service reports once a second; a record shows once every transaction that began
        # before it has ended.
        if len(found) > 1 or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    _title("Its records", f"GET {url}?jti=…", answer)
    for record in found:
        for name in ("recorded_at", "action", "outcome", "client_address", "department"):
            _line(name, _show(record[name]))


def _show_what_to_paste(places: Places, operator: Credential, integrator: Credential) -> None:
    # Every line fits into 80 columns; white space within JSON means nothing.
    metadata = json.dumps(METADATA, separators=(",", ":")).replace(',"document', ',\n"document')
    _heading("Do it yourself: paste these two")
    click.echo(f"""
TOKEN=$(curl -sS {places.issuer}/oauth/token \\
  -d grant_type=client_credentials -u {integrator[0]}:\\
{integrator[1]} \\
  | python3 -c 'import json,sys; print(json.load(sys.stdin)["access_token"])')

curl -X POST '{places.ingest}/api/v1/ingest' \\
  -H "Authorization: Bearer $TOKEN" \\
  -H 'X-Approver-Department: {DEPARTMENT}' \\
  -F 'file=@{places.document}' \\
  -F 'metadata={metadata}'""")
    privyseal = shlex.quote(os.path.relpath(PRIVYSEAL))
    _heading("Be the operator")
    click.echo(f"""
export PRIVYSEAL_URL={places.issuer}
export PRIVYSEAL_ISSUER={places.issuer}
export PRIVYSEAL_DATA_DIR={places.var}
export PRIVYSEAL_CLIENT_ID={operator[0]}
export PRIVYSEAL_CLIENT_SECRET=\\
{operator[1]}
{privyseal} audit list --service-user {INTEGRATOR["name"]}""")
    _heading("And prove the log: keep a checkpoint, export, verify offline")
    click.echo(f"""
curl -sS {places.api}/audit/checkpoint > {places.var}/kept.txt
{privyseal} audit export --checkpoint {places.var}/kept.txt \\
  --output {places.var}/log.ndjson
{privyseal} audit verify --key {places.vkey} \\
  --checkpoint {places.var}/kept.txt {places.var}/log.ndjson
""")
    _line("console", f"{places.issuer}/console (sign in as this operator)")
    _line("API", f"{places.api} (described in openapi.yaml)")
    _line("stop", "Ctrl-C")


def _stay(processes: Mapping[str, subprocess.Popen[bytes]], places: Places) -> NoReturn:
    while True:
        for name, process in processes.items():
            if process.poll() is not None:
                raise Failed(f"The {name} has ended. Its log is in {places.var}.")
        time.sleep(0.5)


def _unverified_claims(access_token: str) -> dict[str, Any]:
    """For showing only: the ingest service is the one that verifies."""
    claims: dict[str, Any] = jwt.decode(access_token, options={"verify_signature": False})
    return claims


def _expect(status: HTTPStatus, answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code != status:
        raise Failed(
            f"{answer.request.method} {answer.request.url} answered {answer.status_code}:\n"
            f"{answer.text}"
        )
    body: dict[str, Any] = answer.json()
    return body


def _read(path: Path) -> Credential | None:
    try:
        found = json.loads(path.read_text("utf-8"))
        return found["client_id"], found["client_secret"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _keep(path: Path, credential: Mapping[str, str]) -> None:
    staging = path.with_suffix(".new")
    staging.unlink(missing_ok=True)
    with open(staging, "x", encoding="utf-8", opener=_private) as file:
        file.write(json.dumps(credential) + "\n")
    staging.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _heading(text: str) -> None:
    click.echo()
    click.secho(text, bold=True)


def _title(what: str, request: str, answer: httpx.Response) -> None:
    _heading(what)
    milliseconds = answer.elapsed.total_seconds() * 1000
    colour = "green" if answer.is_success else "red"
    status = click.style(f"{answer.status_code} {answer.reason_phrase}", fg=colour)
    click.echo(f"  {request} → {status} in {milliseconds:.0f} ms")


def _show(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def _line(name: str, text: str) -> None:
    click.echo(f"  {click.style(f'{name:<17}', dim=True)} {text}")


if __name__ == "__main__":
    main()
