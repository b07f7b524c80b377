"""What an error says of the store."""

import pytest

from service.store.circuit_breaker import CircuitBreaker
from service.store.faults import Fault, fault_of, is_answer
from service.store.feature_store import StoreUnavailable
from service.store.redis_connection import ReplyError


@pytest.mark.parametrize(
    ("error", "fault", "answer"),
    [
        (ReplyError("READONLY You can't write against a read only replica."), Fault.READONLY, True),
        (ReplyError("MISCONF Valkey is configured to save RDB snapshots"), Fault.MISCONF, True),
        (ReplyError("OOM command not allowed when used memory > 'maxmemory'."), Fault.OOM, True),
        (ReplyError("NOPERM User reader has no permissions to run the 'mget' command"), Fault.NOPERM, False),
        (ReplyError("ERR ACL failure in script: User reader has no permissions"), Fault.NOPERM, False),
        (ReplyError("ERR The user executing the script can't run this command or subcommand"), Fault.NOPERM, False),
        (ReplyError("NOAUTH Authentication required."), Fault.NOAUTH, False),
        (ReplyError("WRONGPASS invalid username-password pair"), Fault.NOAUTH, False),
        (ReplyError("LOADING Valkey is loading the dataset in memory"), Fault.LOADING, False),
        (ReplyError("MASTERDOWN Link with MASTER is down"), Fault.MASTERDOWN, False),
        (ReplyError("BUSY Valkey is busy running a script"), Fault.BUSY, False),
        (ReplyError("CLUSTERDOWN The cluster is down"), Fault.CLUSTERDOWN, False),
        (ReplyError("MOVED 1 127.0.0.1:6379"), Fault.OTHER, True),
        (ReplyError("WRONGTYPE Operation against a key"), Fault.OTHER, True),
        (ReplyError(""), Fault.OTHER, True),
        (TimeoutError("late"), Fault.TIMEOUT, False),
        (ConnectionRefusedError("refused"), Fault.CONNECTION, False),
        (OSError("no route"), Fault.CONNECTION, False),
        (RuntimeError("unforeseen"), Fault.OTHER, False),
    ],
)
async def test_an_error_has_a_cause_and_a_breaker_closes_on_every_reply_that_does_not_refuse_all_reads(
    error: Exception, fault: Fault, answer: bool
):
    chain = StoreUnavailable("no answer from the store")
    chain.__cause__ = ConnectionError("no connection")
    chain.__cause__.__cause__ = error
    breaker = CircuitBreaker(lambda: _raise(chain), threshold=1, every_s=0)

    assert fault_of(error) is fault_of(chain) is fault
    assert is_answer(error) is is_answer(chain) is answer
    breaker.failed()
    probing = breaker._probing
    assert probing is not None
    if answer:
        await probing
        assert not breaker.is_open
        assert breaker.last_failure is None
    else:
        while breaker.last_failure is None:
            await probing.get_loop().run_in_executor(None, lambda: None)
        assert breaker.last_failure.fault is fault
        assert breaker.is_open
    await breaker.aclose()


async def _raise(error: Exception) -> None:
    raise error
