"""Pictures from http(s) URLs, without reaching into networks that the caller could not reach alone.

A host's addresses are checked after it has been resolved, and the connection goes to the address that was checked, so
that a name that resolves differently the second time gains nothing. Every redirect takes the same way. Proxies of the
environment are not used, since they would resolve the name themselves.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from phi35.serving.errors import ApiError, invalid

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RefusedAddressError(Exception):
    """A host that stands for an address that is not public."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and so is what it stands for (mapped, 6to4, Teredo, NAT64)."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        inner = [one for one in (address.sixtofour, *(address.teredo or ())) if one is not None]
        if address.is_site_local or not all(map(is_public, inner)):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses alone.

    Args:
        networks: others that are allowed.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.AsyncNetworkStream:
        """A connection to the first of the host's addresses that answers, if all of them are allowed."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name cannot be resolved: {error}") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not self._allowed(ipaddress.ip_address(address.partition("%")[0])):
                raise RefusedAddressError
        problem: Exception = httpcore.ConnectError("the name has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                problem = error
        raise problem

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Any = None) -> Any:
        """Refused."""
        raise RefusedAddressError

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)

    def _allowed(self, address: Address) -> bool:
        return is_public(address) or any(address in network for network in self._networks)


class PictureFetcher:
    """Fetches pictures.

    Args:
        max_bytes: largest file.
        timeout: seconds for all of it.
        networks: that are allowed although they are not public.
    """

    def __init__(self, max_bytes: int, timeout: float, networks: Iterable[str] = ()) -> None:
        self.max_bytes, self.timeout = max_bytes, timeout
        self._network = GuardedNetwork(networks)

    async def fetch(self, url: str) -> bytes:
        """The bytes that a URL leads to.

        Raises:
            ApiError: 400, for a URL that may not or cannot be fetched, and for too large a file. What it says of
                refused addresses does not tell what is behind them.
        """
        try:
            async with asyncio.timeout(self.timeout):
                async with httpcore.AsyncConnectionPool(network_backend=self._network) as pool:
                    for _ in range(MAX_REDIRECTS + 1):
                        content, url = await self._get(pool, url)
                        if content is not None:
                            return content
        except TimeoutError:
            raise _refused(f"was not there within {self.timeout:g} seconds") from None
        except RefusedAddressError:
            raise _refused("leads to an address that is not public", "image_url_not_allowed") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise _refused(f"cannot be fetched: {type(error).__name__}") from error
        raise _refused(f"redirects more than {MAX_REDIRECTS} times")

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str) -> tuple[bytes | None, str]:
        """The content of a URL, or None and the URL that it redirects to."""
        _check(url)
        headers = [("Host", urlsplit(url).netloc), ("User-Agent", "phi35"), ("Accept", "image/*")]
        headers.append(("Accept-Encoding", "identity"))  # a compressed file could grow without limit
        async with pool.stream("GET", url, headers=headers) as response:
            found = {name.lower().decode("latin-1"): value.decode("latin-1") for name, value in response.headers}
            if response.status in REDIRECTS and found.get("location"):
                return None, urljoin(url, found["location"])
            if response.status != 200:
                raise _refused(f"gives the status {response.status}")
            length = found.get("content-length", "0")
            if length.isdigit() and int(length) > self.max_bytes:
                raise self._too_large()
            parts, size = [], 0
            async for part in response.aiter_stream():
                parts.append(part)
                size += len(part)
                if size > self.max_bytes:
                    raise self._too_large()
            return b"".join(parts), url

    def _too_large(self) -> ApiError:
        return _refused(f"is larger than {self.max_bytes} bytes", "image_too_large")


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or not url.isascii() or any(character.isspace() for character in url):
        raise _refused("is no http or https URL")
    if parts.username is not None or parts.password is not None:
        raise _refused("holds a name or password")


def _refused(why: str, code: str = "invalid_image_url") -> ApiError:
    return invalid(f"the picture's URL {why}", "messages", code)
