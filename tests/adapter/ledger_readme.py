"""patches/README.md, as far as it follows from the ledger; `python -m tests.adapter.ledger_readme` writes it."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[2] / "patches" / "README.md"
BEGIN = "<!-- entries: written from patches.LEDGER by `python -m tests.adapter.ledger_readme` -->"
END = "<!-- end of entries -->"


def render() -> str:
    """One entry per patch, by scope, five lines each."""
    from sglang_sparsespec.patches import LEDGER

    lines: list[str] = []
    for scope in dict.fromkeys(patch.scope for patch in LEDGER):
        lines += [f"## Scope `{scope}`", ""]
        for patch in LEDGER:
            if patch.scope != scope:
                continue
            name = ".".join(patch.target.split(".")[-2:])
            lines += [
                f"### {name}",
                "",
                f"- **Target:** `{patch.target}` ({patch.kind}), SGLang {', '.join(patch.versions)}",
                f"- **Why:** {patch.why}",
                f"- **How:** {patch.how}",
                f"- **Upstream:** {patch.upstream}",
                f"- **Remove when:** {patch.remove_when}",
                "",
            ]
    return "\n".join(lines)


def entries_of(text: str) -> str:
    """What stands between the two marks."""
    _, _, rest = text.partition(BEGIN)
    entries, mark, _ = rest.partition(END)
    assert mark, f"{README} has lost one of its marks"
    return entries.strip("\n")


def main() -> None:
    head, _, rest = README.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    README.write_text(f"{head}{BEGIN}\n\n{render()}\n{END}{tail}")


if __name__ == "__main__":
    main()
