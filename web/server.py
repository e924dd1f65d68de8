"""`python play.py --web`: the page over HTTP, and behind each WebSocket one game.

The page asks and the server answers, one answer per message, in order. So the page's clock sets the pace, and as it asks for a frame only while
less than two are on their way, a slow link makes the game slow, not late.

    {"type": "start", "start": 3, "seed": 7}   begin from a first frame of the world        → frame
    H·W·3 bytes of RGB                         begin from this picture                      → frame
    {"type": "step", "action": 2}              → frame        {"type": "rewind", "to": 40}  → frame
    {"type": "save"}                           → {"run": …}, what play.py --replay reads
    anything else                              → {"error": "why"}

A frame is its number (4 bytes, little-endian) and H·W·3 bytes of RGB; the socket's own compression makes it small without loss.
"""
import asyncio
import ipaddress
import json
import struct
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import numpy as np
import torch

from config import UserError
from game import Game
from web.site import TYPES, files, legend

try:
    from aiohttp import WSMsgType, web
except ImportError:
    raise UserError('--web needs aiohttp; get it with: pip install ".[web]"') from None

OPEN_QUESTIONS = 16  # of one page; ours has two frames on their way, and perhaps a few restarts
LONGEST = 100_000  # frames of a game: what it takes to go back is about a kilobyte each


class Refused(ValueError):
    """A message that cannot be answered; the reason is for the visitor."""


def integer(message, name, end):
    """message[name], an integer in [0, end)."""
    value = message.get(name)
    if type(value) is not int or not 0 <= value < end:
        raise Refused(f"{name} must be an integer from 0 to {end - 1}")
    return value


def answer(game, message, is_text):
    """One message → None between the pieces of its work, where others may be served, then the reply: bytes, or JSON."""
    if not is_text:
        H, W = game.world.frame_size
        if len(message) != H * W * 3:
            raise Refused(f"a picture must have {H * W * 3} bytes, {H}×{W} pixels of RGB")
        game.start(np.frombuffer(message, dtype=np.uint8).reshape(1, H, W, 3))
    else:
        try:
            message = json.loads(message)
            kind = message["type"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused('a message must be JSON like {"type": "step", "action": 0}') from None
        if kind == "start":
            start, game.seed = integer(message, "start", len(game.starts)), integer(message, "seed", 2**31)
            game.start(game.starts[start])
        elif kind == "step":
            if len(game.actions) >= LONGEST:
                raise Refused(f"this game has {LONGEST:,} frames, which is the limit; save it and begin again")
            game.press(integer(message, "action", game.world.n_actions))
        elif kind == "rewind":
            yield from game.rewinding(integer(message, "to", len(game.actions) + 1))
        elif kind == "save":
            return (yield json.dumps({"run": game.record()}))
        else:
            raise Refused("type must be start, step, rewind or save")
    yield struct.pack("<I", len(game.actions)) + np.ascontiguousarray(game.frame).tobytes()


class Site:
    def __init__(self, worlds, host, limit):
        self.worlds, self.limit, self.games, self.sockets = worlds, limit, 0, set()
        self.files = files(worlds, "socket")  # all that can be asked for: no path from outside is ever opened
        self.legends = {f"worlds/{i}/legend.png": (world, starts) for i, (_, world, starts) in enumerate(worlds)}  # made when first asked for
        self.thread = ThreadPoolExecutor(1)  # torch uses all cores by itself; whoever waits longest is next
        self.hosts = None if is_address(host, "is_unspecified") else {"localhost", "127.0.0.1", "::1", host.lower()}

    def app(self):
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
        """A foreign name that resolves to this machine (DNS rebinding) gets nothing."""
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
        if isinstance(self.files[path], asyncio.Future):  # others may ask for it, too, before it is there
            self.files[path] = await asyncio.shield(self.files[path])
        headers = {"Cache-Control": "no-cache", "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'"}
        return web.Response(body=self.files[path], content_type=TYPES[PurePosixPath(path).suffix], headers=headers)

    def work(self, function, *values):
        return asyncio.get_running_loop().run_in_executor(self.thread, function, *values)

    async def work_through(self, pieces):
        """The first of the pieces that is not None; between them others are served."""
        while (result := await self.work(next, pieces)) is None:
            pass
        return result

    async def socket(self, request):
        """One game, as long as its socket is open."""
        if request.headers.get("Origin") not in (f"http://{request.host}", f"https://{request.host}"):  # browsers let any page open a socket to here
            raise web.HTTPForbidden(text="only this server's own page may play")
        number = request.match_info["number"]
        if number not in map(str, range(len(self.worlds))):
            raise web.HTTPNotFound
        _, world, starts = self.worlds[int(number)]
        socket = web.WebSocketResponse(heartbeat=20, timeout=2, max_msg_size=3 * world.frame_size[0] * world.frame_size[1] + 1024)
        await socket.prepare(request)
        if self.games >= self.limit:
            await self.part(request, socket, 1013, f"{self.limit} games are being played, which is the limit; try again later")
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
            await self.part(request, socket, 1008, f"more than {OPEN_QUESTIONS} messages without waiting for an answer")
        finally:
            player.cancel()
            await asyncio.gather(player, return_exceptions=True)
            self.sockets.discard(socket)
            self.games -= 1
        return socket

    async def part(self, request, socket, code, reason):
        """Say why and close; who does not listen is cut off."""

        async def farewell():
            await socket.send_json({"error": reason})
            await socket.close(code=code, message=reason.encode())

        try:
            await asyncio.wait_for(farewell(), 2)
        except asyncio.TimeoutError:
            if request.transport:
                request.transport.abort()

    async def play(self, socket, world, starts, questions):
        """Answer until cancelled. What goes wrong in the world ends this game, and its page hears of it."""
        try:
            await self.answer_all(socket, world, starts, questions)
        except Exception:
            traceback.print_exc()
            await socket.close(code=1011, message=b"the world has failed; its server printed why")

    async def answer_all(self, socket, world, starts, questions):
        game = await self.work(Game, world, starts)
        while True:
            message = await questions.get()
            try:
                reply = await self.work_through(answer(game, message.data, message.type == WSMsgType.TEXT))
            except Refused as reason:
                reply = json.dumps({"error": str(reason)})
            await (socket.send_bytes(reply) if isinstance(reply, bytes) else socket.send_str(reply))


def is_address(host, kind):
    """Whether host is an IP address with that property, such as is_loopback."""
    try:
        return getattr(ipaddress.ip_address(host), kind)
    except ValueError:
        return False


async def run(site, host, port):
    runner = web.AppRunner(site.app(), shutdown_timeout=1, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except (OSError, UnicodeError) as error:
        await runner.cleanup()
        raise UserError(f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port (0: any free one) or --host") from None
    port = runner.addresses[0][1]
    print(f"play at http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends)", flush=True)
    if host != "localhost" and not is_address(host, "is_loopback"):
        print(f"anyone who can reach this machine under {host} can play too, {site.limit} games at a time: there is no password", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def serve(worlds, host, port, limit):
    """Serve worlds, a list of (name, WorldModel, starts), until Ctrl-C. Raises UserError if the address cannot be had."""
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core for the socket, and for a browser on the same machine
    sys.setswitchinterval(5e-4)  # the socket's thread waits this long for torch's to let it in, several times a frame
    try:
        asyncio.run(run(Site(worlds, host, limit), host, port))
    except KeyboardInterrupt:
        pass
