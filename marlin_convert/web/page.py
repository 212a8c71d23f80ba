"""The page itself, in Gradio. It holds no work: what a visitor sees is what `Jobs` knows of their plan and conversion.

A visitor's token comes with each click (from a field, or from the login of a Space), goes into the order, and from
there into one process. The browser remembers the two jobs by their ids, so that a page that is loaded again goes on.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr
from gradio.utils import get_space
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse

from ..errors import MarlinConvertError, OptionError
from ..options import Format, PublishTarget, QuantMethod, ZeroPointReading
from . import show
from .address import LOOPBACK, require_address
from .jobs import DONE, Jobs
from .order import Order
from .source import hub_source

TITLE = "Quantized to Marlin"
INTRODUCTION = (
    "Turns a GPTQ, AWQ or compressed-tensors checkpoint on the Hub into a Marlin one, exactly, proves it layer by "
    "layer, and publishes the result in your account. Nothing is downloaded or written before you have seen the plan."
)

#: Where a commit goes.
MAIN, BRANCH, PULL_REQUEST = "the repository", "a branch", "a pull request"
NO_READING = "as the source says"


class Page:
    """The page, and what its buttons do. `key` is what the address of this computer's own user holds; on a page for
    everybody there is none."""

    def __init__(self, jobs: Jobs, key: str | None) -> None:
        self.jobs, self._key = jobs, key
        self.space = get_space() is not None
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            self._build()

    # ---- what there is to see

    def _build(self) -> None:
        self.kept = gr.BrowserState({"plan": "", "conversion": ""}, storage_key="marlin-convert")
        self.local_user, self.seen = gr.State(False), gr.State({})
        gr.Markdown(f"# {TITLE}\n{INTRODUCTION}")
        if self.space:
            gr.LoginButton(elem_id="login")
        else:
            self.token = gr.Textbox(
                label="Hugging Face token", type="password", elem_id="token",
                info="One that may write. It goes with this request, and is kept nowhere.",
            )  # fmt: skip
            self.login = gr.HTML(show.note(""), visible=False, elem_id="own-login")
        self.source = gr.Textbox(
            label="Checkpoint on the Hub", placeholder="owner/name, or its address", elem_id="source"
        )
        with gr.Accordion("More", open=False, elem_id="more"):
            self.revision = gr.Textbox(label="Branch, tag or commit", placeholder="main", elem_id="revision")
            self.format = gr.Dropdown([w.value for w in Format], value=Format.AUTO.value, label="Format of the result")
            self.reading = gr.Dropdown(
                [NO_READING, *(w.value for w in ZeroPointReading)], value=NO_READING, label="Zero points"
            )
            self.quant_method = gr.Dropdown(
                [w.value for w in QuantMethod], value=QuantMethod.GPTQ.value, label="quant_method in the config"
            )
        self.plan_button = gr.Button("Show the plan", variant="primary", elem_id="plan-button")
        self.plan = gr.HTML(elem_id="plan")
        with gr.Group(visible=False, elem_id="target") as self.target:
            self.name = gr.Textbox(label="Name of the result", info="Without an owner, in your account", elem_id="name")
            self.private = gr.Checkbox(label="Private", elem_id="private")
            self.where = gr.Radio(
                [MAIN, BRANCH, PULL_REQUEST], value=MAIN, label="Publish as a commit to", elem_id="where"
            )
            self.branch = gr.Textbox(label="Branch", visible=False, elem_id="branch")
            self.force = gr.Checkbox(label="Overwrite other weights that the repository holds", elem_id="force")
            self.convert_button = gr.Button("Convert and publish", variant="primary", elem_id="convert-button")
        self.progress = gr.HTML(elem_id="progress")
        self.cancel_button = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel-button")
        self.result = gr.HTML(elem_id="result")
        self.timer = gr.Timer(1.0, active=False)
        # An answer that overtakes another may show what was before, and stop the timer: this one goes on.
        self.watch = gr.Timer(5.0)
        self._connect()

    def _connect(self) -> None:
        wanted = [self.source, self.revision, self.format, self.reading, self.quant_method]
        target = [self.name, self.private, self.where, self.branch, self.force]
        shown = [
            self.seen,
            self.plan,
            self.target,
            self.name,
            self.progress,
            self.cancel_button,
            self.result,
            self.timer,
        ]
        plan: Callable[..., Any]
        convert: Callable[..., Any]
        token: list[Any] = []
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        if self.space:
            # Gradio passes the visitor's token because of this annotation.
            def plan_logged_in(kept: Any, local_user: bool, login: gr.OAuthToken | None, *asked: Any) -> Any:
                return self.on_plan(kept, local_user, login.token if login else None, *asked)

            def convert_logged_in(kept: Any, local_user: bool, login: gr.OAuthToken | None, *asked: Any) -> Any:
                return self.on_convert(kept, local_user, login.token if login else None, *asked)

            plan, convert = plan_logged_in, convert_logged_in
        else:
            plan, convert, token = self.on_plan, self.on_convert, [self.token]
        self.where.change(lambda where: gr.update(visible=where == BRANCH), self.where, self.branch, **quiet)
        for trigger in (self.plan_button.click, self.source.submit):
            trigger(plan, [self.kept, self.local_user, *token, *wanted], [self.kept, *shown], **quiet)
        self.convert_button.click(convert, [self.kept, self.local_user, *token, *target], [self.kept, *shown], **quiet)
        self.cancel_button.click(self.on_cancel, self.kept, None, **quiet)
        for timer in (self.timer, self.watch):
            timer.tick(self.on_tick, [self.kept, self.seen], shown, **quiet)
        self.blocks.load(self.on_load, None, [self.local_user, *([] if self.space else [self.login])], **quiet).then(
            self.on_tick, [self.kept, self.seen], shown, **quiet
        )

    # ---- what happens

    def on_load(self, request: gr.Request) -> Any:
        """Tell whether it is this computer's user who looks, which their address tells."""
        given = request.query_params.get("key") or ""
        local_user = self._key is not None and hmac.compare_digest(given.encode(), self._key.encode())
        if self.space:
            return local_user
        text = "Without a token, the login of this computer is used (hf auth login)."
        return local_user, gr.update(value=show.note(text), visible=local_user)

    def on_plan(
        self, kept: Any, local_user: bool, token: str | None, source: str, revision: str, format: str, reading: str,
        quant_method: str,
    ) -> Any:  # fmt: skip
        def order() -> Order:
            name, at = hub_source(source or "", (revision or "").strip() or None)
            return Order(
                name, at, Format.chosen(format, "format"),
                None if reading == NO_READING else ZeroPointReading.chosen(reading, "zero points"),
                QuantMethod.chosen(quant_method, "quant_method"), local_user=local_user, token=_given(token),
            )  # fmt: skip

        return self._submitted(kept, "plan", order)

    def on_convert(
        self,
        kept: Any,
        local_user: bool,
        token: str | None,
        name: str,
        private: bool,
        where: str,
        branch: str,
        force: bool,
    ) -> Any:
        def order() -> Order:
            job = self.jobs.get(_ids(kept)["plan"])
            if job is None or job.state != DONE:
                raise OptionError("ask for the plan again: this page does not know it any more.")
            if where == BRANCH and not (branch or "").strip():
                raise OptionError("name the branch to publish on.")
            if not (local_user or _given(token)):
                needed = "log in" if self.space else "log in, or give a token that may write"
                raise OptionError(f"{needed}: the result is published in your account.")
            target = PublishTarget(
                (name or "").strip() or job.result["name"], bool(private), branch.strip() if where == BRANCH else None,
                where == PULL_REQUEST,
            )  # fmt: skip
            planned = job.order
            # The commit that was shown is converted, whatever has been committed since.
            return Order(
                planned.source, job.result["commit"], planned.format, planned.zero_points, planned.quant_method,
                target, bool(force), local_user=local_user, token=_given(token),
            )  # fmt: skip

        return self._submitted(kept, "conversion", order)

    def _submitted(self, kept: Any, kind: str, order: Callable[[], Order]) -> Any:
        ids = _ids(kept)
        before = self.jobs.get(ids[kind])
        if before is not None and not before.over:
            if kind == "conversion":  # a second click
                return ids, *self.on_tick(ids, {})
            self.jobs.cancel(before.id)
        try:
            job = self.jobs.submit(order())
        except MarlinConvertError as error:
            message = show.problem(error.message[:1].upper() + error.message[1:])
            nothing = [gr.skip()] * 7
            shown = [gr.skip(), message, gr.update(visible=False), *nothing[:5]]
            if kind == "conversion":
                shown = [gr.skip(), gr.skip(), gr.skip(), gr.skip(), message, *nothing[:3]]
            return gr.skip(), *shown
        ids[kind] = job.id
        return ids, *self.on_tick(ids, {})

    def on_cancel(self, kept: Any) -> None:
        self.jobs.cancel(_ids(kept)["conversion"])

    def on_tick(self, kept: Any, seen: Any) -> Any:
        """Return what is new since `seen`: nothing is drawn again that is as it was."""
        ids = _ids(kept)
        plan, conversion = self.jobs.get(ids["plan"]), self.jobs.get(ids["conversion"])
        now = {"plan": _state(plan), "conversion": _state(conversion)}
        ready = plan is not None and plan.state == DONE and _convertible(plan.result)
        busy = conversion is not None and not conversion.over
        update: list[Any] = [now]
        if seen.get("plan") == now["plan"] and (plan is None or plan.over):
            update += [gr.skip(), gr.update(visible=ready and not busy), gr.skip()]
        else:
            named = gr.update(value=plan.result["name"]) if plan is not None and ready else gr.skip()
            update += ["" if plan is None else show.plan_of(plan), gr.update(visible=ready and not busy), named]
        if conversion is None:
            update += [gr.skip(), gr.update(visible=False), gr.skip()]
        else:
            update.append(show.progress_of(conversion, self.jobs.ahead(conversion)))
            update.append(gr.update(visible=busy))
            update.append(gr.skip() if seen.get("conversion") == now["conversion"] else show.result_of(conversion))
        active = busy or (plan is not None and not plan.over)
        return *update, gr.Timer(active=active)


