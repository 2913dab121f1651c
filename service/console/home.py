"""`/console`: what needs a person now, and nothing that does not."""

from typing import Any

from litestar import Controller, Response, get
from litestar.di import NamedDependency

from service.authority.attention import NAMED, Watch
from service.authority.model import Clock
from service.authority.own_credentials import OwnCredentials
from service.console.gate import session_of
from service.console.own import own_home
from service.console.page import AnyRequest, page
from service.console.samples import Installation


class HomeController(Controller):
    """The first page."""

    @get("/")
    async def home(
        self,
        request: AnyRequest,
        watch: NamedDependency[Watch],
        own_credentials: NamedDependency[OwnCredentials],
        installation: NamedDependency[Installation],
        clock: NamedDependency[Clock],
    ) -> Response[Any]:
        """Show what needs a person; to an integrator, itself."""
        session = session_of(request)
        if not session.is_operator:
            return await own_home(request, session, own_credentials, installation, clock())
        attention = await watch.look(session.operator)
        return page(request, "home.html", attention=attention, named=NAMED)
