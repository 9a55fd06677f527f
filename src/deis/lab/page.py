"""The page of the lab, in Gradio: fields to requests, and what the session makes of them to HTML."""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from ..extras import needs
from ..methods.registry import REGISTRY, find
from ..methods.runge_kutta import TABLEAUX
from . import draw, plane
from .choices import CALIBRATED, GRIDS, METHODS, MOST_DEGREE, MOST_GUIDANCE, MOST_NFE, MOST_PICTURES, OWN, Choice, Request
from .library import BUNDLED, Library
from .session import Result, Session

with needs("lab", "deis lab"):
    import gradio as gr

EACH = "each in turn"
NETWORK: dict[str, Any] = {"concurrency_id": "network", "concurrency_limit": 1, "api_visibility": "private"}
"""Who waits for the network: one at a time; all else on the page answers meanwhile."""
LIGHT: dict[str, Any] = {"concurrency_id": "light", "concurrency_limit": 4, "api_visibility": "private", "show_progress": "hidden"}
_WRONG = (AssertionError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_DRAWING = threading.Lock()
"""matplotlib shares its caches of fonts between threads."""

CSS = """
.lab-row, .lab-strip, .lab-figure, .lab-moving { overflow-x: auto; }
.lab-row img { width: 100%; image-rendering: pixelated; display: block; }
.lab-numbers span { display: inline-block; text-align: center; font-size: 0.85em; }
.lab-strip table { width: 100%; table-layout: fixed; border: none; }
.lab-strip tr { border: none; }
.lab-strip td { border: none; text-align: center; padding: 2px; font-size: 0.85em; white-space: nowrap; }
.lab-strip img { width: 100%; min-width: 44px; image-rendering: pixelated; display: block; }
.lab-figure img { width: 100%; max-width: 770px; }
.lab-moving img { max-width: 100%; }
.lab-error { border: 2px solid #D55E00; border-left-width: 10px; padding: 10px; border-radius: 4px; font-weight: 600; }
.lab-note { font-style: italic; }
.lab-table pre { overflow-x: auto; font-size: 12px; line-height: 1.35; }
"""


def theme() -> Any:
    """Return the page's looks, with the fonts of the reader's own machine."""
    return gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Consolas", "monospace"]
    ).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")


@dataclass(frozen=True)
class Fields:
    """The fields of a choice, in the order of `Choice.read`'s values."""

    method: Any
    degree: Any
    tableau: Any
    nfe: Any
    grid: Any
    power: Any
    options: Any

    def all(self) -> list[Any]:
        """Return them in order."""
        return [self.method, self.degree, self.tableau, self.nfe, self.grid, self.power, self.options]


_NAMES = ("method", "degree", "tableau", "nfe", "grid", "power", "options")


def _choice(values: tuple[Any, ...]) -> Choice:
    return Choice.read(**dict(zip(_NAMES, values, strict=True)))


def choice_fields(method: str, degree: int, nfe: int, calibrated: bool = True) -> Fields:
    """Add the fields that say how to sample; those that a method does not have are hidden."""
    methods = [*METHODS, *([CALIBRATED] if calibrated else [])]
    chosen = gr.Dropdown(methods, value=method, label="Method", info=_about(method))
    has_degree, has_tableau = "<q>" in method, "<tableau>" in method
    degree_field = gr.Number(degree, label="Degree or order q", precision=0, minimum=0, maximum=MOST_DEGREE, visible=has_degree)
    tableau = gr.Dropdown(sorted(TABLEAUX), value="2heun", label="Tableau", visible=has_tableau)
    budget = gr.Slider(1, MOST_NFE, value=nfe, step=1, label="NFE", info="Network evaluations, for each picture.")
    with gr.Accordion("Grid and options", open=False):
        grid = gr.Dropdown(list(GRIDS), value=OWN, label="Grid", info="What is spaced evenly.")
        power = gr.Textbox("", label="Power of the grid", info="Empty: 2 for t and vp_t, 7 for rho.", max_lines=1)
        options = gr.Textbox("", label="Options of the method", info=_options_of(method), max_lines=1)
    chosen.change(_of_method, chosen, [chosen, degree_field, tableau, options], **LIGHT)
    return Fields(chosen, degree_field, tableau, budget, grid, power, options)


