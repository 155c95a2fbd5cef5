"""The command behind ``vlmfast demo``: a port, a temporary folder, the server and its end."""

import errno
import gc
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

PATIENCE = 1  # seconds that open connections get when the page is closed


def serve(
    model: str,
    *,
    host: str,
    port: int,
    max_new_tokens: int,
    repeats: int,
    device: str,
    dtype: str,
    browse: bool = False,
) -> None:
    """Load the model and serve the page until Ctrl-C; browse: open it in a browser.

    ValueError for a port that is taken and for a host that is no address of this machine; other errors as in
    `load_model`.
    """
    with closing(listen(host, port)) as listener, uploads() as folder:
        warn(listener)
        end_as_by_ctrl_c()
        import gradio  # noqa: F401  not before: it asks for its folder; and first, as it brings the others
        import uvicorn

        from vlmfast.eval.asking import load_asked
        from vlmfast.eval.demo.answering import Room
        from vlmfast.eval.demo.page import application

        network, processor = load_asked(model, device=device, dtype=dtype)
        room = Room(network, processor, folder, max_new_tokens, repeats)
        app = application(room, f"{model} · {device} · {dtype}")
        gc.collect()
        gc.freeze()  # timing collects garbage before every reading: not through all that was imported
        settings = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=PATIENCE)
        print(f"vlmfast demo: {address(listener)} (Ctrl-C ends it)", flush=True)
        if browse:
            webbrowser.open(address(listener))
        with suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[listener])
    print("vlmfast: the page is closed", file=sys.stderr, flush=True)
    if room.turn.locked():  # an answer that nobody waits for would keep the process
        os._exit(0)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there already, so that nobody else takes the port while the model loads."""
    try:
        family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(place[:2], family=family)
    except socket.gaierror:
        raise ValueError(f"--host {host!r} is no address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is taken: choose another one, such as --port {port + 1}") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"--host {host!r} is no address of this machine") from None
        if error.errno == errno.EACCES:
            raise ValueError(f"port {port} is for root alone: choose one from 1024 on, such as --port 7860") from None
        raise


def warn(listener: socket.socket) -> None:
    """One line where others than this machine reach the page."""
    host, port = listener.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        print(f"vlmfast: everybody who reaches port {port} of {host} can use the page", file=sys.stderr)


def address(listener: socket.socket) -> str:
    """Where a browser on this machine finds the page."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def end_as_by_ctrl_c() -> None:
    """Let whatever else ends a process raise KeyboardInterrupt, too, so that nothing is left behind."""
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)


@contextmanager
def uploads() -> Iterator[Path]:
    """A folder that is gone at the end, for what is uploaded and for all other temporary files of the process."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="vlmfast-demo-") as folder:
        tempfile.tempdir = folder
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before
            del os.environ["GRADIO_TEMP_DIR"]
