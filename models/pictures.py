"""The pictures of an evaluation: a grid of episodes as one mp4, and a score as one png."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from data.episode import Episode
from data.errors import BadInput

if TYPE_CHECKING:
    from models.evaluation import Score

MAX_TILES = 25
VIDEO_CAMERA = "head"
BORDER = 4  # pixels around a picture
LABEL = 16  # pixels for the text below it
SUCCESS, FAILURE = (46, 160, 67), (207, 34, 46)  # RGB
NEUTRAL = "#57606a"
WHISKER = {"color": "black", "capsize": 4, "linewidth": 1.5}
# Without mbtree, because with it one encoding in ten of the same pictures came out a few bytes different.
X264 = {"crf": "20", "preset": "veryfast", "x264-params": "mbtree=0"}
END_S = 1.0  # seconds for which the last pictures stand still


def video_grid(
    episodes: Sequence[Episode], path: Path, columns: int = 5, *, fps: int = 20, camera: str = VIDEO_CAMERA
) -> None:
    """Write the first 25 episodes side by side, at their own size, as an mp4 that browsers play (h264, yuv420p).

    Green frames are successes, red ones failures; an episode that is over stands still. The bytes depend on the
    episodes alone: one encoder thread, no dates.
    """
    import av

    if not episodes:
        raise BadInput(f"{path}: no episodes to show; evaluate on at least one seed")
    shown = [(_surround(episode, camera), episode.images[camera]) for episode in episodes[:MAX_TILES]]
    steps = max(len(pictures) for _, pictures in shown) + round(END_S * fps)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=X264)
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.height, stream.width = _grid(shown, columns, 0).shape[:2]
        for t in range(steps):
            frame = av.VideoFrame.from_ndarray(_grid(shown, columns, t), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _surround(episode: Episode, camera: str) -> UInt8[np.ndarray, "th tw 3"]:
    """A tile without its picture: a border in the outcome's colour, and under the picture a line of text."""
    height, width = episode.images[camera].shape[1:3]
    color, outcome = (SUCCESS, "ok") if episode.succeeded else (FAILURE, "fail")
    tile = Image.new("RGB", (width + 2 * BORDER, height + BORDER + LABEL), color)
    font = ImageFont.load_default(LABEL - 5)
    texts = (f"{episode.seed}: {outcome}, {len(episode)} steps", f"{episode.seed}: {outcome}")
    text = next((t for t in texts if font.getlength(t) <= width), texts[-1])
    ImageDraw.Draw(tile).text((BORDER, height + BORDER), text, "white", font)
    return np.asarray(tile)


def _grid(shown: list[tuple[np.ndarray, np.ndarray]], columns: int, t: int) -> UInt8[np.ndarray, "gh gw 3"]:
    """All tiles at step `t`, in reading order. Both sides are even, as yuv420p wants."""
    (tile_h, tile_w, _), (_, h, w, _) = shown[0][0].shape, shown[0][1].shape
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    grid = np.zeros((rows * tile_h + rows * tile_h % 2, columns * tile_w + columns * tile_w % 2, 3), np.uint8)
    for i, (surround, pictures) in enumerate(shown):
        tile = surround.copy()
        tile[BORDER : BORDER + h, BORDER : BORDER + w] = pictures[min(t, len(pictures) - 1)]
        y, x = i // columns * tile_h, i % columns * tile_w
        grid[y : y + tile_h, x : x + tile_w] = tile
    return grid


def plot(score: "Score", path: Path, *, action_error: Mapping[str, float] | None = None) -> None:
    """Write one png: success with its interval and the sub-goals, episode lengths by outcome, action error if given.

    `action_error` maps component names to mean |a_pred - a|, in the schema's order.
    """
    panels = 3 if action_error else 2
    figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    _plot_rates(axes[0], score)
    _plot_lengths(axes[1], score)
    if action_error:
        _plot_errors(axes[2], action_error)
    low, high = score.interval
    result = f"{score.success_rate:.0%} success [{low:.0%}, {high:.0%}], {score.successes} of {score.episodes} seeds"
    who = f"policy {score.policy[:19]}, protocol {score.protocol[:12]}"
    figure.suptitle(f"{score.scene}: {result}\n{who}", fontsize=11)
    figure.savefig(path, format="png", dpi=110)


def _plot_rates(axes: Axes, score: "Score") -> None:
    names = [*score.subgoals, "success"]
    rates = [*score.subgoals.values(), score.success_rate]
    low, high = score.interval
    places = range(len(names))[::-1]  # reading order: the first sub-goal on top
    axes.barh(places, rates, color=[NEUTRAL] * len(score.subgoals) + [_rgb(SUCCESS)], height=0.6)
    axes.errorbar(score.success_rate, 0, xerr=[[score.success_rate - low], [high - score.success_rate]], **WHISKER)
    labels = [f"{name}  {rate:.0%}" for name, rate in zip(names, rates, strict=True)]
    axes.set(yticks=list(places), yticklabels=labels, xlim=(0, 1))
    axes.set(xlabel="share of episodes", title="ever reached (whisker: 95 % interval)")


def _plot_lengths(axes: Axes, score: "Score") -> None:
    groups = [
        [length for length, won in zip(score.lengths, score.succeeded, strict=True) if won is wanted]
        for wanted in (True, False)
    ]
    bins = np.linspace(0, max(score.lengths), 21).tolist()
    labels = [f"success ({len(groups[0])})", f"failure ({len(groups[1])})"]
    axes.hist(groups, bins=bins, stacked=True, color=[_rgb(SUCCESS), _rgb(FAILURE)], label=labels)
    axes.set(xlabel="episode length (steps)", ylabel="episodes", title="how long episodes were")
    locator = axes.yaxis.get_major_locator()
    assert isinstance(locator, MaxNLocator)  # of a linear axis
    locator.set_params(integer=True)
    axes.legend(frameon=False)


def _plot_errors(axes: Axes, action_error: Mapping[str, float]) -> None:
    axes.barh(range(len(action_error))[::-1], list(action_error.values()), color=NEUTRAL, height=0.6)
    axes.set(yticks=list(range(len(action_error))[::-1]), yticklabels=list(action_error))
    axes.set(xlabel="mean |predicted - recorded| (action units)", title="held-out action error")


def _rgb(color: tuple[int, int, int]) -> tuple[float, float, float]:
    red, green, blue = color
    return red / 255, green / 255, blue / 255
