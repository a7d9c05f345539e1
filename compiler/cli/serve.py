"""`moec serve`: the OpenAI routes for one artifact."""

from __future__ import annotations

import socket
from pathlib import Path

import click

from ..errors import MoecError
from .base import byte_size, device_option, examples_epilog, say, shared_options, threads_option


@click.command(
    epilog=examples_epilog(
        "moec serve tiny",
        "moec serve tiny --port 8080 --batch 4 --api-key secret",
        "curl localhost:8000/v1/completions -H 'content-type: application/json' -d '{\"prompt\": \"import\"}'",
    )
)
@click.argument("folder", metavar="DIR")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 is every one.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--name", help="The model's name to clients.  [default: the folder's]")
@click.option("--api-key", envvar="MOEC_API_KEY", metavar="KEY", help="What clients have to send.  [env: MOEC_API_KEY]")
@click.option("--batch", default=16, show_default=True, type=click.IntRange(min=1), help="Requests that run together.")
@click.option("--queue", default=64, show_default=True, type=click.IntRange(min=1), help="Requests that may wait.")
@click.option(
    "--max-tokens", default=4096, show_default=True, type=click.IntRange(min=1), help="Tokens of an answer at most."
)
@click.option(
    "--max-body",
    default="1MB",
    show_default=True,
    metavar="SIZE",
    callback=lambda c, p, v: byte_size(v, p),
    help="Bytes of a request.",
)
@click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds of a request.",
)
@threads_option
@click.option("--accuracy", type=click.Choice(["fast", "exact"]), help="As in `moec run`.  [default: as compiled]")
@device_option
@shared_options
def serve(
    folder: str, host: str, port: int, name: str | None, api_key: str | None, batch: int, queue: int, max_tokens: int,
    max_body: int, timeout: float, threads: int | None, accuracy: str | None, device: str | None,
) -> None:  # fmt: skip
    """Serve an artifact with the OpenAI routes: chat completions, completions, models, and /health.

    For a laptop and for tests: one model, and requests that wait together run as one batch. With quantized weights a request may get other tokens in a batch than alone, where two are nearly as likely: --accuracy exact or --batch 1 prevent it. It listens on this machine only unless --host says otherwise.
    """
    from ..runtime.artifact import Artifact

    artifact = Artifact.open(Path(folder))
    try:
        import uvicorn

        from ..runtime.serving.application import LOOPBACK, make_application
        from ..runtime.serving.batches import Limits
    except ImportError as error:
        what = f"serving needs {error.name}, which is not installed"
        raise MoecError(what, todo="pip install 'moec[serve]'") from None
    model = name or artifact.folder.resolve().name
    artifact.tokenizer  # noqa: B018 - a model without one is refused before it is loaded
    try:
        bound = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise MoecError(
            f"cannot listen: {error.strerror}", f"{host} port {port}", todo="choose another --port"
        ) from error
    with bound:
        session = artifact.session(threads=threads, accuracy=accuracy, device=device, spinning=False)
        application = make_application(
            artifact, session, model=model, limits=Limits(queue, batch, timeout, max_body, max_tokens), key=api_key,
            any_host=host not in LOOPBACK,
        )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        say(f"{model} on http://{shown}:{bound.getsockname()[1]}/v1; Ctrl-C ends it")
        config = uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=5, access_log=False)
        uvicorn.Server(config).run(sockets=[bound])
