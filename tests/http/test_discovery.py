import httpx
import pytest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("n", range(10))
async def test_x(operator: httpx.AsyncClient, n: int, vkyc: tuple[str, str], records) -> None:
    r = await operator.get("/api/v1/service-users/me")
    print(r.status_code, r.text)
    print(await records(action="service_user.create"))
