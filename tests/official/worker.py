"""Runs the worker of the official SDK against a control plane of the tests, until it is killed.

Everything it needs to know is in the environment; what it logs goes to standard error.
"""

import asyncio
import logging
import os
import signal

from anthropic import AsyncAnthropic
from anthropic.lib.environments import EnvironmentWorker


async def main() -> None:
    client = AsyncAnthropic(base_url=os.environ["MOCK_URL"], api_key="sk-ant-api03-never-sent")
    worker = EnvironmentWorker(
        client,
        environment_id=os.environ["MOCK_ENVIRONMENT_ID"],
        environment_key=os.environ["MOCK_ENVIRONMENT_KEY"],
        worker_id=os.environ["MOCK_WORKER_ID"],
        workdir=os.environ["MOCK_WORKDIR"],
        max_idle=float(os.environ["MOCK_MAX_IDLE"]),
        memory_sync_interval=5.0,
    )
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    try:
        await worker.run()
    except asyncio.CancelledError:
        logging.getLogger("worker").info("cancelled")


logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(levelname)s %(message)s")
asyncio.run(main())
