"""Answers calls of the official toolset: one JSON object a line in, one a line out.

In: {"name": …, "input": {…}}. Out: {"is_error": …, "content": […]}, the two fields of the event that the worker posts. The
working directory is the first argument.
"""

import asyncio
import json
import logging
import sys

from anthropic.lib.tools import _beta_session_runner as runner
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401


class Event:
    type = "agent.tool_use"
    id = "sevt_1"


async def main() -> None:
    context = AgentToolContext(workdir=sys.argv[1])
    tools = {tool.name: tool for tool in beta_agent_toolset_20260401(context)}
    session = runner.SessionToolRunner.__new__(runner.SessionToolRunner)
    for line in sys.stdin:
        call = json.loads(line)
        event = Event()
        event.name = call["name"]
        result, _ = await session._call_tool(tools[call["name"]], event, call["input"])
        print(json.dumps({"is_error": result["is_error"], "content": list(result["content"])}), flush=True)
    await context.close()


logging.disable(logging.CRITICAL)
asyncio.run(main())