def _of_method(method: str) -> tuple[Any, ...]:
    seen = (gr.update(visible=mark in method) for mark in ("<q>", "<tableau>"))
    return gr.update(info=_about(method)), *seen, gr.update(info=_options_of(method))


def _about(method: str) -> str:
    """Return what a method is, in a line."""
    about = {entry.name: f"{entry.reference.replace('`', '')}. Evaluations a step: {entry.evaluations}." for entry in REGISTRY}
    return about.get(method, "The model's own plans, fitted to it, for guidance 1.")


def _options_of(method: str) -> str:
    """Return which options a method takes, with their defaults, as they are typed; those that are functions are none."""
    if method == CALIBRATED:
        return "It takes none."
    name = Choice(method, degree=2).name
    options = find(name)[0].options_of(name)
    typed = [f"{option}={json.dumps(value)}" for option, value in options.items() if not callable(value) and value != math.inf]
    return f"Their defaults: {', '.join(typed)}." if typed else "It takes none."


def _request_fields(library: Library, num: int) -> list[Any]:
    """Add the fields that say which pictures, in the order that `_request` takes them."""
    names, more = library.names(), bool(library.folders)
    model = gr.Dropdown(names, value=BUNDLED, label="Model", allow_custom_value=True, visible=more)
    guidance = gr.Slider(0, MOST_GUIDANCE, value=1, step=0.1, label="Guidance", info="Towards the class; 1 is none.")
    num_field = gr.Slider(1, MOST_PICTURES, value=num, step=1, label="Pictures")
    with gr.Row():
        label = gr.Dropdown([EACH, *map(str, range(10))], value=EACH, label="Class", allow_custom_value=True, min_width=150)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=110)
    prompt = gr.Textbox("", label="Prompt", info="Of a model of text only.", visible=more, max_lines=2)
    return [model, guidance, label, prompt, seed, num_field]


def _request(choice: Choice, values: tuple[Any, ...]) -> Request:
    """Return the request of what stands in the fields."""
    model, guidance, label, prompt, seed, num = values
    if label in (EACH, None, ""):
        number = None
    else:
        try:
            number = int(label)
        except ValueError:
            raise ValueError(f"class={label!r} must be a whole number, or {EACH!r}") from None
    return Request(choice, model, guidance, number, prompt or "", seed, num)


def _told(function: Callable[..., Any], others: int = 0) -> Callable[..., Any]:
    """Return the function with what was wrong as its first output, and as many others left as they are."""

    @functools.wraps(function)
    def told(*values: Any) -> Any:
        try:
            return function(*values)
        except _WRONG as error:
            message = draw.error_html(str(error) or type(error).__name__)
            return (message, *[gr.skip()] * others) if others else message

    return told


def plan_html(session: Session, request: Request) -> str:
    """Return the plan of a request as HTML: its schedule, its picture and its table."""
    plan, notes = session.plan(request)
    model = session.library.load(request.model)
    with _DRAWING:
        picture = draw.figure_html(plan.plot(model.sde), f"the plan of {plan.method}")
    return f'{picture}{draw.notes_html(notes)}<div class="lab-table"><pre>{escape(repr(plan))}</pre></div>'


@dataclass(frozen=True)
class Shown:
    """What the tab "Sample" shows for a request."""

    result: Result
    pictures: str
    strip: str
    plan: str
    code: str


def shown(session: Session, request: Request, number: int = 0) -> Shown:
    """Return what the tab "Sample" shows for a request."""
    result = session.run(request)
    strip = draw.strip_html(result, number)
    pictures = draw.result_html(result, session.library.load(request.model).sde)
    return Shown(result, pictures, strip, plan_html(session, request), session.code(request))


