"""A REDIS_URL that is not supported ends every command in one line, which repeats nothing of it."""

import asyncio
import re

import pytest
import replicas

from afterhours_grpc import settings

SECRET = "notshown"

BAD = [
    "",
    "localhost:6379",
    "http://localhost",
    "redis:localhost",
    f"redis://:{SECRET}@localhost:abc",
    f"redis://:{SECRET}@localhost:0",
    f"redis://:{SECRET}@localhost:65536",
    f"redis://:{SECRET}/and@localhost",
    f"redis://:and#{SECRET}@localhost",
    f"redis://:and?{SECRET}@localhost",
    f"redis://:and?{SECRET}=1@localhost",
    f"redis://:{SECRET} and@localhost",
    f"redis://:{SECRET}@localhost\r",
    f"redis://:{SECRET}@[::1",
    f"redis://:{SECRET}@local%00host",
    f"redis://:{SECRET}@{'a' * 64}.test",
    f"redis://:{SECRET}@one,two:6379",
    f"redis://:{SECRET}@one:6379,two:6379",
    f"redis://:{SECRET}@localhost/abc",
    f"redis://:{SECRET}@localhost/-1",
    f"redis://:{SECRET}@localhost/0/1",
    f"redis://:{SECRET}@localhost/2147483648",
    f"redis://:{SECRET}@localhost?db=abc",
    f"redis://:{SECRET}@localhost?db",
    f"redis://:{SECRET}@localhost?protocol=4",
    f"redis://:{SECRET}@localhost?socket_timeout=abc",
    f"redis://:{SECRET}@localhost?socket_timeout=nan",
    f"redis://:{SECRET}@localhost?socket_timeout=0",
    f"redis://:{SECRET}@localhost?decode_responses=no",
    f"redis://:{SECRET}@localhost?connection_class=int",
    f"redis://:{SECRET}@localhost?{SECRET}=1",
    f"redis://:{SECRET}@localhost?ssl_ca_certs=/ca.pem",
    f"rediss://:{SECRET}@localhost?ssl_ca_certs=/{SECRET}.pem",
    f"rediss://:{SECRET}@localhost?ssl_cert_reqs={SECRET}",
    f"rediss://:{SECRET}@localhost?ssl_min_version=5",
    f"rediss://:{SECRET}@localhost?ssl_include_verify_flags={SECRET}",
    "unix://",
    "unix://tmp/redis.sock",
    f"unix:///tmp/redis.sock?db={SECRET}",
    f"redis+sentinel://:{SECRET}@localhost:26379/primary/0",
    f"redis+cluster://:{SECRET}@localhost:6379",
]
GOOD = [
    "redis://",
    "redis://localhost:6379",
    "redis://ada:a%2Fb%23c@redis_1.test:6379/15?protocol=3&client_name=afterhours",
    "redis://[::1]:6379/0?socket_timeout=0.2&socket_connect_timeout=1&health_check_interval=10&max_connections=4",
    "rediss://:a@localhost:6379/?ssl_cert_reqs=none&ssl_check_hostname=false",
    "unix:///tmp/redis.sock?db=3&password=a",
]


@pytest.mark.parametrize("url", BAD)
def test_a_bad_url_is_refused(url: str) -> None:
    """The refusal names the variable, in one line, and repeats nothing of the URL."""
    with pytest.raises(settings.SettingsError) as refused:
        settings.load({"REDIS_URL": url})
    message = str(refused.value)
    assert re.match(r"REDIS_URL: (must|has) ", message)
    assert message.isprintable()
    assert SECRET not in message


@pytest.mark.parametrize("url", GOOD)
def test_a_good_url_is_read(url: str) -> None:
    """What redis-py reads is read, percent-encoding included."""
    assert settings.load({"REDIS_URL": url}).redis_url == url


async def test_commands_refuse_a_bad_url() -> None:
    """Each command that uses Redis ends with one line and exit status 1."""
    commands = [["serve"], ["dev"], ["doctor"], ["end", "ada"]]
    environment = {"REDIS_URL": f"redis://:{SECRET}@localhost:abc"}
    processes = [await replicas.Process(environment, *command).start() for command in commands]
    assert await asyncio.gather(*(each.wait() for each in processes)) == 4 * [1]
    for each in processes:
        [line] = each.lines
        assert line.startswith("afterhours-grpc: REDIS_URL: ")
        assert SECRET not in line
