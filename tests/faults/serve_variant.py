"""`privyseal serve`, but for the application factory: how the sabotaged variants are run.

Usage: python -m tests.faults.serve_variant FACTORY [OPTIONS OF SERVE]. No product code knows it.
"""

import sys
from typing import Any

import uvicorn

from service.cli.server import serve


def main() -> None:
    factory, *arguments = sys.argv[1:]
    run = uvicorn.run

    def run_variant(_: object, **options: Any) -> None:
        run(factory, **options)

    uvicorn.run = run_variant
    serve(arguments)


if __name__ == "__main__":  # a worker imports this file too
    main()