def _given(token: str | None) -> str | None:
    return (token or "").strip() or None


def _ids(kept: Any) -> dict[str, str]:
    """Return what the browser remembers, whatever it sends."""
    jobs = kept if isinstance(kept, dict) else {}
    return {kind: str(jobs.get(kind) or "") for kind in ("plan", "conversion")}


def _state(job: Any) -> str:
    return "" if job is None else f"{job.id} {job.state}"


def _convertible(plan: dict[str, Any]) -> bool:
    return not (plan["already_marlin"] or plan["refusals"] or plan["room"])


def serve(host: str, port: int, work_dir: Path | None, *, browser: bool, say: Callable[[str], None]) -> None:
    """Serve the page until a signal comes. Only at this computer's own address, its user may use their login."""
    require_address(host, port)
    local = host in LOOPBACK and get_space() is None
    key = secrets.token_urlsafe(16) if local else None
    jobs = Jobs(work_dir)
    try:
        page = Page(jobs, key)
        # No other site may reach a local page by a host name that resolves to it; and Gradio's history of runs would
        # keep in the browser what was typed, tokens too.
        guard = [Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])] if local else []
        _, address, _ = page.blocks.queue(max_size=200).launch(
            server_name=host, server_port=port or None, prevent_thread_lock=True, quiet=True, ssr_mode=False,
            footer_links=[], show_error=False, share=False, run_history=False, theme=_theme(), css=show.CSS,
            app_kwargs={"middleware": guard, "exception_handlers": _login_problems() if page.space else {}},
        )  # fmt: skip
        address += f"?key={quote(key)}" if key else ""
        say(address)
        if browser and local:
            webbrowser.open(address)
        threading.Event().wait()
    finally:
        jobs.close()


def _login_problems() -> dict[Any, Any]:
    """Return what answers a login that the Hub ended without one, as Starlette's `exception_handlers`: Gradio itself
    would answer nobody's fault as its own (500)."""
    from authlib.integrations.starlette_client import OAuthError

    def answer(_: Any, error: Any) -> HTMLResponse:
        why = show.note(f"You are not logged in: {str(error.description or error.error)[:200]}.")
        return HTMLResponse(f'<title>{TITLE}</title>{why}<p><a href="/">Back to the page</a></p>', 403)

    return {OAuthError: answer}


def _theme() -> gr.themes.Base:
    """Return Gradio's own look with the reader's own fonts: nothing is fetched from elsewhere."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
