"""`/console`: what needs a person now, and nothing that does not."""

from typing import Any

from litestar import Controller, Response, get

from service.console.page import AnyRequest, page


class HomeController(Controller):
    """The first page."""

    @get("/")
    async def home(self, request: AnyRequest) -> Response[Any]:
        """Show what needs a person."""
        return page(request, "home.html")
