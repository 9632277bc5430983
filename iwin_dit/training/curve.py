"""The curve of a run's loss, with the figures of its evaluations."""

from __future__ import annotations

from pathlib import Path

from iwin_dit.runtime.progress import say
from iwin_dit.runtime.run import RunDirectory


def draw_loss_curve(run: RunDirectory) -> Path | None:
    """``loss.png`` from the log, figures of evaluations beside it; None, and a hint, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        say("no loss curve: it needs matplotlib, pip install 'iwin-dit[demo]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = run.read_log()
    logged = [r for r in records if r.get("loss") is not None]
    figures = [r for r in records if "evaluated" in r]
    names = [name for name in (figures[-1] if figures else {}) if name not in ("step", "evaluated")]
    figure, axes = plt.subplots(
        1, 1 + len(names), figsize=(7 + 4 * len(names), 4), layout="constrained", squeeze=False
    )
    steps, losses = [r["step"] for r in logged], [r["loss"] for r in logged]
    axes[0, 0].plot(steps, losses, color="0.8", label="each log line")
    axes[0, 0].plot(steps, _smooth(losses), color="tab:blue", label="running mean")
    axes[0, 0].set(xlabel="step", ylabel="loss", title=run.path.name)
    axes[0, 0].legend(frameon=False)
    for panel, name in zip(axes[0, 1:], names, strict=True):
        shown = [r for r in figures if name in r]
        panel.plot([r["step"] for r in shown], [r[name] for r in shown], marker="o", color="tab:blue")
        panel.set(xlabel="step", title=name)
    for panel in axes[0]:
        panel.spines[["top", "right"]].set_visible(False)
    path = run.path / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _smooth(values: list[float], reach: int = 5) -> list[float]:
    """The mean of each value and up to ``reach`` on both sides."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
