"""The wheel `privyseal-verifier`, built from this repository and used where nothing else is.

It must not reach a package index.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# What its metadata asks for, and what these need in turn.
REQUIRED = ("PyJWT", "cryptography", "cffi", "pycparser")

PROGRAM = """
import importlib.util, pathlib, sys, tempfile, threading, time, uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
import privyseal_verifier
from privyseal_verifier import InvalidToken, Reporter, Verifier, encode_jwks, thumbprint

assert privyseal_verifier.__file__.startswith(sys.prefix), privyseal_verifier.__file__
for foreign in ("keys", "service", "litestar", "msgspec", "httpx"):
    assert importlib.util.find_spec(foreign) is None, foreign

key = generate_private_key(65537, 2048)

class Keys(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(encode_jwks([key.public_key()]))

    def log_message(self, *args):
        pass

server = HTTPServer(("127.0.0.1", 0), Keys)
threading.Thread(target=server.serve_forever, daemon=True).start()
issuer = f"http://127.0.0.1:{server.server_port}"
now = int(time.time())
token = jwt.encode(
    {"iss": issuer, "sub": "su_a", "client_id": "su_a", "aud": "ingest", "exp": now + 900,
     "iat": now, "jti": str(uuid.uuid4()), "scope": "ingest:write", "service_user": "vkyc-prod",
     "source_system": "vkyc"},
    key, "RS256", {"typ": "at+jwt", "kid": thumbprint(key.public_key())},
)
spool = tempfile.TemporaryDirectory()
reporter = Reporter(issuer, "cr_a", "pvs_secret", spool=pathlib.Path(spool.name))
verifier = Verifier(issuer, "ingest", f"{issuer}/jwks.json", reporter=reporter)
print(verifier.verify(token).service_user)
try:
    verifier.verify(token[:-4] + "AAAA")
except InvalidToken as error:
    print(error)
while not verifier.stats()[issuer]["report_retries"]:  # nobody there takes reports
    time.sleep(0.01)
reporter.close()
spool.cleanup()
"""


def _run(*command: str | Path) -> str:
    alone = {"PATH": os.environ["PATH"], "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=alone,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _copy(installed: Distribution, site_packages: Path) -> None:
    for file in installed.files or ():
        if ".." not in file.parts:
            target = site_packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    _run(*pip, "--wheel-dir", folder, REPOSITORY / "deploy" / "verifier")
    (built,) = folder.iterdir()
    return built


def test_the_wheel_verifies_a_token_in_an_environment_with_only_what_it_requires(
    wheel: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    _run(sys.executable, "-m", "venv", "--without-pip", empty)
    python = empty / "bin" / "python"
    site_packages = Path(
        _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')")
    )
    for name in REQUIRED:
        _copy(distribution(name), site_packages)
    pip = (sys.executable, "-m", "pip", "--python", python)
    # Without --no-deps: that its requirements are these and no others is part of the test.
    _run(*pip, "install", "--quiet", wheel)
    said = _run(python, "-I", "-c", PROGRAM).splitlines()
    assert said[0] == "vkyc-prod"
    assert said[1].startswith("signature: expected one by key ")


def test_the_wheel_holds_every_module_and_says_that_it_is_typed(
    wheel: Path, tmp_path: Path
) -> None:
    shutil.unpack_archive(wheel, tmp_path, "zip")
    package = tmp_path / "privyseal_verifier"
    source = REPOSITORY / "keys" / "verifier"
    for module in [*source.glob("*.py"), source / "py.typed"]:
        assert (package / module.name).read_bytes() == module.read_bytes()
    assert (package / "LICENSE").exists()
    assert not list(package.rglob("*.pyc"))
