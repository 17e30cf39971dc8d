"""The demo's page, by Gradio: a tab for each thing that a cascade can do, in front of the functions of demo_tabs.py.

All that computes stands in one queue, one visitor after another. Files, those of visitors too, lie in GRADIO_TEMP_DIR,
which is read when the page is made, and are deleted when they are KEPT_SECONDS old. Nothing is loaded from elsewhere.
"""

import functools
import html
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
import numpy as np

from unclip_jax import __version__, demo_tabs, pictures
from unclip_jax.cascade import Cascade
from unclip_jax.demo_tabs import MOST_PICTURES, Part
from unclip_jax.errors import UserError
from unclip_jax.paths import to_path, write_bytes

KEPT_SECONDS = 3600
SHOWN_SECONDS = 30  # of an error
MOST_WAITING = 64  # in the queue; the next are told that it is full
MOST_BYTES = "64mb"  # of a visitor's picture
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # no page of fonts is asked
QUEUE = {"concurrency_id": "device", "concurrency_limit": 1}
NAMES = {"draw": "Draw", "vary": "Vary", "interpolate": "Interpolate", "text_diff": "Text diff", "inpaint": "Inpaint",
         "sdedit": "SDEdit", "classify": "Classify"}  # fmt: skip
HINTS = {
    "draw": "Pictures for a prompt. Each is shown as the model guesses it by now, until it is drawn.",
    "vary": "Other pictures of what CLIP sees in one. Eta 0 reproduces the picture, 1 varies it most.",
    "interpolate": "Steps on the way from one picture to another.",
    "text_diff": "The picture, changed the way that one caption differs from another.",
    "inpaint": "Give a picture, paint over what is to be drawn anew, and say what should be there. All else stays as "
    "it is.",
    "sdedit": "A picture of the prompt with the layout of a sketch. Start says how much noise is added to it.",
    "classify": "The probability that CLIP gives each label.",
}
SQUARE = " Models see the square in the middle of a picture."
SLOW = "The first pictures, and the first of other settings, take longer: programs are compiled for them."
# Pictures fill their boxes, however few pixels they have; no row of a gallery is hidden.
STYLE = "[id$=-picture] img, [id$=-frame] img, [id$=-gif] img {width: 100%; height: 100%; object-fit: contain} "
STYLE += ".fixed-height {max-height: none !important}"
PAINT = "#ff00a0"  # of what is to be drawn anew: seen on most pictures


def build(cascade: Cascade) -> gr.Blocks:
    """Makes the page for a cascade. Raises UserError for one that can do nothing."""
    makers: dict[str, Callable] = {"draw": _draw, "vary": _vary, "interpolate": _interpolate, "text_diff": _text_diff}
    makers |= {"inpaint": _inpaint, "sdedit": _sdedit, "classify": _classify}
    names = demo_tabs.tabs(cascade)
    cached = KEPT_SECONDS // 4, KEPT_SECONDS
    with gr.Blocks(title="unclip_jax", analytics_enabled=False, delete_cache=cached, fill_width=True) as page:
        gr.Markdown(f"**unclip_jax** draws {demo_tabs.about(cascade)}. {SLOW}")
        for name in names:
            with gr.Tab(NAMES[name], id=name, elem_id=f"tab-{name}"):
                gr.Markdown(HINTS[name] + (SQUARE if name != "draw" else ""))
                makers[name](cascade)
    return page.queue(max_size=MOST_WAITING)


def launch(page: gr.Blocks, host: str, port: int, share: bool) -> tuple[str, str | None]:
    """Serves a page until its `close`. Returns its address, and a public one where it is shared.

    Raises UserError where the port was taken in between, or the page cannot be reached or shared.
    """
    shown = {"theme": gr.themes.Default(**FONTS), "css": STYLE, "footer_links": [], "run_history": False}
    off = {"ssr_mode": False, "pwa": False, "mcp_server": False, "enable_monitoring": False, "inline": False}
    where = {"server_name": host, "server_port": port, "share": share, "max_file_size": MOST_BYTES}
    try:
        _, address, public = page.launch(prevent_thread_lock=True, quiet=True, **where, **shown, **off)
    except OSError as error:
        raise UserError(f"port {port} of {host} is in use: choose another by --port") from error
    except ValueError as error:
        raise UserError(f"the page at {host}:{port} cannot be reached: is a proxy set, in HTTP_PROXY?") from error
    if share and not public:
        page.close(verbose=False)
        raise UserError("--share: Gradio's server cannot be reached, or its tunnel not be fetched: leave it out")
    return address, public


