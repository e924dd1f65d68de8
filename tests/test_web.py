"""The page: its server over real sockets, and page and static export in a real browser.

The browser is Debian's chromium.
"""

import asyncio
import base64
import functools
import http.server
import importlib
import io
import json
import shutil
import socket
import threading
from contextlib import suppress

from utils.checkpoint import load_world
from utils.cli import UserError

import numpy as np
import pytest
import torch
from PIL import Image

import play
from models.dynamics import maskgit_decode
from player.session import Session, read_run

aiohttp = pytest.importorskip("aiohttp", reason='the page is an extra: pip install ".[web]"')
aiohttp_web = pytest.importorskip("aiohttp.web")
server = importlib.import_module("player.web.server")

LIMIT = 3
START = {"type": "start", "start": 2, "seed": 5}


def step(action):
    return {"type": "step", "action": action}


@pytest.fixture(scope="module")
def world(world_dir):
    return load_world(world_dir)


@pytest.fixture(scope="module")
def site(world):
    """The server in a thread, with two names for one world; → its address, and the Site."""
    starts = world.start_frames.numpy()
    worlds = [("first", world, starts), ("second", world, starts[:2])]
    site, loop = server.Site(worlds, "127.0.0.1", LIMIT), asyncio.new_event_loop()
    runner = aiohttp_web.AppRunner(site.app(), shutdown_timeout=1)

    async def begin():
        await runner.setup()
        await aiohttp_web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner.addresses[0][1]

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    yield f"http://127.0.0.1:{port}", site
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


class Visitor:
    """One socket.

    ask(message) → what comes back: (number, frame), a dict, or the code it was closed with.
    """

    def __init__(self, session, url, number=0, **options):
        options = {"headers": {"Origin": url}} | options
        self.connecting = session.ws_connect(f"{url}/socket/{number}", **options)

    async def __aenter__(self):
        self.socket = await self.connecting
        return self

    async def __aexit__(self, *_):
        await self.socket.close()

    async def send(self, message):
        if isinstance(message, bytes):
            await self.socket.send_bytes(message)
        elif isinstance(message, str):
            await self.socket.send_str(message)
        else:
            await self.socket.send_json(message)

    async def hear(self):
        message = await self.socket.receive(timeout=60)
        if message.type == aiohttp.WSMsgType.BINARY:
            pixels = np.frombuffer(message.data[4:], dtype=np.uint8)
            return int.from_bytes(message.data[:4], "little"), pixels.reshape(64, 64, 3)
        if message.type == aiohttp.WSMsgType.TEXT:
            return json.loads(message.data)
        return self.socket.close_code

    async def ask(self, message):
        await self.send(message)
        return await self.hear()


def visit(url, talk, visitors=1, **options):
    """Run the coroutine function talk(visitor, …) with so many open sockets."""

    async def run():
        async with aiohttp.ClientSession() as session:
            found = [await Visitor(session, url, **options).__aenter__() for _ in range(visitors)]
            try:
                return await talk(*found)
            finally:
                for visitor in found:
                    await visitor.__aexit__()

    return asyncio.run(run())


def test_a_game_over_a_socket_is_the_game(site, world, tmp_path):
    async def talk(visitor):
        messages = [START, step(1), step(4), step(4), {"type": "rewind", "to": 1}, step(6)]
        heard = [await visitor.ask(message) for message in messages]
        return heard, (await visitor.ask({"type": "save"}))["run"]

    heard, run = visit(site[0], talk)
    session = Session(world, world.start_frames.numpy(), seed=5)
    frames = [session.start(session.starts[2])] + [session.press(a) for a in (1, 4, 4)]
    frames += [session.rewind(1), session.press(6)]
    assert [number for number, _ in heard] == [0, 1, 2, 3, 1, 2]
    assert np.array_equal([frame for _, frame in heard], frames)
    (tmp_path / "run.json").write_text(json.dumps(run))
    again, actions = read_run(tmp_path / "run.json", world)
    assert actions == [1, 6]
    assert np.array_equal([again.press(a) for a in actions][-1], heard[-1][1])


def test_two_visitors_have_games_of_their_own_and_a_picture_begins_one(site, world):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)

    async def talk(one, two):
        await one.ask(START)
        assert np.array_equal((await two.ask(picture.tobytes()))[1], picture)
        return [await visitor.ask(step(action)) for action in (3, 5) for visitor in (one, two)]

    heard = visit(site[0], talk, visitors=2)
    clips = (world.start_frames[2].numpy(), picture[None])
    for clip, frames in zip(clips, (heard[::2], heard[1::2]), strict=True):
        session = Session(world, clip[None], seed=5 if len(clip) > 1 else 0)
        played = [session.press(3), session.press(5)]
        assert np.array_equal(played, [frame for _, frame in frames])


