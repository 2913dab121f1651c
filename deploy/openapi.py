"""Writes the description of the HTTP API, as the code has it, to standard output.

Starts nothing and connects to nothing.
"""

import asyncio
import sys
from typing import Any

import yaml

from keys.envelope import KeyEncryptionKeys, new_kek_line
from keys.secret import Secret
from service.app import Authority
from service.settings import Settings


def openapi_yaml() -> str:
    """Return the OpenAPI document of a default installation; the same code gives the same text."""
    schema = asyncio.run(_schema())
    for part in (schema["paths"], *schema["components"].values()):
        _sort(part)
    text: str = yaml.safe_dump(schema, sort_keys=False, allow_unicode=True, width=100)
    return text


async def _schema() -> dict[str, Any]:
    authority = Authority(
        Settings(),
        dsn=Secret("postgresql://nobody@127.0.0.1/nowhere"),
        read_keks=lambda: KeyEncryptionKeys.parse(new_kek_line()),
    )
    return authority.litestar.openapi_schema.to_schema()


def _sort(part: dict[str, Any]) -> None:
    # Litestar's order is that of its registration, which need not last.
    for name in sorted(part):
        part[name] = part.pop(name)


if __name__ == "__main__":
    sys.stdout.write(openapi_yaml())
