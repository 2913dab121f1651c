"""What an integrator pastes: the exchange and an upload, for a shell, for Python and for Node.

Pure: every value is quoted for the language that it stands in, and only the command for a shell
holds a token.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from keys.secret import Secret
from service.authority.model import ServiceUser

DEPARTMENT_HEADER: Final = "X-Approver-Department"

# What the ingest service takes for each member of the metadata.
IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
IDENTIFIER_IN_WORDS: Final = (
    "Expected 1 to 128 letters, digits or . _ : - and a letter or digit first."
)
MAX_FILE_NAME: Final = 200


class Installation(Struct, frozen=True, kw_only=True):
    """The addresses that integrators need; without `ingest_url` there is nothing to upload to."""

    token_url: str
    ingest_url: str | None
    ingest_audience: str


class Upload(Struct, frozen=True, kw_only=True):
    """What a call of the ingest service says of a document."""

    source_system: str
    department: str
    category: str
    external_id: str
    file_name: str

    @classmethod
    def suggested(cls, user: ServiceUser) -> "Upload":
        """Return something to begin with."""
        return cls(
            source_system=user.source_system,
            department="retail",
            category=f"kyc_{user.source_system}",
            external_id="session-123",
            file_name="document.pdf",
        )

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong with which field, in a sentence each."""
        found = {
            name: IDENTIFIER_IN_WORDS
            for name in ("department", "category", "external_id")
            if not IDENTIFIER.fullmatch(getattr(self, name))
        }
        if not 0 < len(self.file_name) <= MAX_FILE_NAME or "\n" in self.file_name:
            found["file_name"] = f"Expected the name of a file, at most {MAX_FILE_NAME} characters."
        return found

    def corrected(self, user: ServiceUser) -> "Upload":
        """Return the same with what is suggested instead of what is wrong: fit to be copied."""
        suggested = Upload.suggested(user)
        return replace(self, **{name: getattr(suggested, name) for name in self.problems})

    @property
    def metadata(self) -> str:
        """The metadata as the ingest service reads them."""
        return json.dumps(self.members, separators=(",", ":"))

    @property
    def path(self) -> str:
        """The file, never to be taken for an option or for standard input."""
        return self.file_name if self.file_name.startswith("/") else f"./{self.file_name}"

    @property
    def members(self) -> dict[str, str]:
        """The metadata, in the order of the documentation."""
        return {
            "source_tag": self.source_system,
            "external_id": self.external_id,
            "document_category": self.category,
            "department": self.department,
        }


def exchange_command(at: Installation, user: ServiceUser) -> str:
    """Return the exchange for a shell; the secret comes from the environment."""
    return _command(
        f"curl -sS {_quoted(at.token_url)}",
        f'-u "{user.id}:$PRIVYSEAL_CLIENT_SECRET"',
        "-d grant_type=client_credentials",
        f"--data-urlencode {_quoted(f'resource={at.ingest_audience}')}",
    )


def upload_command(url: str, upload: Upload, token: Secret) -> str:
    """Return one upload for a shell, with a token that ends soon."""
    return _command(
        f"curl -sS -X POST {_quoted(url)}",
        f"-H {_quoted(f'Authorization: Bearer {token.reveal()}')}",
        f"-H {_quoted(f'{DEPARTMENT_HEADER}: {upload.department}')}",
        f"-F {_quoted(f'file=@{_form_path(upload.path)}')}",
        f"-F {_quoted(f'metadata={upload.metadata}')}",
    )


def python_sample(at: Installation, url: str, upload: Upload) -> str:
    """Return a program that exchanges its credential and renews its token by itself, in time or
    when its signing key was revoked; and waits where it is asked to."""
    declared = (f"{name} = {value}" for name, value in _constants(at, url, upload, indent=4))
    return _PYTHON.replace("CONSTANTS", "\n".join(declared), 1)


def node_sample(at: Installation, url: str, upload: Upload) -> str:
    """Return the same for Node."""
    declared = (f"const {name} = {value};" for name, value in _constants(at, url, upload, indent=2))
    return _NODE.replace("CONSTANTS", "\n".join(declared), 1)


def _constants(
    at: Installation, url: str, upload: Upload, *, indent: int
) -> Iterator[tuple[str, str]]:
    """Yield names and values; JSON means the same in Python and in JavaScript where it holds
    nothing but strings."""
    constants: dict[str, str | dict[str, str]] = {
        "TOKEN_URL": at.token_url,
        "RESOURCE": at.ingest_audience,
        "INGEST_URL": url,
        "DEPARTMENT": upload.department,
        "METADATA": upload.members,
        "FILE": upload.path,
    }
    for name, value in constants.items():
        yield name, json.dumps(value, indent=indent, ensure_ascii=False)


def _command(*parts: str) -> str:
    return " \\\n  ".join(parts)