def test_what_cannot_be_answered_is_refused_with_a_reason_and_the_game_goes_on(site):
    bad = {
        "no JSON": "must be JSON",
        "[]": "must be JSON",
        "[" * 900: "must be JSON",
        "{}": "must be JSON",
        '{"type": 1}': "type must be",
        '{"type": "step"}': "action must be an integer from 0 to 7",
        '{"type": "step", "action": 8}': "from 0 to 7",
        '{"type": "step", "action": true}': "from 0 to 7",
        '{"type": "step", "action": -1}': "from 0 to 7",
        '{"type": "rewind", "to": 2}': "to must be",
        '{"type": "start", "start": 99, "seed": 0}': "start must be",
        '{"type": "start", "start": 0, "seed": 1e3}': "seed must be",
        b"short": "must have 12288 bytes",
    }

    async def talk(visitor):
        await visitor.ask(START)
        await visitor.ask(step(0))
        for message, reason in bad.items():
            assert reason in (await visitor.ask(message))["error"], message
        return await visitor.ask(step(0))

    assert visit(site[0], talk)[0] == 2


def test_floods_and_large_messages_end_their_own_game_alone(site):
    async def talk(calm, flood):
        await calm.ask(START)
        for _ in range(300):
            await flood.send(step(0))
        number, _ = await calm.ask(step(1))
        heard = [await flood.hear()]
        while not isinstance(heard[-1], int):
            heard.append(await flood.hear())
        reason = [h for h in heard if isinstance(h, dict)][-1]["error"]
        assert number == 1 and heard[-1] == 1008 and "without waiting" in reason
        return await calm.ask(step(1))

    assert visit(site[0], talk, visitors=2)[0] == 2

    async def large(visitor):
        return await visitor.ask(bytes(20_000))

    assert visit(site[0], large) == 1009  # message too big


@pytest.mark.slow
def test_who_never_listens_is_cut_off(site):
    async def talk(deaf, other):
        deaf.socket._response.connection.transport.pause_reading()
        noise = np.random.default_rng(0).integers(0, 256, 12288, dtype=np.uint8).tobytes()
        await other.ask(START)
        assert site[1].games == 2
        with suppress(aiohttp.ClientError, ConnectionError):
            # The buffers on the way fill up, the answers stay in the server, and it ends this game.
            while site[1].games > 1:
                await deaf.send(noise)
                await asyncio.sleep(0.001)
        while site[1].games > 1:
            await asyncio.sleep(0.05)
        return await other.ask(START)

    assert visit(site[0], talk, visitors=2)[0] == 0


def test_games_are_limited_and_a_closed_tab_frees_its_own(site):
    async def full(*visitors):
        for visitor in visitors[:LIMIT]:
            assert (await visitor.ask(START))[0] == 0
        refused = await visitors[LIMIT].hear()
        assert f"{LIMIT} games are being played" in refused["error"]
        assert await visitors[LIMIT].hear() == 1013

    visit(site[0], full, visitors=LIMIT + 1)

    async def free(visitor):
        while site[1].games > 1:  # the server hears of closed sockets a moment later
            await asyncio.sleep(0.05)
        return await visitor.ask(START)

    assert visit(site[0], free)[0] == 0


def test_only_its_own_page_may_play_and_only_its_own_files_are_served(site):
    url = site[0]
    port = url.rpartition(":")[2]
    shown = ["/", "/page.js", "/worlds/1/legend.png"]
    hidden = ["/../play.py", "/..%2fplay.py", "/web/server.py", "/player/web/server.py"]
    hidden += ["/server.py", "/worlds/2/world.json", "/%00", "/socket/2"]
    foreign_hosts = ["evil.example", f"evil.example:{port}", "[", "127.0.0.1.evil.example"]
    foreign_origins = ["http://evil.example", "null", "http://[", f"http://localhost:{port}"]
    foreign_origins = [{}, *({"Origin": origin} for origin in foreign_origins)]
    # a tunnel changes the port of both
    tunnel = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}

    async def get():
        async with aiohttp.ClientSession() as session:

            async def status(path, **headers):
                address = aiohttp.client.URL(url + path, encoded=True)
                async with session.get(address, headers=headers) as reply:
                    return reply.status

            assert [await status(path) for path in shown] == [200] * 3
            for path in hidden:
                assert await status(path, Origin=url) == 404, path
            assert await status("/", Host=f"localhost:{port}") == 200
            for host in foreign_hosts:
                assert await status("/", Host=host) in (400, 403), host
            for origin in foreign_origins:
                with pytest.raises(aiohttp.WSServerHandshakeError) as refusal:
                    await session.ws_connect(f"{url}/socket/0", headers=origin)
                assert refusal.value.status == 403, origin
            async with session.ws_connect(f"{url}/socket/0", headers=tunnel):
                pass

    asyncio.run(get())