def _draw(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            prompt, count, seed = _prompt("draw"), _count(), _seed()
            with gr.Accordion("How it is drawn", open=False):
                guidance, prior_guidance = _guidance(cascade, "decoder"), _guidance(cascade, "prior")
                sampler = gr.Dropdown(demo_tabs.samplers(cascade), label="Sampler")
                steps = gr.Dropdown(demo_tabs.steps(cascade), label="Steps")
            button = _button("draw")
        shown = _gallery("draw")
    given = {"prompt": prompt, "count": count, "seed": seed, "guidance": guidance, "prior_guidance": prior_guidance}
    given |= {"sampler": sampler, "steps": steps}
    streamed = functools.partial(_streamed, cascade, "draw", demo_tabs.draw)
    _on([button.click, prompt.submit], streamed, given, shown, "draw")


def _vary(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            picture, eta = _picture("Picture", "vary"), gr.Slider(0, 1, 1, label="Eta")
            count, seed, steps = _count(), _seed(), _inversion_steps(cascade)
            button = _button("vary")
        shown = _gallery("vary")

    given = {"picture": picture, "eta": eta, "count": count, "seed": seed, "steps": steps}
    _on([button.click], functools.partial(_streamed, cascade, "vary", demo_tabs.vary), given, shown, "vary")


def _interpolate(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            with gr.Row():
                first, second = _picture("First", "interpolate-first"), _picture("Second", "interpolate-second")
            count, seed, steps = _count("Frames", 8), _seed(), _inversion_steps(cascade)
            button = _button("interpolate")
        outputs = _path("interpolate")
    given = {"first": first, "second": second, "count": count, "seed": seed, "steps": steps}
    answer = functools.partial(_path_shown, cascade, "interpolate", demo_tabs.interpolate, "{:.2f}")
    _on([button.click], answer, given, outputs, "interpolate")


def _text_diff(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            picture = _picture("Picture", "text_diff")
            before = gr.Textbox(label="Before", placeholder="a cat; may be empty")
            after = gr.Textbox(label="After", placeholder="an anime cat")
            theta, count = gr.Slider(0, 1, 0.4, label="Theta"), _count("Frames", 8)
            seed, steps = _seed(), _inversion_steps(cascade)
            button = _button("text_diff")
        outputs = _path("text_diff")
    given = {"picture": picture, "before": before, "after": after, "theta": theta}
    given |= {"count": count, "seed": seed, "steps": steps}
    answer = functools.partial(_path_shown, cascade, "text_diff", demo_tabs.text_diff, "theta {:.2f}")
    _on([button.click], answer, given, outputs, "text_diff")


def _inpaint(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            brush = gr.Brush(colors=[PAINT], color_mode="fixed")
            painted = _editor("Picture", "inpaint", brush, ["upload", "clipboard"])
            prompt, count, seed, guidance = _prompt("inpaint"), _count(), _seed(), _guidance(cascade, "decoder")
            button = _button("inpaint")
        shown = _gallery("inpaint")
    given = {"painted": painted, "prompt": prompt, "count": count, "seed": seed, "guidance": guidance}
    _on([button.click], functools.partial(_streamed, cascade, "inpaint", demo_tabs.inpaint), given, shown, "inpaint")


def _sdedit(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            sketched = _editor("Sketch", "sdedit", gr.Brush(), ["upload", "clipboard"])
            prompt, start = _prompt("sdedit"), gr.Slider(0, 1, 0.5, label="Start")
            count, seed, guidance = _count(), _seed(), _guidance(cascade, "decoder")
            button = _button("sdedit")
        shown = _gallery("sdedit")
    given = {"sketched": sketched, "prompt": prompt, "start": start}
    given |= {"count": count, "seed": seed, "guidance": guidance}
    _on([button.click], functools.partial(_streamed, cascade, "sdedit", demo_tabs.sdedit), given, shown, "sdedit")


def _classify(cascade: Cascade) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            picture = _picture("Picture", "classify")
            labels = gr.Textbox(label="Labels", placeholder="cat, dog, tent", info="with commas between them")
            template = gr.Textbox("{}", label="Caption", info="{} stands for a label: a photo of a {}.")
            button = _button("classify")
        shown = gr.Label(label="Probabilities", elem_id="classify-shown", scale=2)
    given = {"picture": picture, "labels": labels, "template": template}
    _on([button.click], functools.partial(demo_tabs.classify, cascade), given, shown, "classify")


def _on(events: list[Callable], answer: Callable, given: dict[str, Any], outputs: Any, name: str) -> None:
    """Has events answered by `answer(**values of the components in given)`, in the queue of all visitors.

    A UserError is shown as one line. given: parameter → component; None for what the cascade does not have.
    """
    names = [key for key, component in given.items() if component is not None]
    inputs = [given[key] for key in names]

    def generator(*values: Any) -> Iterator[Any]:
        try:
            result = answer(**dict(zip(names, values, strict=True)))
            if isinstance(result, Iterator):
                yield from result
            else:
                yield result
        except UserError as error:
            raise gr.Error(html.escape(str(error)), duration=SHOWN_SECONDS, print_exception=False) from None

    gr.on(events, generator, inputs, outputs, api_name=name, trigger_mode="once", **QUEUE)


def _streamed(
    cascade: Cascade, name: str, draw: Callable[..., Iterator[Part]], **given: Any
) -> Iterator[list[str]]:
    """Yields the files of the pictures that are drawn so far, and of what is predicted of the next."""
    files: list[str] = []
    for part in draw(cascade, **given):
        if part.drawn:
            files = files + _saved(part.images, cascade, name, given, len(files))
        yield files if part.drawn else files + _previews(part)


def _path_shown(
    cascade: Cascade, name: str, draw: Callable[..., Iterator[Part]], label: str, **given: Any
) -> Iterator[tuple]:
    """Yields frames: for the gallery, the state that the slider reads, the slider, the picture beside it and the GIF.

    label: below a frame, with its place from 0 to `theta`, or 1.
    """
    for part in draw(cascade, **given):
        labels = [label.format(share) for share in np.linspace(0, given.get("theta", 1), len(part.images))]
        if not part.drawn:
            yield list(zip(_previews(part), labels, strict=True)), *[gr.skip()] * 4
            continue
        files = _saved(part.images, cascade, name, given)
        animation = _file(f"{name}.gif", pictures.gif(part.images))
        slider = gr.Slider(1, max(2, len(files)), 1, step=1)
        yield list(zip(files, labels, strict=True)), files, slider, files[0], animation


def _previews(part: Part) -> list[str]:
    """Writes files of what is predicted."""
    return [_file("preview.png", pictures.png(image)) for image in part.images]


def _saved(drawn: np.ndarray, cascade: Cascade, name: str, given: dict[str, Any], first: int = 0) -> list[str]:
    """Writes pictures as PNG files that hold what drew them. first: number of the first."""
    told = {key: value for key, value in given.items() if isinstance(value, str | float | int)}
    told = {key: value for key, value in told.items() if key not in ("picture", "first", "second")}
    about = {"tab": name, "models": cascade.identities(), "version": __version__} | told
    title = pictures.file_name(str(told.get("prompt", name))) or name
    return [
        _file(f"{title}_{given['seed']}_{i}.png", pictures.png(image, {"demo": json.dumps(about | {"index": i})}))
        for i, image in enumerate(drawn, first)
    ]


def _file(name: str, content: bytes) -> str:
    """Writes a file of this name into a new folder, which no visitor can guess; returns its path."""
    root = os.environ.get("GRADIO_TEMP_DIR")
    path = to_path(tempfile.mkdtemp(dir=root)) / name
    write_bytes(path, content)
    return str(path)


def _prompt(name: str) -> gr.Textbox:
    example = "a red apple on a blue background"
    return gr.Textbox(label="Prompt", placeholder=example, elem_id=f"{name}-prompt", max_length=2000)


def _count(label: str = "Pictures", value: int = 4) -> gr.Slider:
    return gr.Slider(1, MOST_PICTURES, value, step=1, label=label)


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1)  # whole in JavaScript too


def _guidance(cascade: Cascade, name: str) -> gr.Slider | None:
    """Makes a slider of a model's guidance; None where it is not guided, or takes no part in what is drawn."""
    model = cascade.models().get(name)
    unused = name == "prior" and demo_tabs.source(cascade) != "prior"
    if unused or not model or not model.stage.guided or "guidance_scale" not in model.stage.config.sampling:
        return None
    scale = model.stage.config.sampling.guidance_scale
    label = "Guidance" if name == "decoder" else "Guidance of the prior"
    return gr.Slider(0, max(10, 2 * scale), scale, label=label, info="1: none. More follows the caption more closely.")


def _inversion_steps(cascade: Cascade) -> gr.Dropdown:
    info = "of DDIM, to and fro. Fewer are faster, and reproduce the picture less well."
    return gr.Dropdown(demo_tabs.inversion_steps(cascade), label="Steps", info=info)


def _picture(label: str, name: str) -> gr.Image:
    options = {"type": "filepath", "sources": ["upload", "clipboard"], "buttons": ["fullscreen"]}
    picture = gr.Image(label=label, elem_id=f"{name}-picture", height=240, **options)
    # The file as it was sent, which `demo_tabs.read` decodes, or refuses in one line.
    picture.preprocess = lambda payload: payload.path if payload else None
    return picture


def _editor(label: str, name: str, brush: gr.Brush, sources: list[str]) -> gr.ImageEditor:
    options = {"type": "numpy", "format": "png", "layers": False, "transforms": (), "buttons": ["fullscreen"]}
    where = {"canvas_size": (512, 512), "height": 460, "elem_id": f"{name}-picture"}
    return gr.ImageEditor(label=label, sources=sources, brush=brush, **options, **where)


def _gallery(name: str) -> gr.Gallery:
    buttons = ["download", "fullscreen"]
    shown = {"columns": 4, "object_fit": "contain", "buttons": buttons, "format": "png", "interactive": False}
    with gr.Column(scale=2):
        return gr.Gallery(label="Pictures", elem_id=f"{name}-shown", **shown)


def _path(name: str) -> list[Any]:
    """Makes what shows frames: a gallery, the state that the slider reads, the slider, a picture and the GIF."""
    with gr.Column(scale=2):
        gallery, files = _gallery(name), gr.State([])
        slider = gr.Slider(1, 8, 1, step=1, label="Frame", elem_id=f"{name}-slider")
        with gr.Row():
            plain = {"interactive": False, "format": "png", "height": 300, "buttons": ["download", "fullscreen"]}
            frame = gr.Image(label="Frame", elem_id=f"{name}-frame", **plain)
            animation = gr.Image(label="GIF", elem_id=f"{name}-gif", **plain | {"format": "gif", "type": "filepath"})
    slider.change(frame_of, [files, slider], frame, queue=False, show_progress="hidden", api_visibility="private")
    return [gallery, files, slider, frame, animation]


def frame_of(files: list[str], number: float) -> str | None:
    """Finds the file of a frame by its number from 1: the last where there are fewer, None where there are none."""
    return files[min(int(number), len(files)) - 1] if files else None


def _button(name: str) -> gr.Button:
    return gr.Button(NAMES[name], variant="primary", elem_id=f"{name}-button")