def _sample_tab(session: Session, first: Shown) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = choice_fields("auto", 3, 10)
            which = _request_fields(session.library, 10)
            button = gr.Button("Sample", variant="primary", elem_id="sample")
        with gr.Column(scale=5, min_width=480):
            pictures = gr.HTML(first.pictures, elem_id="pictures")
            state = gr.State(first.result)
            with gr.Tabs():
                with gr.Tab("Step by step"):
                    number = gr.Slider(1, 10, value=1, step=1, label="Picture")
                    strip = gr.HTML(first.strip, elem_id="strip")
                with gr.Tab("The plan"):
                    plan = gr.HTML(first.plan, elem_id="plan")
                with gr.Tab("Copy as Python"):
                    code = gr.Code(first.code, language="python", label="Makes the same pictures", elem_id="code", lines=10)

    def sample(number: int, *values: Any) -> tuple[Any, ...]:
        request = _request(_choice(values[:7]), values[7:])
        found = shown(session, request, number - 1)
        slider = gr.update(maximum=max(request.num, 2), value=min(number, request.num))
        return found.pictures, found.strip, found.plan, found.code, found.result, slider

    def step_by_step(number: int, result: Result) -> str:
        return draw.strip_html(result, number - 1)

    inputs, outputs = [number, *fields.all(), *which], [pictures, strip, plan, code, state, number]
    button.click(_told(sample, 5), inputs, outputs, show_progress_on=pictures, **NETWORK)
    number.change(_told(step_by_step), [number, state], strip, **LIGHT)


def _compare_tab(session: Session) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            with gr.Group():
                gr.Markdown("### A", padding=True)
                a = choice_fields("ddim", 3, 8)
            with gr.Group():
                gr.Markdown("### B", padding=True)
                b = choice_fields("auto", 3, 8)
            which = _request_fields(session.library, 6)
            button = gr.Button("Compare", variant="primary", elem_id="compare")
        with gr.Column(scale=5, min_width=480):
            result = gr.HTML("<p>Press the button: the same noise goes through A and through B.</p>", elem_id="comparison")

    def compare(*values: Any) -> str:
        request = _request(_choice(values[:7]), values[14:])
        return draw.comparison_html(session.compare(request, _choice(values[7:14])))

    button.click(_told(compare), [*a.all(), *b.all(), *which], result, **NETWORK)


def _plane_tab() -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            fields = choice_fields("tab<q>", 3, 6, calibrated=False)
            data = gr.Dropdown(list(plane.DATA), value="a spiral", label="Data")
            particles = gr.Slider(1, plane.MOST_PARTICLES, value=60, step=1, label="Particles")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            button = gr.Button("Move", variant="primary", elem_id="move")
        with gr.Column(scale=5, min_width=480):
            moving = gr.HTML("<p>Press the button: particles go from noise to the data.</p>", elem_id="moving")

    def move(*values: Any) -> str:
        *choice, name, count, number = values
        found = plane.paths(_choice(tuple(choice)), name, number, count)
        with _DRAWING:
            return draw.paths_html(found)

    button.click(_told(move), [*fields.all(), data, particles, seed], moving, **LIGHT | {"show_progress": "full"})


def build(session: Session) -> Any:
    """Return the page, a `gradio.Blocks`; the bundled model is loaded and run once for what the page opens with."""
    session.run(Request(Choice(nfe=1), BUNDLED))  # the first run of a network is slower than those after it
    first = shown(session, Request(Choice(), BUNDLED))
    with gr.Blocks(analytics_enabled=False, title="deis lab", fill_width=True) as page:
        gr.Markdown("# deis lab\nPictures from a diffusion model in few network evaluations (NFE). Change something, and look.")
        with gr.Tabs():
            with gr.Tab("Sample", elem_id="tab-sample"):
                _sample_tab(session, first)
            with gr.Tab("Side by side", elem_id="tab-side-by-side"):
                _compare_tab(session)
            with gr.Tab("In two dimensions", elem_id="tab-plane"):
                _plane_tab()
    page.queue(max_size=32, default_concurrency_limit=4)
    return page


def launch(page: Any, host: str, port: int, browser: bool = False, wait: bool = True) -> str:
    """Serve the page on this machine alone, unless the host says otherwise, and return its address."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        inbrowser=browser,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size="1kb",
        theme=theme(),
        css=CSS,
    )
    if wait:
        print(f"deis lab is at {address}; press Ctrl+C to end it", flush=True)
        page.block_thread()
    return str(address)
