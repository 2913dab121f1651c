"""A SoftHSM token of its own for a test: made in a new folder, gone afterwards.

Loads no PKCS #11 module unless asked to.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pkcs11

LABEL = "privyseal test"
PIN = "482913"

_MODULES = (
    "lib*/softhsm/libsofthsm2.so",
    "lib*/*/softhsm/libsofthsm2.so",
    "lib*/libsofthsm2.so",
    "lib*/*/libsofthsm2.so",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token: the URI that names it, and what a process needs in its environment to see it."""

    uri: str
    environ: Mapping[str, str]
    module_path: Path
    pin_file: Path
    token_dir: Path


def missing() -> str | None:
    """Return what this machine lacks for a token, in words; None if nothing."""
    return None if _util() and _module_path() else "SoftHSM 2 is not installed (Debian: softhsm2)"


@contextmanager
def token(*, mechanisms: str = "ALL") -> Generator[Token, None, None]:
    """Make a token. `mechanisms` is as in softhsm2.conf: `ALL`, or those that it has."""
    util, module_path = _util(), _module_path()
    assert util is not None
    assert module_path is not None
    with tempfile.TemporaryDirectory(prefix="privyseal-hsm-") as folder:
        token_dir = Path(folder) / "tokens"
        token_dir.mkdir()
        config = Path(folder) / "softhsm2.conf"
        config.write_text(
            f"directories.tokendir = {token_dir}\n"
            "objectstore.backend = file\n"
            "log.level = ERROR\n"
            f"slots.mechanisms = {mechanisms}\n"
        )
        environ = {"SOFTHSM2_CONF": str(config)}
        _initialize(util, module_path, environ)
        pin_file = Path(folder) / "pin"
        pin_file.write_text(PIN + "\n")
        pin_file.chmod(0o600)
        yield Token(
            uri=f"pkcs11:token={quote(LABEL)}"
            f"?module-path={quote(str(module_path))}&pin-source={quote(str(pin_file))}",
            environ=environ,
            module_path=module_path,
            pin_file=pin_file,
            token_dir=token_dir,
        )


@contextmanager
def visible_here(token: Token) -> Generator[None, None, None]:
    """Let this very process see the token, and no other; child processes inherit it.

    SoftHSM reads its configuration when it is initialized: so it is finalized before and after.
    """
    before = {name: os.environ.get(name) for name in token.environ}
    pkcs11.lib(str(token.module_path)).finalize()
    os.environ.update(token.environ)
    try:
        yield
    finally:
        pkcs11.lib(str(token.module_path)).finalize()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def add_token_of_the_same_label(token: Token) -> None:
    """Make a second token where the first one is."""
    util = _util()
    assert util is not None
    _initialize(util, token.module_path, token.environ)


def _initialize(util: str, module_path: Path, environ: Mapping[str, str]) -> None:
    subprocess.run(
        (
            *(util, "--init-token", "--free", "--module", module_path),
            *("--label", LABEL, "--pin", PIN, "--so-pin", PIN[::-1]),
        ),
        env={**os.environ, **environ},
        check=True,
        capture_output=True,
        timeout=30,
    )


def _util() -> str | None:
    return shutil.which("softhsm2-util")


def _module_path() -> Path | None:
    if (util := _util()) is None:
        return None
    prefix = Path(util).resolve().parent.parent
    return next((path for pattern in _MODULES for path in sorted(prefix.glob(pattern))), None)
