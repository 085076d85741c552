"""A thin client of Afterhours: `Client` blocks, `aio.Client` is for asyncio, and `errors` has what they raise.

Both share their ways: a deadline for every call, a `request_id` for every mutation, so that a retry applies nothing
twice, retries where a server was not to be had (UNAVAILABLE), and calls spread over all addresses of the target.
"""

from afterhours_client import aio, errors
from afterhours_client.blocking import Client, Watch

__all__ = ["Client", "Watch", "aio", "errors"]
