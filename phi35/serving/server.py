"""Running the application under uvicorn, with an orderly end."""

import logging
import socket

import uvicorn
from fastapi import FastAPI

from phi35.serving.calls import Service

logger = logging.getLogger(__name__)

FORCED_AFTER = 5.0
"""Seconds that calls may take to notice that they have been ended."""
KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients keep it (OpenAI's 5, proxies' 60), so that none writes a
call into a connection that is just being closed."""


class GracefulServer(uvicorn.Server):
    """Stops in steps: no new calls, running ones go on for a while, then they are told and ended.

    Args:
        app: of ``phi35.serving.app.create_app``.
        service: of the app.
        host: address to listen at.
        port: 0 for any free one.
        log_level: of uvicorn.
    """

    def __init__(self, app: FastAPI, service: Service, host: str, port: int, log_level: str = "info") -> None:
        settings = service.settings
        # Beyond answers that are made or wait: pages, metrics, and calls that are still read or are refused.
        connections = 2 * (settings.max_rows + settings.max_waiting) + 64
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level=log_level,
                limit_concurrency=connections,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=int(settings.drain_seconds + FORCED_AFTER),
                server_header=False,
            )
        )
        self.service = service

    @property
    def bound_port(self) -> int:
        """The port that is listened at, once started."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running calls end, then everything else."""
        engine = self.service.engine
        if engine.num_admitted:
            logger.info("%d answers may go on for %g seconds", engine.num_admitted, self.service.settings.drain_seconds)
        engine.drain(self.service.settings.drain_seconds)
        await super().shutdown(sockets)