def test_an_address_that_cannot_be_had(world):
    worlds = [("w", world, world.start_frames.numpy())]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        for host, number in (("127.0.0.1", port), ("no.such.host.invalid", 0)):
            message = f"cannot listen on {host}:{number} .*choose another --port"
            with pytest.raises(UserError, match=message):
                asyncio.run(server.run(server.Site(worlds, host, 1), host, number))
    hosts = ("127.0.0.1", "::1", "0.0.0.0", "192.168.0.2", "name")
    loopback = [True, True, False, False, False]
    unspecified = [False, False, True, False, False]
    assert [server.is_address(host, "is_loopback") for host in hosts] == loopback
    assert [server.is_address(host, "is_unspecified") for host in hosts] == unspecified


# --- in a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("browser tests need Chromium: apt-get install chromium")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(address) → the page, playing; every request elsewhere fails the test."""
    foreign, pages = [], []

    def open_page(url):
        context = browser.new_context(has_touch=True)
        context.route(
            lambda address: not address.startswith((url, "blob:", "data:")),
            lambda route: (foreign.append(route.request.url), route.abort()),
        )
        page = context.new_page()
        page.on("pageerror", lambda error: foreign.append(str(error)))
        page.goto(url)
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.context.close()
    assert foreign == []


def clock(page):
    return int(page.inner_text("#clock"))


def wait_until(page, condition):
    for _ in range(600):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(condition)


CLOCK = "document.querySelector('#clock').textContent"
SCREENS = "document.querySelectorAll('#screens canvas')"
NOTICE = "document.querySelector('#notice').textContent"
PIXELS = f"""(i) => {{
    const context = {SCREENS}[i].getContext("2d");
    return [...context.getImageData(0, 0, 64, 64).data];
}}"""
GO_BACK = """(n) => {
    const timeline = document.querySelector("#timeline");
    timeline.value = n;
    timeline.dispatchEvent(new Event("input"));
}"""


def picture(page, screen=0):
    pixels = page.evaluate(PIXELS, screen)
    return np.array(pixels, dtype=np.uint8).reshape(64, 64, 4)[..., :3]


def saved(page, button, folder):
    with page.expect_download() as download:
        page.click(button)
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def hold(page, key, frames):
    """Step so many frames by hand with a key held down."""
    if key:
        page.keyboard.down(key)
    for _ in range(frames):
        n = clock(page)
        page.keyboard.press(".")
        wait_until(page, f"{CLOCK} == {n + 1}")
    if key:
        page.keyboard.up(key)


DROP = """([name, content]) => {
    const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name));
    for (const kind of ["dragenter", "dragover", "drop"]) {
        const options = { dataTransfer: data, bubbles: true, cancelable: true };
        document.body.dispatchEvent(new DragEvent(kind, options));
    }
}"""


def drop(page, name, content):
    page.evaluate(DROP, [name, base64.b64encode(content).decode()])


def exercise(page, folder):
    """What must work wherever the world is; → the saved run, the frame at its end."""
    wait_until(page, f"+{CLOCK} > 3")  # it plays by itself
    page.keyboard.press(" ")
    page.wait_for_timeout(300)
    n = clock(page)
    page.wait_for_timeout(400)
    assert clock(page) == n  # paused
    page.click("#starts button >> nth=1")
    wait_until(page, f"{CLOCK} == 0")
    exercise_keys(page)
    ends = {}
    for key in ("1", "2", "3", "4"):  # from one start, each by another way
        hold(page, key, 4)
        assert clock(page) == 4
        ends[key] = picture(page)
        page.evaluate(GO_BACK, 0)
        assert clock(page) == 0
    differences = [np.abs(ends["1"].astype(int) - ends[key]).max() for key in "234"]
    assert max(differences) > 30  # the keys do something
    hold(page, "1", 4)
    assert np.array_equal(picture(page), ends["1"])  # the same way again
    hold(page, "2", 2)
    page.evaluate(GO_BACK, 4)
    hold(page, "4", 2)
    assert clock(page) == 6 and page.get_attribute("#timeline", "max") == "6"
    return saved(page, "#json", folder), picture(page)


