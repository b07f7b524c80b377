"""Pages of other origins: off by default, and by origin where the settings name some."""

import pytest

from service.settings import SettingsError, load
from tests.service.conftest import Start

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
SHOP = {"origin": "https://shop.example"}
CANDIDATES = {"candidates": [{"id": "a1"}]}


async def test_without_origins_a_preflight_is_refused_and_no_answer_is_for_pages(start: Start) -> None:
    async with start() as service:
        preflight = await service.client.options("/predict", headers=SHOP | PREFLIGHT)
        answer = await service.client.post("/predict", json=CANDIDATES, headers=SHOP)

    assert (preflight.status_code, answer.status_code) == (405, 200)
    assert not any(name.startswith("access-control") for name in (*preflight.headers, *answer.headers))


@pytest.mark.parametrize("path", ["/predict", "/events"])
async def test_a_page_of_a_named_origin_may_predict_and_send_events_and_read_why_not(start: Start, path: str) -> None:
    async with start(cors_origins=["https://shop.example"]) as service:
        preflight = await service.client.options(path, headers=SHOP | PREFLIGHT)
        refusal = await service.client.post(path, content=b"{", headers=SHOP)

    assert preflight.status_code == 200
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert refusal.status_code == 400
    for answer in (preflight, refusal):
        assert answer.headers["access-control-allow-origin"] == "https://shop.example"


async def test_a_page_of_another_origin_may_not_nor_may_any_page_change_the_service(start: Start) -> None:
    async with start(cors_origins=["https://shop.example"]) as service:
        other = await service.client.options("/predict", headers={"origin": "https://evil.example"} | PREFLIGHT)
        change = await service.client.options(
            "/experiments/x", headers=SHOP | PREFLIGHT | {"access-control-request-method": "PUT"}
        )

    assert (other.status_code, change.status_code) == (400, 400)
    assert "access-control-allow-origin" not in other.headers
    assert "PUT" not in change.headers["access-control-allow-methods"]


def test_origins_come_as_a_list_or_with_commas_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKSERVE_CORS_ORIGINS", "https://shop.example, http://localhost:3000")

    assert load().cors_origins == ("https://shop.example", "http://localhost:3000")
    assert load(cors_origins=["*"]).cors_origins == ("*",)


@pytest.mark.parametrize("origin", ["shop.example", "https://shop.example/", "https://*.example", ""])
def test_what_is_no_origin_is_refused_by_the_settings_name(origin: str) -> None:
    with pytest.raises(SettingsError, match="setting cors_origins"):
        load(cors_origins=[origin])
