"""Which URLs name a store, and that none is ever repeated."""

import traceback

import pytest

from service.settings import SettingsError
from service.store.redis_url import Address, RedisUrl, ServerKind


@pytest.mark.parametrize(
    ("text", "kind", "servers", "urls"),
    [
        ("redis://h", "standalone", [("h", 6379)], ["redis://h:6379/"]),
        ("redis://h:1/3", "standalone", [("h", 1)], ["redis://h:1/3"]),
        ("rediss://u:p%40s@h:1/", "standalone", [("h", 1)], ["rediss://u:p%40s@h:1/"]),
        ("redis://:p@s@h", "standalone", [("h", 6379)], ["redis://:p@s@h:6379/"]),  # as redis-py reads it too
        ("redis://[::1]:7", "standalone", [("::1", 7)], ["redis://[::1]:7/"]),
        ("redis://h?socket_timeout=2", "standalone", [("h", 6379)], ["redis://h:6379/?socket_timeout=2"]),
        (
            "redis+cluster://:p@a:1,b",
            "cluster",
            [("a", 1), ("b", 6379)],
            ["redis://:p@a:1/", "redis://:p@b:6379/"],
        ),
        ("rediss+cluster://a:1/0", "cluster", [("a", 1)], ["rediss://a:1/0"]),
        ("redis+sentinel://a,b:2/main/1", "sentinel", [("a", 26379), ("b", 2)], ["redis://a:26379/1", "redis://b:2/1"]),
    ],
)
def test_a_url_names_the_kind_of_server_and_where_its_servers_are(
    text: str, kind: str, servers: list[tuple[str, int]], urls: list[str]
):
    url = RedisUrl.parse(text)

    assert (url.kind, list(url.servers)) == (ServerKind(kind), servers)
    assert [url.of(server) for server in url.servers] == urls


def test_sentinels_have_a_password_of_their_own_and_the_primary_a_name():
    url = RedisUrl.parse(
        "redis+sentinel://user:pw@a:1/my%20name?sentinel_password=p%40ss&sentinel_username=u&socket_timeout=2"
    )

    assert url.service == "my name"
    assert url.of(Address("b", 3)) == "redis://user:pw@b:3/?socket_timeout=2"
    assert url.of_sentinel(url.servers[0]) == "redis://u:p%40ss@a:1/?socket_timeout=2"


@pytest.mark.parametrize(
    "text",
    [
        "s3cret",
        "http://:s3cret@h",
        "redis://:s3/cret@h:6379",
        "redis://:12/s3cret@h",
        "redis://:s3cret?@h",
        "redis://:s3cret#@h",
        "redis://s3cret?x@h",
        "redis://h?s3cret=1",
        "redis://h?socket_timeout=s3cret",
        "redis://:s3cret@a,b",
        "redis://:s3cret@h:99999999",
        "redis://:s3cret@h:70000",
        "redis://:s3cret@/0",
        "redis+sentinel://:s3cret@a:1",
        "redis+sentinel://:s3cret@a:1/name/0/0",
        "redis+cluster://:s3cret@a:1/x",
        "redis+cluster://:s3cret@a:1/1",
        "redis+cluster://:s3cret@a:1,/",
        "unix://:s3cret@",
        "unix+cluster:///s3cret",
    ],
)
def test_what_is_no_url_of_a_store_is_refused_in_one_sentence_that_repeats_none_of_it(text: str):
    with pytest.raises(SettingsError, match=r"^setting redis_url: [^\n]*$") as refused:
        RedisUrl.parse(text)

    shown = "".join(traceback.format_exception(refused.value))
    assert "s3" not in shown and "cret" not in shown


@pytest.mark.parametrize(
    "text", ["redis://u:s3cret@h", "unix://u:s3cret@/h", "redis+sentinel://h/n?sentinel_password=s3cret"]
)
def test_a_url_that_is_printed_shows_no_password(text: str):
    assert "s3cret" not in repr(RedisUrl.parse(text))
