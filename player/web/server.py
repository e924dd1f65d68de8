"""`python play.py --web`: serve the page over HTTP, with one session behind each WebSocket.

The page sends messages and the server answers each one, in order. The page's clock sets the pace.
It asks for a frame only while fewer than two are pending, so a slow link makes playing slower but
adds no lag.

    {"type": "start", "start": 3, "seed": 7}   start from clip 3 of the world          → frame
    H·W·3 bytes of RGB                         start from this picture                 → frame
    {"type": "step", "action": 2}              one step with a latent action           → frame
    {"type": "rewind", "to": 40}               go back to frame 40                     → frame
    {"type": "save"}                           → {"run": …}, which play.py --replay reads
    anything else                              → {"error": the reason}

A frame is its number (4 bytes, little-endian) and H·W·3 bytes of RGB. The socket's own lossless
compression makes it small.
"""

import asyncio
import ipaddress
import json
import struct
import sys
import traceback
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from utils.cli import UserError

import numpy as np
import torch

from player.session import Session
from player.web.site import TYPES, files, legend

try:
    from aiohttp import WSMsgType, web
except ImportError:
    raise UserError('--web needs aiohttp; get it with: pip install ".[web]"') from None

OPEN_QUESTIONS = 16  # unanswered messages of a page; ours has two frames and a few restarts
LONGEST = 100_000  # frames of a session; each takes about a kilobyte, kept for going back
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"
    ),
}


class Refused(ValueError):
    """A message that cannot be answered. The reason is shown to the visitor."""


# --- one message -----------------------------------------------------------------------------


def integer(message: dict, name: str, end: int) -> int:
    """message[name], an integer in [0, end)."""
    value = message.get(name)
    if type(value) is not int or not 0 <= value < end:
        raise Refused(f"{name} must be an integer from 0 to {end - 1}")
    return value


def answer(session: Session, message: bytes | str) -> Iterator[bytes | str | None]:
    """One message → its reply: bytes, or JSON as str.

    Before the reply it yields None after each piece of work, so that others can be served.
    """
    if isinstance(message, str):
        reply = yield from answer_json(session, message)
        if reply:
            yield reply
            return
    else:
        H, W = session.world.frame_size
        if len(message) != H * W * 3:
            raise Refused(f"a picture must have {H * W * 3} bytes, {H}×{W} pixels of RGB")
        session.start(np.frombuffer(message, dtype=np.uint8).reshape(1, H, W, 3))
    yield struct.pack("<I", len(session.actions)) + np.ascontiguousarray(session.frame).tobytes()


