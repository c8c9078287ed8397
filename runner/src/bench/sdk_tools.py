"""Runs the tools of the official SDK in this process and says how many microseconds each call took.

Started by the benchmark with `python -c`. Arguments: directory to work in, directory to search (may be empty), regular
expression to search for. One request a line on standard input, one answer a line: `ok MICROSECONDS` or `error REASON`.
The first answer comes without a request, when the SDK is there. A call whose result is not what it should be is an error,
so that no failure is taken for a fast call.
"""

import asyncio
import os
import sys
import time

LINE = "a line of an ordinary source file, neither short nor very long\n"
OLD, NEW = "the last line before", "the last line after!"
FLOOD_BYTES = 10_000_000


def text(length):
    body = length - len(OLD) - 1
    return (LINE * (body // len(LINE) + 1))[:body] + OLD + "\n"


def say(*words):
    print(*words, flush=True)


async def timed(tool, arguments, expected):
    start = time.perf_counter()
    result = await tool.call(arguments)
    took = (time.perf_counter() - start) * 1e6
    if expected not in str(result):
        raise RuntimeError(f"{tool.name} answered {str(result)[:100]!r}")
    return took


async def serve(work, tree, pattern):
    from anthropic import AsyncAnthropic  # noqa: F401  a worker has it, so its memory and time count
    from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401

    here = {tool.name: tool for tool in beta_agent_toolset_20260401(AgentToolContext(workdir=work))}
    searching = AgentToolContext(workdir=tree or work)
    there = {tool.name: tool for tool in beta_agent_toolset_20260401(searching)}
    paths = os.environ.get("PATH", "")
    texts = {size: text(size) for size in (1_000, 200_000)}
    bash = {"echo": ("echo hi", "hi"), "true": ("/bin/true", ""), "flood": (f"head -c {FLOOD_BYTES} /dev/zero", "")}

    async def answer(request):
        name, _, size = request.partition("-")
        if request in bash:
            command, expected = bash[request]
            return await timed(here["bash"], {"command": command}, expected)
        if name in ("read", "write", "edit"):
            # Absolute and resolved, as a model that was told its working directory writes it.
            arguments = {"file_path": os.path.join(os.path.realpath(work), "sdk.txt")}
            expected = ""
            if name == "write":
                arguments["content"] = texts[int(size)]
            elif name == "edit":
                arguments.update(old_string=OLD, new_string=NEW)
            else:
                expected = OLD
            return await timed(here[name], arguments, expected)
        if request == "glob":
            return await timed(there["glob"], {"pattern": "**/*.rs"}, ".rs")
        if request == "grep":
            return await timed(there["grep"], {"pattern": pattern}, "")
        if request == "walk":
            # Without ripgrep on the search path the tool walks by itself.
            os.environ["PATH"] = ""
            try:
                return await timed(there["grep"], {"pattern": pattern}, "")
            finally:
                os.environ["PATH"] = paths
        raise RuntimeError(f"unknown request {request!r}")

    say("ok 0")
    for line in sys.stdin:
        try:
            say(f"ok {await answer(line.strip()):.1f}")
        except Exception as error:
            say("error", type(error).__name__, str(error).replace("\n", " ")[:200])
    for tool in (*here.values(), *there.values()):
        if tool.close is not None:
            closing = tool.close()
            if closing is not None:
                await closing


try:
    asyncio.run(serve(*sys.argv[1:4]))
except ImportError as error:
    say("error", "the SDK cannot be imported:", error)