def exercise_keys(page):
    def action():
        return page.get_attribute("body", "data-action")

    page.keyboard.down("3")
    page.keyboard.down("5")
    assert action() == "5"  # the newest counts
    page.keyboard.up("5")
    assert action() == "3"
    page.keyboard.up("3")
    button = page.locator("#actions button").nth(4)
    button.dispatch_event("pointerdown", {"pointerId": 1})
    assert action() == "4" and "held" in button.get_attribute("class")
    page.evaluate("dispatchEvent(new Event('blur'))")
    assert action() != "4"


def test_the_page_plays_the_game_of_the_server(site, world, open_page, tmp_path):
    page = open_page(site[0])
    run, end = exercise(page, tmp_path)
    session, actions = read_run(run, world)
    assert actions == [1, 1, 1, 1, 4, 4]
    frames = [session.frame] + [session.press(a) for a in actions]
    assert np.array_equal(frames[-1], end)  # to the last bit
    gif = Image.open(saved(page, "#gif", tmp_path))
    assert gif.size == (256, 256) and gif.info["duration"] == round(100 / world.fps) * 10
    for n, frame in ((0, frames[0]), (gif.n_frames - 1, frames[-1])):
        gif.seek(n)
        shown = np.asarray(gif.convert("RGB"))[::4, ::4].astype(int)
        assert np.abs(shown - frame).mean() < 12  # of 256 colours
    film = saved(page, "#mp4", tmp_path)
    assert film.stat().st_size > 1000
    drop_pictures(page)
    play_side_by_side(page, site[1])
    a_third_game_is_refused(open_page(site[0]))
    page.close()  # the tab is closed: both games are free
    other = open_page(site[0])
    other.wait_for_timeout(500)
    assert site[1].games == 1


def drop_pictures(page):
    """A picture dropped on the page, and something that is none."""
    content, source = io.BytesIO(), np.zeros((64, 64, 3), dtype=np.uint8)
    source[:32, :, 0] = 255
    Image.fromarray(source).save(content, "PNG")
    drop(page, "red.png", content.getvalue())
    wait_until(page, f"{CLOCK} == 0")
    page.wait_for_timeout(200)
    assert np.array_equal(picture(page), source)
    hold(page, "1", 1)
    drop(page, "text.png", b"no picture")
    wait_until(page, f"{NOTICE}.includes('not a picture')")


def play_side_by_side(page, server_site):
    """Random actions from the same start, then another world."""
    games = server_site.games
    page.select_option("#beside", "random")
    wait_until(page, f"{SCREENS}.length == 2 && {CLOCK} == 0")
    hold(page, "1", 12)
    assert server_site.games == games + 1
    assert not np.array_equal(picture(page, 0), picture(page, 1))
    page.select_option("#beside", "1")
    name = "document.querySelectorAll('figcaption')[1].textContent"
    wait_until(page, f"{name} == 'second' && {CLOCK} == 0")
    hold(page, "1", 1)


def a_third_game_is_refused(page):
    """There is no place for a game beside, and the first one goes on."""
    page.select_option("#beside", "random")
    wait_until(page, f"{NOTICE}.includes('which is the limit')")
    n = clock(page)
    assert page.locator("#screens canvas").count() == 1
    wait_until(page, f"+{CLOCK} > {n}")
    page.close()


@pytest.fixture(scope="module")
def exported(world_dir, tmp_path_factory):
    """The static page in a folder, at temperature 0, and its address."""
    pytest.importorskip("onnxscript", reason='the export is an extra: pip install ".[web]"')
    out = tmp_path_factory.mktemp("export") / "site"
    play.main(["--checkpoint", world_dir, "--export-web", str(out), "--temperature", "0"])
    with pytest.raises(UserError, match="is not empty and not an earlier export"):
        play.main(["--checkpoint", world_dir, "--export-web", str(out.parent)])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=out)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as files:
        threading.Thread(target=files.serve_forever, daemon=True).start()
        yield out, f"http://127.0.0.1:{files.server_port}"
        files.shutdown()


TOKENS = """async ([first, actions, back]) => {
    const world = (await import("./channel.js")).connect(0, "local");
    await world.ask(Array.isArray(first) ? Uint8Array.from(first) : first);
    for (const action of actions) await world.ask({ type: "step", action });
    if (back) {
        await world.ask({ type: "rewind", to: back });
        for (const action of actions.slice(back)) await world.ask({ type: "step", action });
    }
    return (await world.ask({ type: "save" })).tokens;
}"""


