"""Quality lost against what is computed, as a picture. Needs matplotlib (extra `bench`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_sparsespec.quality.measure import mean_and_error
from sglang_sparsespec.quality.report import setting_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sglang_sparsespec.quality.measure import Quality

# colours come round after ten settings; the next ten have another marker
NUM_COLOURS, MARKERS = 10, "oD^sv"
SHARES = {"read_share": "share of the KV read", "channels_kept": "channels kept", "experts_kept": "experts kept"}


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (share, loss) that no other beats in both, ascending in share."""
    found: list[tuple[float, float]] = []
    for share, loss in sorted(set(points)):
        if not found or loss < found[-1][1]:
            found.append((share, loss))
    return found


def draw(found: Sequence[Quality], path: Path) -> None:
    """A column for each kind of sparsity that was used; above KL, below positions with another argmax."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = [share for share in SHARES if min(getattr(quality, share) for quality in found) < 1] or ["read_share"]
    figure, axes = pyplot.subplots(
        2, len(columns), figsize=(6.5 * len(columns), 8), squeeze=False, sharex="col", sharey="row"
    )
    ks = len({quality.setting.num_steps for quality in found})
    for column, share in enumerate(columns):
        shown = [quality for quality in found if quality.setting.is_dense or getattr(quality, share) < 1]
        losses = [
            [mean_and_error(quality.kl) for quality in shown],
            [mean_and_error([1.0 - value for value in quality.agreement]) for quality in shown],
        ]
        for row, values in enumerate(losses):
            panel = axes[row][column]
            points = [(getattr(quality, share), loss) for quality, (loss, _) in zip(shown, values, strict=True)]
            for quality, (x, y), (_, error) in zip(shown, points, values, strict=True):
                name = setting_name(quality, ks)
                # a setting looks the same in all panels
                number = found.index(quality)
                marker = MARKERS[number // NUM_COLOURS % len(MARKERS)]
                look = {"marker": marker, "markersize": 4, "linestyle": "none", "color": f"C{number}"}
                panel.errorbar(x, y, yerr=error, label=name, **look)
            panel.plot(*zip(*front(points), strict=True), color="grey", linewidth=1, zorder=0)
            panel.grid(alpha=0.3)
        axes[1][column].set_xlabel(SHARES[share])
        axes[0][column].legend(fontsize=6)
    axes[0][0].set_ylabel("KL(dense || sparse), nats per position")
    axes[1][0].set_ylabel("positions with another argmax")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
