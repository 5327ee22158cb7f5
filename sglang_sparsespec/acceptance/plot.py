"""Acceptance by draft position, and the modelled speed-up by k, as a picture. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.acceptance.report import TEXT_NAMES, setting_name, temperature_name, varied_options
from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sglang_sparsespec.acceptance.measure import Measurement
    from sglang_sparsespec.speculation.cost_model import RoundCost


def check_available() -> None:
    """Raise a ConfigError before hours of measuring, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot", "given", "left out without matplotlib", "pip install 'sglang-sparsespec[bench]'."
        ) from None


def draw(measurements: Sequence[Measurement], cost: RoundCost | None, path: Path) -> None:
    """One column for each text and temperature; above acceptance by position, below speed-up by k given costs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    varied = varied_options(measurements)
    columns = sorted({(m.text, m.temperature) for m in measurements})
    num_rows = 1 if cost is None else 2
    figure, axes = pyplot.subplots(
        num_rows, len(columns), figsize=(4.5 * len(columns), 3.5 * num_rows), squeeze=False, sharex=True, sharey="row"
    )
    for column, (text, temperature) in enumerate(columns):
        top = axes[0][column]
        top.set_title(f"{TEXT_NAMES[text]}, {temperature_name(temperature)}")
        for m in measurements:
            if (m.text, m.temperature) != (text, temperature):
                continue
            positions = range(1, m.setting.config.num_steps + 1)
            name = f"{setting_name(m, varied)} ({m.accept_length:.2f})"
            [line] = top.plot(positions, m.accept_rates, marker="o", markersize=3, label=name)
            if cost is not None and m.setting.knows_cost:
                alive = m.mean_survival
                speedups = [m.setting.cost(cost).speedup(k, m.read_share, 1.0 + sum(alive[:k])) for k in positions]
                axes[1][column].plot(positions, speedups, marker="o", markersize=3, color=line.get_color())
        top.legend(fontsize=7, title="accept length, bonus counted", title_fontsize=7)
        axes[-1][column].set_xlabel("draft position" if cost is None else "draft position; k")
    axes[0][0].set_ylabel("acceptance")
    if cost is not None:
        axes[1][0].set_ylabel(f"speed-up, W={cost.weights_ms:g} ms, A={cost.attention_ms:g} ms")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