def tokens_of(session):
    return [tokens[0].tolist() for tokens in session.tokens]


def test_the_static_page_plays_without_a_server_and_finds_pytorchs_tokens(
    world_dir, exported, open_page, tmp_path
):
    page = open_page(exported[1])
    run, end = exercise(page, tmp_path)
    session, actions = read_run(run, load_world(world_dir))  # rounds the weights as the page does
    frames = [session.press(a) for a in actions]
    assert actions == [1, 1, 1, 1, 4, 4]
    # a pixel may round the other way
    assert np.abs(frames[-1].astype(int) - end).max() <= 1
    pressed = [int(a) for a in np.random.default_rng(0).integers(0, 8, 64)]
    third = {"type": "start", "start": 3, "seed": 0}
    found = page.evaluate(TOKENS, [third, pressed, 40])
    session.start(session.world.start_frames[3].numpy())
    for action in pressed:
        session.press(action)
    assert found == tokens_of(session)
    picture = np.random.default_rng(1).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    found = page.evaluate(TOKENS, [picture.flatten().tolist(), [1, 2], 0])
    session.start(picture)
    for action in (1, 2):
        session.press(action)
    assert found == tokens_of(session)


PLAY = """async ([seed, actions]) => {
    const world = (await import("./channel.js")).connect(0, "local");
    await world.ask({ type: "start", start: 1, seed });
    for (const action of actions) await world.ask({ type: "step", action });
    await world.ask({ type: "rewind", to: 3 });
    for (const action of actions.slice(3)) await world.ask({ type: "step", action });
    return (await world.ask({ type: "save" })).run;
}"""
# One MaskGIT pass over n equal tokens, of which 4 is the mask.
FILL = """async ([logits, temperature, n, steps, seed]) => {
    const { fill, generator } = await import("./maskgit.js");
    const tokens = new Int32Array(n).fill(4);
    const all = Float32Array.from({ length: n * 4 }, (_, i) => logits[i % 4]);
    const random = generator(...seed);
    fill(tokens, all, { mask: 4, step: 1, steps, temperature, random });
    return [...tokens];
}"""


@pytest.fixture
def sampling_page(exported, open_page):
    """The static page at temperature 1, as it is without the option."""
    out, url = exported
    path = out / "worlds/0/world.json"
    before = path.read_text()
    told = json.loads(before)
    told["local"]["temperature"] = 1.0
    path.write_text(json.dumps(told))
    yield open_page(url)
    path.write_text(before)


def test_the_static_page_samples_with_a_seed_and_its_runs_play_again(
    world_dir, sampling_page, tmp_path
):
    actions = [1, 1, 4, 4, 2, 2]
    run, same, other = (sampling_page.evaluate(PLAY, [seed, actions]) for seed in (7, 7, 8))
    assert run == same and run["tokens"] != other["tokens"]
    assert run["seed"] == 7 and run["temperature"] == 1.0
    path, gif = tmp_path / "run.json", tmp_path / "again.gif"
    path.write_text(json.dumps(run))
    session, found = read_run(path, load_world(world_dir))
    assert found == actions
    for action in found:
        session.press(action)
    assert tokens_of(session)[1:] == run["tokens"]
    play.main(["--checkpoint", world_dir, "--replay", str(path), "--save", str(gif)])


def test_the_static_page_samples_as_pytorch_does(sampling_page):
    logits, temperature, n = [0.0, 1.0, 2.0, -1.0], 0.7, 20_000

    def shares(steps, seed):
        tokens = sampling_page.evaluate(FILL, [logits, temperature, n, steps, seed])
        return np.bincount(tokens, minlength=5) / n

    # of equal tokens filled in one pass, each kind is there as often as it should be
    expected = (torch.tensor(logits) / temperature).softmax(0).numpy()
    assert np.abs(shares(1, [3, 5])[:4] - expected).max() < 4 * 0.5 / np.sqrt(n)
    # The first of two passes fills as many as maskgit_decode does, and, with noise in the order,
    # nearly the same mixture.
    seen = []

    def logits_of(tokens):
        seen.append(tokens)
        return torch.tensor(logits).expand(1, n, 4)

    generator = torch.Generator().manual_seed(0)
    maskgit_decode(logits_of, torch.full((1, n), 4), 4, 2, temperature, generator)
    wanted = np.bincount(seen[1][0], minlength=5) / n
    assert np.allclose(shares(2, [1, 0]), wanted, atol=0.02)