def _quoted(text: str) -> str:
    """Return `text` as one word of a shell, in quotes even where it needs none."""
    quoted = shlex.quote(text)
    return quoted if quoted != text else f"'{text}'"


def _form_path(path: str) -> str:
    # curl(1), --form: a comma or a semicolon ends a path that is not in double quotes.
    if not re.search(r'[,;"\\]', path):
        return path
    escaped = re.sub(r'(["\\])', r"\\\1", path)
    return f'"{escaped}"'


_PYTHON: Final = '''"""Upload a document, with a token that is renewed by itself."""

import json
import os
import time
from pathlib import Path

import requests

CONSTANTS


class Bearer(requests.auth.AuthBase):
    """Sends an access token; the credential gets the next one at two thirds of its lifetime."""

    def __init__(self):
        self.token, self.renew_at = "", 0.0

    def __call__(self, request):
        if time.monotonic() >= self.renew_at:
            self.renew()
        request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def renew(self):
        asked_at = time.monotonic()
        answer = checked(
            patiently(
                requests.post,
                TOKEN_URL,
                auth=(
                    os.environ["PRIVYSEAL_CLIENT_ID"],
                    os.environ["PRIVYSEAL_CLIENT_SECRET"],
                ),
                data={"grant_type": "client_credentials", "resource": RESOURCE},
                timeout=10,
            )
        )
        self.token = answer["access_token"]
        self.renew_at = asked_at + answer["expires_in"] * 2 / 3


def patiently(post, url, **given):
    """Return the answer of a service; one that asks to wait (503) is asked four times more."""
    answer = post(url, **given)
    for _ in range(4):
        if answer.status_code != 503:
            break
        asked = answer.headers.get("Retry-After", "")
        time.sleep(int(asked) if asked.isdigit() else 5)
        answer = post(url, **given)
    return answer


def checked(answer):
    """Return what was answered, or stop with the reason."""
    if not answer.ok:
        raise RuntimeError(f"{answer.url} answered {answer.status_code}: {answer.text}")
    return answer.json()


def upload(session, path):
    """Return the attribution that was recorded."""
    document = {
        "headers": {"X-Approver-Department": DEPARTMENT},
        "files": {"file": (Path(path).name, Path(path).read_bytes())},
        "data": {"metadata": json.dumps(METADATA)},
        "timeout": 60,
    }
    answer = patiently(session.post, INGEST_URL, **document)
    if answer.status_code == 401:
        # The signing key of the token was revoked: a new token has another one.
        session.auth.renew()
        answer = patiently(session.post, INGEST_URL, **document)
    return checked(answer)


session = requests.Session()
session.auth = Bearer()
print(json.dumps(upload(session, FILE)))
'''

_NODE: Final = r"""// Upload a document, with a token that is renewed by itself.
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";

CONSTANTS

const { PRIVYSEAL_CLIENT_ID, PRIVYSEAL_CLIENT_SECRET } = process.env;
let token = "";
let renewAt = 0;

// The access token; the credential gets the next one at two thirds of its lifetime.
async function accessToken() {
  if (Date.now() < renewAt) return token;
  const askedAt = Date.now();
  const credential = btoa(`${PRIVYSEAL_CLIENT_ID}:${PRIVYSEAL_CLIENT_SECRET}`);
  const answer = await checked(await patiently(() => fetch(TOKEN_URL, {
    method: "POST",
    headers: { Authorization: `Basic ${credential}` },
    body: new URLSearchParams({ grant_type: "client_credentials", resource: RESOURCE }),
    signal: AbortSignal.timeout(10_000),
  })));
  token = answer.access_token;
  renewAt = askedAt + answer.expires_in * 1000 * 2 / 3;
  return token;
}

// The answer of a service; one that asks to wait (503) is asked four times more.
async function patiently(post) {
  let answer = await post();
  for (let left = 4; left > 0 && answer.status === 503; left -= 1) {
    await sleep(1000 * (Number(answer.headers.get("Retry-After")) || 5));
    answer = await post();
  }
  return answer;
}

// What was answered, or an error with the reason.
async function checked(answer) {
  if (answer.ok) return answer.json();
  throw new Error(`${answer.url} answered ${answer.status}: ${await answer.text()}`);
}

// The attribution that was recorded.
async function upload(path) {
  const form = new FormData();
  form.append("file", new Blob([await readFile(path)]), basename(path));
  form.append("metadata", JSON.stringify(METADATA));
  const post = async () => fetch(INGEST_URL, {
    method: "POST",
    headers: {
      Authorization: `Bearer ${await accessToken()}`,
      "X-Approver-Department": DEPARTMENT,
    },
    body: form,
    signal: AbortSignal.timeout(60_000),
  });
  let answer = await patiently(post);
  if (answer.status === 401) {
    // The signing key of the token was revoked: a new token has another one.
    renewAt = 0;
    answer = await patiently(post);
  }
  return checked(answer);
}

console.log(JSON.stringify(await upload(FILE)));
"""
