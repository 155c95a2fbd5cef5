"""The page in Gradio: a picture, a question, methods; below, what came of them side by side."""

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from PIL import Image

from vlmfast.adapters import ADAPTERS
from vlmfast.eval import tasks
from vlmfast.eval.demo.answering import SEPARATOR, Room, render

SHOWN = ("colour", "count", "where", "word", "digits", "caption")  # tasks that the examples are questions of
FIRST = ("hiprune", "random")  # methods chosen when the page opens, where the model has them
LEAST = 0.05  # keep
FONTS = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # the machine's own: nothing is fetched


def about(method: str) -> str:
    """What a method does, as a line of a list."""
    return f"- **{method}** ({ADAPTERS[method].kind}): {ADAPTERS[method].summary}"


def examples(folder: Path) -> list[list[str]]:
    """Scenes of the testbed, written to the folder, each with a question: [file, question]."""
    found: dict[int, list[str]] = {}  # by scene
    for name in SHOWN:
        task = tasks.TASKS[name]
        doc = next(doc for doc in task.load(len(SHOWN), seed=0) if doc.scene not in found)
        path = folder / f"{name}.png"
        Image.fromarray(tasks.image(doc)).save(path)
        found[doc.scene] = [str(path), task.prompt(doc)]
    return list(found.values())


def build(room: Room, title: str) -> gr.Blocks:
    """The page. title: says which model it is."""
    offered, scenes = room.offered, examples(room.folder)
    with gr.Blocks(title="vlmfast demo", analytics_enabled=False) as page:
        gr.HTML(f"<h1>vlmfast</h1><p>{escape(title)}</p>", elem_id="head", apply_default_css=False)
        with gr.Row():
            with gr.Column(min_width=280):
                picture = gr.Image(
                    scenes[0][0],
                    type="filepath",
                    label="Picture",
                    sources=["upload", "clipboard"],
                    height=270,
                    elem_id="picture",
                )
            with gr.Column(min_width=280, scale=2):
                question = gr.Textbox(scenes[0][1], label="Question", max_lines=4, elem_id="question")
                methods = gr.Dropdown(
                    list(offered.items()),
                    value=[offered[name] for name in FIRST if name in offered],
                    multiselect=True,
                    label="Methods (the model without any is asked in any case)",
                )
                with gr.Row():
                    keep = gr.Slider(
                        LEAST, 1.0, 0.33, step=0.01, label="Keep", info="Share of the visual tokens", min_width=240
                    )
                    typed = gr.Textbox(
                        label="Other methods",
                        placeholder="hiprune:keep=0.33+var",
                        info=f"Specs with {SEPARATOR} between; their own keep wins",
                        min_width=240,
                    )
                button = gr.Button("Ask", variant="primary")
        gr.Examples(scenes, [picture, question], label="Examples", example_labels=[text for _, text in scenes])
        with gr.Accordion("What the methods do", open=False):
            gr.Markdown("\n".join(map(about, offered)))
        answers = gr.HTML(elem_id="answers", apply_default_css=False)

        def ask(
            picture: dict[str, Any] | None, question: str, methods: Sequence[str], keep: float, typed: str
        ) -> Iterator[str]:
            file = None if picture is None else picture["path"]
            for progress in room.ask(file, question or "", methods or [], keep, typed or ""):
                yield render(progress)

        gr.on(
            [button.click, question.submit, typed.submit],
            ask,
            [picture, question, methods, keep, typed],
            answers,
            preprocess=False,  # vlmfast reads the file as it came, and says itself what is wrong with it
            concurrency_limit=1,
            trigger_mode="always_last",  # what is asked meanwhile comes next
            api_visibility="private",
        )
    return page


def theme() -> gr.themes.Base:
    """Gradio's own, with the machine's fonts and texts that stand out enough to be read."""
    plain, mono = FONTS
    return gr.themes.Default(primary_hue="blue", font=plain, font_mono=mono).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )


def application(room: Room, title: str) -> fastapi.FastAPI:
    """The page as a web application that asks nobody outside of this machine."""
    page = build(room, title).queue(default_concurrency_limit=1)
    page.has_launched = True  # a page that is mounted would take any file of this machine for an upload
    return gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=files("vlmfast.eval.demo").joinpath("page.css").read_text("utf-8"),
    )