def answer_json(session: Session, message: str) -> Generator[None, None, str | None]:
    """Do what a JSON message asks. → the reply, or None if the reply is the frame."""
    try:
        message = json.loads(message)
        kind = message["type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Refused('a message must be JSON like {"type": "step", "action": 0}') from None
    if kind == "start":
        start = integer(message, "start", len(session.starts))
        session.seed = integer(message, "seed", 2**31)
        session.start(session.starts[start])
    elif kind == "step":
        if len(session.actions) >= LONGEST:
            raise Refused(
                f"this session has {LONGEST:,} frames, which is the limit; save it and restart"
            )
        session.press(integer(message, "action", session.world.n_actions))
    elif kind == "rewind":
        yield from session.rewinding(integer(message, "to", len(session.actions) + 1))
    elif kind == "save":
        return json.dumps({"run": session.to_json()})
    else:
        raise Refused("type must be start, step, rewind or save")


# --- all visitors ----------------------------------------------------------------------------


class Site:
    """The page for worlds, a list of (name, WorldModel, starts). limit: sessions at a time."""

    def __init__(self, worlds: list, host: str, limit: int):
        self.worlds, self.limit, self.games, self.sockets = worlds, limit, 0, set()
        # Only these can be requested; no path that a visitor sends is ever opened.
        self.files = files(worlds, "socket")
        # Each is made when it is requested for the first time.
        self.legends = {
            f"worlds/{i}/legend.png": (world, starts) for i, (_, world, starts) in enumerate(worlds)
        }
        # One thread, because torch uses all cores by itself. Whoever waits longest is next.
        self.thread = ThreadPoolExecutor(1)
        self.hosts = {"localhost", "127.0.0.1", "::1", host.lower()}
        if is_address(host, "is_unspecified"):
            self.hosts = None

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.check_host])
        app.router.add_get("/socket/{number}", self.socket)
        app.router.add_get("/{path:.*}", self.file)
        app.on_shutdown.append(self.close)
        return app

    async def close(self, app):
        for socket in set(self.sockets):
            await socket.close(code=1001)

    @web.middleware
    async def check_host(self, request, handler):
        """Refuse a foreign name that resolves to this machine (DNS rebinding)."""
        try:
            known = self.hosts is None or urlsplit(f"//{request.host}").hostname in self.hosts
        except ValueError:
            known = False
        if not known:
            raise web.HTTPForbidden(text="this page is served under another name; see --host")
        return await handler(request)

    async def file(self, request):
        path = request.match_info["path"] or "index.html"
        if path in self.legends:
            world, starts = self.legends.pop(path)
            self.files[path] = asyncio.ensure_future(self.work_through(legend(world, starts)))
        if path not in self.files:
            raise web.HTTPNotFound
        if isinstance(self.files[path], asyncio.Future):  # several requests may wait for it
            self.files[path] = await asyncio.shield(self.files[path])
        kind = TYPES[PurePosixPath(path).suffix]
        return web.Response(body=self.files[path], content_type=kind, headers=HEADERS)

    def work(self, function, *values):
        return asyncio.get_running_loop().run_in_executor(self.thread, function, *values)

    async def work_through(self, pieces):
        """→ the first piece that is not None. Between pieces, others are served."""
        while (result := await self.work(next, pieces)) is None:
            pass
        return result

    async def socket(self, request):
        """One session, which lasts as long as its socket is open."""
        own = (f"http://{request.host}", f"https://{request.host}")
        if request.headers.get("Origin") not in own:  # browsers let any page open this socket
            raise web.HTTPForbidden(text="only this server's own page may play")
        number = request.match_info["number"]
        if number not in map(str, range(len(self.worlds))):
            raise web.HTTPNotFound
        _, world, starts = self.worlds[int(number)]
        H, W = world.frame_size
        socket = web.WebSocketResponse(heartbeat=20, timeout=2, max_msg_size=3 * H * W + 1024)
        await socket.prepare(request)
        if self.games >= self.limit:
            reason = f"{self.limit} games are being played, which is the limit; try again later"
            await self.part(request, socket, 1013, reason)
            return socket
        self.games += 1
        self.sockets.add(socket)
        questions = asyncio.Queue(OPEN_QUESTIONS)
        player = asyncio.create_task(self.play(socket, world, starts, questions))
        try:
            async for message in socket:
                if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                    break
                questions.put_nowait(message)
        except asyncio.QueueFull:
            player.cancel()
            reason = f"more than {OPEN_QUESTIONS} messages without waiting for an answer"
            await self.part(request, socket, 1008, reason)
        finally:
            player.cancel()
            await asyncio.gather(player, return_exceptions=True)
            self.sockets.discard(socket)
            self.games -= 1
        return socket

    async def part(self, request, socket, code, reason):
        """Send the reason and close. A visitor that does not read it is disconnected."""

        async def send_reason():
            await socket.send_json({"error": reason})
            await socket.close(code=code, message=reason.encode())

        try:
            await asyncio.wait_for(send_reason(), 2)
        except asyncio.TimeoutError:
            if request.transport:
                request.transport.abort()

    async def play(self, socket, world, starts, questions):
        """Answer until cancelled.

        An error in the world ends this session, and its page shows a message.
        """
        try:
            await self.answer_all(socket, world, starts, questions)
        except Exception:
            traceback.print_exc()
            await socket.close(code=1011, message=b"the world failed; the server printed why")

    async def answer_all(self, socket, world, starts, questions):
        session = await self.work(Session, world, starts)
        while True:
            message = await questions.get()
            try:
                reply = await self.work_through(answer(session, message.data))
            except Refused as reason:
                reply = json.dumps({"error": str(reason)})
            send = socket.send_bytes if isinstance(reply, bytes) else socket.send_str
            await send(reply)


def is_address(host: str, kind: str) -> bool:
    """Whether host is an IP address with the property `kind`, such as is_loopback."""
    try:
        return getattr(ipaddress.ip_address(host), kind)
    except ValueError:
        return False


async def run(site: Site, host: str, port: int) -> None:
    runner = web.AppRunner(site.app(), shutdown_timeout=1, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except (OSError, UnicodeError) as error:
        await runner.cleanup()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}:{port} ({reason});"
            " choose another --port (0: any free one) or --host"
        ) from None
    port = runner.addresses[0][1]
    name = f"[{host}]" if ":" in host else host
    print(f"play at http://{name}:{port}  (Ctrl-C stops)", flush=True)
    if host != "localhost" and not is_address(host, "is_loopback"):
        print(
            f"anyone who can reach this machine as {host} can play too,"
            f" {site.limit} games at a time; there is no password",
            flush=True,
        )
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def serve(worlds: list, host: str, port: int, limit: int) -> None:
    """Serve worlds, a list of (name, WorldModel, starts), until Ctrl-C.

    Raises UserError if the address cannot be used.
    """
    # leave a core for the socket and for a browser on the same machine
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    # the socket's thread waits this long, several times per frame, for torch's to release the GIL
    sys.setswitchinterval(5e-4)
    try:
        asyncio.run(run(Site(worlds, host, limit), host, port))
    except KeyboardInterrupt:
        pass
